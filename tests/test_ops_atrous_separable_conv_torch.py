# SPDX-License-Identifier: Apache-2.0
"""Separable atrous convolution as torch sees it: opcheck, compile, export, autocast; its layer."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
from _bits import assert_same_bits
from _ops import one_thread as one_thread
from _ops import random
from torch import nn
from torch.export import Dim, export
from torch.library import opcheck
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import pydense
from pydense.nn import AtrousSeparableConv2d
from pydense.ops import atrous_separable_conv2d

OPS = torch.ops.pydense
FORMATS = [torch.contiguous_format, torch.channels_last]


def problem(dtype=torch.float32, form=FORMATS[0]):
    x = random(2, 3, 5, 6).to(dtype).contiguous(memory_format=form)
    return [
        x,
        random(3, 1, 3, 3, seed=1).to(dtype),
        random(4, 3, 1, 1, seed=2).to(dtype),
        random(3, seed=3).to(dtype),
        random(4, seed=4).to(dtype),
    ]


def leaves(tensors):
    return [t.requires_grad_() for t in tensors]


class TestTorch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype):
        for form in FORMATS:
            x, depthwise, pointwise, inner, outer = leaves(problem(dtype, form))
            for biases, relu in (((inner, outer), True), ((None, None), False)):
                opcheck(
                    OPS.atrous_separable_conv2d.default,
                    (x, depthwise, biases[0], pointwise, biases[1], 6, 4, 2, 3, 2, 2, relu, False),
                )

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler):
        torch._dynamo.reset()

        def call(x, *rest):
            return atrous_separable_conv2d(x.sin(), *rest, dilation=2, activation="relu")

        function = torch.compile(call, fullgraph=True, backend=compiler)
        for form in FORMATS:
            arguments = leaves(problem(form=form))
            found = []
            for run in (function, call):
                out = run(*arguments)
                found.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
            for a, b in zip(*found, strict=True):
                assert a.stride() == b.stride()
                assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())

    def test_export(self):
        layer = AtrousSeparableConv2d(3, 4, dilation=4, inner_norm=True, norm=True).eval()
        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        program = export(layer, (random(2, 3, 8, 9),), dynamic_shapes=shapes).module()
        for size in ((2, 3, 8, 9), (3, 3, 2, 40), (1, 3, 21, 5)):
            x = random(*size)
            assert torch.allclose(program(x), layer(x), atol=1e-6)

    def test_autocast_as_a_convolution(self):
        arguments = leaves(problem())
        with torch.autocast("cpu", torch.bfloat16):
            out = atrous_separable_conv2d(*arguments)
            wide = atrous_separable_conv2d(*(t.detach().double() for t in arguments))
        assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
        out.sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in arguments)

    def test_flops(self):
        """As torch counts the two convolutions."""
        x, depthwise, pointwise, *_ = problem()
        counts = []
        for run in (
            lambda: atrous_separable_conv2d(x, depthwise, pointwise),
            lambda: pydense.reference.atrous_separable_conv2d(x, depthwise, pointwise),
        ):
            with FlopCounterMode(display=False) as counter:
                run()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] == 2 * 2 * 30 * (3 * 9 + 3 * 4)

    def test_refused_by_the_kernels(self):
        x, depthwise, pointwise, inner, outer = problem()
        for change, text in (
            ({0: x[0]}, "x must have 4 dimensions"),
            ({1: depthwise[:2]}, r"depthwise_weight must have shape \(3, 1, kH, kW\)"),
            ({1: depthwise.double()}, "depthwise_weight must be of dtype Float, got Double"),
            ({2: inner[:2]}, r"depthwise_bias must have shape \(3\)"),
            ({3: pointwise[:, :2]}, r"pointwise_weight must have shape \(O, 3, 1, 1\)"),
            ({3: pointwise[:0], 4: None}, "channels must be at least 1, got 3 to 0"),
            ({4: outer.double()}, "pointwise_bias must be of dtype Float, got Double"),
            ({5: 0}, r"output size must be at least 1, got \(0, 6\)"),
            ({7: 0}, r"dilation must be in \[1, 2147483648\), got \(0, 2\)"),
        ):
            arguments = [x, depthwise, inner, pointwise, outer, 5, 6, 2, 2, 2, 2, False, False]
            for i, value in change.items():
                arguments[i] = value
            with pytest.raises(ValueError, match=f"atrous_separable_conv2d: {text}"):
                OPS.atrous_separable_conv2d(*arguments)


BITS = """
import sys, torch
import pydense
from pydense.ops import atrous_separable_conv2d
torch.set_num_threads(int(sys.argv[1]))
g = torch.Generator().manual_seed(0)
x, d, p = (torch.randn(s, generator=g) for s in ((1, 300, 20, 45), (300, 1, 3, 3), (40, 300, 1, 1)))
assert pydense.build_info()["cpu_capability"] == sys.argv[2]
for form in (torch.contiguous_format, torch.channels_last):
    for dtype in (torch.float32, torch.float16):
        out = atrous_separable_conv2d(
            x.to(dtype).contiguous(memory_format=form), d.to(dtype), p.to(dtype), dilation=7
        )
        print(out.float().contiguous().numpy().tobytes().hex())
"""


def test_instruction_sets():
    """The same bits on all that have fused multiply-add, for any threads and both layouts."""
    found = {}
    for isa in ("baseline", "avx2", "avx512", "avx512_bf16"):
        for count in (1, 3):
            run = subprocess.run(
                [sys.executable, "-c", BITS, str(count), isa],
                env={**os.environ, "PYDENSE_CPU_CAPABILITY": isa},
                capture_output=True,
                text=True,
                check=False,
            )
            if run.returncode and "not available" in run.stderr:
                continue
            assert run.returncode == 0, run.stderr
            lines = [bytes.fromhex(line) for line in run.stdout.split()]
            assert len(lines) == 4 and lines[0] == lines[2] and lines[1] == lines[3]
            found[isa, count] = tuple(lines)
    assert len(found) >= 2
    assert_same_bits({key: lines[:1] for key, lines in found.items()})
    fused = [lines[1] for (isa, _), lines in found.items() if isa != "baseline"]
    assert len(set(fused)) <= 1


class TestBackwardInsideAutocast:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_nothing_is_cast(self, form, activation):
        found = []
        for narrow in (False, True):
            arguments = leaves(problem(form=form))
            out = atrous_separable_conv2d(*arguments, dilation=2, inner_activation=activation)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                out.square().sum().backward()
            found.append([t.grad for t in arguments])
        assert all(
            a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*found, strict=True)
        )


class TestLayer:
    @pytest.mark.parametrize("inner_norm", [False, True])
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_equals_its_layers(self, inner_norm, norm, bias):
        """In training, where statistics are the batch's and are kept, and in one pass."""
        torch.manual_seed(0)
        layer = AtrousSeparableConv2d(
            6,
            5,
            dilation=3,
            bias=bias,
            inner_norm=inner_norm,
            norm=norm,
            inner_activation="relu",
            activation="relu",
        )
        plain = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding="same", dilation=3, groups=6, bias=bias),
            nn.BatchNorm2d(6) if inner_norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(6, 5, 1, bias=bias),
            nn.BatchNorm2d(5) if norm else nn.Identity(),
            nn.ReLU(),
        )
        for name, index in (("depthwise", 0), ("pointwise", 3)):
            plain[index].load_state_dict(getattr(layer, name).state_dict())
        for norm_layer in (*layer.modules(), *plain.modules()):
            if isinstance(norm_layer, nn.BatchNorm2d):
                nn.init.uniform_(norm_layer.weight, 0.5, 2, torch.Generator().manual_seed(1))
                nn.init.uniform_(norm_layer.bias, -1, 1, torch.Generator().manual_seed(2))
        for step in range(4):
            if step == 2:
                layer.eval()
                plain.eval()
            x = random(2, 6, 11, 9, seed=step)
            results = []
            for model in (layer, plain):
                leaf = x.clone().requires_grad_()
                model.zero_grad()
                out = model(leaf)
                out.backward(random(*out.shape, seed=9))
                grads = [p.grad for p in model.parameters()]
                results.append([out.detach(), leaf.grad, *grads])
            for a, b in zip(*results, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("name", ["depthwise", "pointwise"])
    def test_pruned(self, name, norm, training):
        layer = AtrousSeparableConv2d(6, 5, dilation=3, norm=norm).train(training)
        prune.l1_unstructured(getattr(layer, name), "weight", 0.5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        results = []
        for _ in range(3):
            optimizer.zero_grad()
            results.append(layer(random(2, 6, 8, 8)))
            results[-1].square().sum().backward()
            optimizer.step()
        assert not torch.equal(results[0], results[1])
        assert int((getattr(layer, name).weight_mask == 0).sum()) > 0

    @pytest.mark.parametrize("name", ["depthwise", "pointwise"])
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    def test_weight_norm_is_not_stale(self, name):
        layer = AtrousSeparableConv2d(6, 5, dilation=3).eval()
        x = random(1, 6, 8, 8)
        nn.utils.weight_norm(getattr(layer, name))
        before = layer(x)
        with torch.no_grad():
            getattr(layer, name).weight_g.mul_(2)
        assert torch.allclose(layer(x), 2 * before, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", ["depthwise", "depthwise_norm", "pointwise", "pointwise_norm"])
    def test_hooks(self, name, training):
        layer = AtrousSeparableConv2d(6, 5, dilation=3, inner_norm=True, norm=True).train(training)
        x = random(2, 6, 8, 8)
        before, calls = layer(x), []
        own = getattr(layer, name)
        own.register_forward_pre_hook(lambda *_: calls.append("before"))
        own.register_forward_hook(lambda *_: calls.append("after"))
        own.register_full_backward_hook(lambda *_: calls.append("back"))
        out = layer(x.requires_grad_())
        out.sum().backward()
        assert calls == ["before", "after", "back"]
        assert torch.allclose(out, before, atol=1e-5)

    def test_keys_and_repr(self):
        layer = AtrousSeparableConv2d(6, 5, dilation=3, inner_norm=True, norm=True)
        assert [k for k in layer.state_dict() if k.endswith("weight")] == [
            "depthwise.weight",
            "depthwise_norm.weight",
            "pointwise.weight",
            "pointwise_norm.weight",
        ]
        assert "inner_activation=None, activation=None" in repr(layer)
        x = random(1, 6, 8, 8)
        copy = pickle.loads(pickle.dumps(layer.eval()))
        assert torch.equal(copy(x), layer(x))

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"in_channels": 0}, ValueError, "in_channels must be in"),
            ({"out_channels": 1.5}, TypeError, "out_channels must be an integer"),
            ({"bias": 1}, TypeError, "bias must be a bool"),
            ({"norm": None}, TypeError, "norm must be a bool"),
            ({"activation": "gelu"}, ValueError, "activation must be one of None, 'relu'"),
        ],
    )
    def test_bad_arguments(self, change, error, text):
        with pytest.raises(error, match=f"AtrousSeparableConv2d: {text}"):
            AtrousSeparableConv2d(**{"in_channels": 2, "out_channels": 2, **change})
