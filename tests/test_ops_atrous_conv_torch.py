# SPDX-License-Identifier: Apache-2.0
"""Atrous convolution as torch sees it: opcheck, compile, export, autocast, FLOP; layers."""

from __future__ import annotations

import copy

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random, same_bits
from torch import nn
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import pydense
from pydense.nn import AtrousConv2d, convert
from pydense.ops import atrous_conv2d

OPS = torch.ops.pydense
FORMATS = [torch.contiguous_format, torch.channels_last]


def problem(dtype=torch.float32, form=FORMATS[0]):
    x = random(2, 3, 5, 6).to(dtype).contiguous(memory_format=form)
    return x, random(3, 1, 3, 3, seed=1).to(dtype), random(3, seed=2).to(dtype)


def leaves(*tensors):
    return [t.requires_grad_() for t in tensors]


class TestTorch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype):
        for form in FORMATS:
            x, weight, bias = leaves(*problem(dtype, form))
            for own, flipped, relu in ((bias, False, True), (None, True, False)):
                opcheck(
                    OPS.depthwise_atrous_conv2d.default,
                    (x, weight, own, 6, 4, 2, 3, 2, 2, flipped, relu),
                )
            opcheck(OPS.depthwise_atrous_conv2d_weight_gradient.default, (x, x, 3, 2, 2, 1, 2, 1))

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler):
        torch._dynamo.reset()

        def call(x, weight, bias):
            y = atrous_conv2d(x.sin(), weight, bias, dilation=2, groups=3, activation="relu")
            return atrous_conv2d(y, weight.expand(3, 3, 3, 3), dilation=2)

        function = torch.compile(call, fullgraph=True, backend=compiler)
        for form in FORMATS:
            arguments = leaves(*problem(form=form))
            found = []
            for run in (function, call):
                out = run(*arguments)
                found.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
            for a, b in zip(*found, strict=True):
                assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())

    @pytest.mark.parametrize("groups", [1, 3])
    def test_export(self, groups):
        layer = AtrousConv2d(3, 3, 3, padding="same", dilation=4, groups=groups).eval()
        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        program = export(layer, (random(2, 3, 8, 9),), dynamic_shapes=shapes).module()
        for size in ((2, 3, 8, 9), (3, 3, 2, 40), (1, 3, 21, 5)):
            x = random(*size)
            assert torch.allclose(program(x), layer(x), atol=1e-6)

    @pytest.mark.parametrize("groups", [1, 3])
    def test_autocast_as_a_convolution(self, groups):
        layer = AtrousConv2d(3, 3, 3, padding=2, dilation=2, groups=groups)
        x = random(2, 3, 5, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
            wide = copy.deepcopy(layer).double()(x.double())
        assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
        out.sum().backward()
        assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32

    def test_flops(self):
        """As torch counts convolutions."""
        x, weight, bias = leaves(*problem())
        counts = []
        for run in (
            lambda: atrous_conv2d(x, weight, bias, dilation=2, groups=3),
            lambda: nn.functional.conv2d(x, weight, bias, padding=2, dilation=2, groups=3),
        ):
            with FlopCounterMode(display=False) as counter:
                out = run()
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
            counts.append((counter.get_total_flops(), backward.get_total_flops()))
        assert counts[0][0] == counts[1][0] == 2 * x.numel() * 9
        assert counts[0][1] == 2 * counts[0][0]

    def test_refused_by_the_kernels(self):
        x, weight, bias = problem()
        for change, text in (
            ({0: x[0]}, "x must have 4 dimensions"),
            ({1: weight[:2]}, r"weight must have shape \(3, 1, kH, kW\)"),
            ({1: weight.double()}, "weight must be of dtype Float, got Double"),
            ({2: bias[:2]}, r"bias must have shape \(3\)"),
            ({3: 0}, r"output size must be at least 1, got \(0, 6\)"),
            ({5: 0}, r"dilation must be in \[1, 2147483648\), got \(0, 2\)"),
        ):
            arguments = [x, weight, bias, 5, 6, 2, 2, 2, 2, False, False]
            for i, value in change.items():
                arguments[i] = value
            with pytest.raises(ValueError, match=f"depthwise_atrous_conv2d: {text}"):
                OPS.depthwise_atrous_conv2d(*arguments)
        run = OPS.depthwise_atrous_conv2d_weight_gradient
        name = "depthwise_atrous_conv2d_weight_gradient"
        with pytest.raises(ValueError, match=f"{name}: grad must have batch and channels of x"):
            run(x[:1], x, 3, 3, 1, 1, 1, 1)
        with pytest.raises(ValueError, match=f"{name}: kernel size must be at least 1"):
            run(x, x, 0, 3, 1, 1, 1, 1)


class Net(nn.Module):
    """Dilated and other convolutions, one used twice, one with other padding."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=6, dilation=6, groups=8),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding="same", dilation=2),
        )
        self.shared = self.blocks[0]
        self.reflected = nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="reflect")
        self.narrowed = nn.Conv2d(8, 4, 3, stride=2, padding=4, dilation=(4, 1))

    def forward(self, x):
        x = self.shared(self.blocks(self.plain(x)))
        return self.narrowed(self.reflected(x))


class TestLayers:
    def test_is_conv2d(self):
        own, theirs = (
            AtrousConv2d(8, 8, 3, padding=4, dilation=4, groups=8),
            nn.Conv2d(8, 8, 3, padding=4, dilation=4, groups=8),
        )
        assert repr(own) == "Atrous" + repr(theirs)
        theirs.load_state_dict(own.state_dict())
        for x in (random(2, 8, 9, 10), random(8, 9, 10)):
            assert own(x).shape == theirs(x).shape
            assert torch.allclose(own(x), theirs(x), atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_convert(self, dtype):
        torch.manual_seed(0)
        model = Net().eval().to(dtype)
        before = copy.deepcopy(model)
        keys, parameters = [*model.state_dict()], [id(p) for p in model.parameters()]
        assert convert(model) is model
        assert [*model.state_dict()] == keys
        assert [id(p) for p in model.parameters()] == parameters
        kinds = [type(m).__name__ for m in model.modules()]
        assert kinds.count("AtrousConv2d") == 4 and kinds.count("Conv2d") == 1
        assert model.shared is model.blocks[0]
        x = random(2, 3, 20, 17).to(dtype)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(model(x), before(x), atol=tolerance)
        model.load_state_dict(before.state_dict())
        again = [id(m) for m in convert(model).modules()]
        assert again == [id(m) for m in model.modules()]

    def test_training_goes_on(self):
        """Parameters, hooks and mode stay."""
        conv = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
        calls = []
        handle = conv.register_forward_hook(lambda *_: calls.append(1))
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        layer = convert(conv.eval())
        assert isinstance(layer, AtrousConv2d) and not layer.training
        x = random(2, 4, 9, 8)
        before = layer(x).square().mean()
        before.backward()
        optimizer.step()
        assert float(layer(x).square().mean()) < float(before)
        handle.remove()
        layer(x)
        assert len(calls) == 2
        other = pydense.nn.AtrousConv2d.from_conv(conv)
        assert other.weight is conv.weight and same_bits(other(x), layer(x))

    def test_refused(self):
        class Other(nn.Conv2d):
            pass

        text = "AtrousConv2d: module must be an nn.Conv2d, got Other"
        with pytest.raises(TypeError, match=text):
            AtrousConv2d.from_conv(Other(2, 2, 3))
        assert type(convert(Other(2, 2, 3, dilation=2))) is Other
        with pytest.raises(TypeError, match=r"convert: model must be an nn.Module, got int"):
            convert(3)
