# SPDX-License-Identifier: Apache-2.0
"""The rule that chooses the kernels of an atrous convolution, and calls that it gives pydense's."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random, same_bits
from torch.export import Dim, export

import pydense
from pydense import reference
from pydense.nn import AtrousConv2d
from pydense.ops import _atrous_dispatch as dispatch
from pydense.ops import atrous_conv2d
from pydense.ops._atrous_dispatch import Call, Kernels, choose

CALL = Call("cpu", torch.float32, False, 256, 256, 1, (3, 3), (1, 1), (12, 12))
DEPTHWISE, DENSE, TORCH = Kernels.DEPTHWISE, Kernels.DENSE, Kernels.TORCH


class TestRule:
    @pytest.mark.parametrize(
        ("change", "kernels", "words"),
        [
            ({}, DENSE, "rate 12, 256 channels and stride 1, x is contiguous and on the CPU"),
            ({"dtype": torch.float64}, DENSE, "rate 12"),
            ({"outputs": 3}, DENSE, "rate 12"),
            ({"kernel": (1, 2)}, DENSE, "rate 12"),
            ({"dilation": (1, 8)}, DENSE, "rate 8"),
            ({"dilation": (7, 7)}, TORCH, "rate 7 and 256 channels: .* from rate 8 and 128"),
            ({"dilation": (12, 1), "kernel": (1, 3)}, TORCH, "it is not dilated"),
            ({"kernel": (1, 1)}, TORCH, "it is not dilated"),
            ({"channels": 127}, TORCH, "rate 12 and 127 channels"),
            ({"channels": 128}, DENSE, "rate 12"),
            ({"channels_last": True}, TORCH, "x is channels_last"),
            ({"stride": (1, 2)}, TORCH, r"its stride is \(1, 2\)"),
            ({"groups": 2}, TORCH, "it is grouped .groups 2, 256 channels to 256"),
            ({"groups": 256}, DEPTHWISE, "it is depthwise"),
            ({"groups": 256, "channels_last": True, "dilation": (1, 1)}, DEPTHWISE, "depthwise"),
            ({"groups": 256, "outputs": 512}, TORCH, "it is grouped"),
            ({"groups": 256, "stride": (2, 2)}, TORCH, "its stride"),
            ({"device": "meta"}, TORCH, "x is on meta"),
            ({"device": "cuda", "groups": 256}, DEPTHWISE, "3x3 and of stride 1, on cuda"),
            (
                {"device": "cuda", "groups": 256, "channels_last": True, "dilation": (1, 1)},
                DEPTHWISE,
                "3x3 and of stride 1, on cuda",
            ),
            ({"device": "cuda", "groups": 256, "kernel": (5, 5)}, DEPTHWISE, "dilated and of"),
            (
                {"device": "cuda", "groups": 256, "kernel": (5, 5), "dilation": (1, 1)},
                TORCH,
                "not 3x3 and not dilated, on cuda",
            ),
            ({"device": "cuda", "groups": 256, "stride": (2, 2)}, TORCH, "its stride"),
        ],
    )
    def test_rule(self, change, kernels, words):
        choice = choose(CALL._replace(**change))
        assert choice.kernels is kernels and re.search(words, choice.reason)

    @pytest.mark.parametrize(
        ("change", "kernels", "words"),
        [
            ({}, DENSE, "on CUDA, of bfloat16 with rate 12, 256 channels, 256 outputs and stride"),
            ({"channels_last": True}, DENSE, "on CUDA"),
            ({"dtype": torch.float16, "dilation": (1, 6)}, DENSE, "of float16 with rate 6"),
            ({"dtype": torch.float32}, DENSE, "of TF32 with rate 12"),
            ({"dtype": torch.float64}, TORCH, "of float64; pydense's kernels for CUDA are for"),
            ({"channels": 64, "outputs": 64, "kernel": (7, 1)}, DENSE, "64 channels, 64 outputs"),
            ({"channels": 63}, TORCH, "63 channels and 256 outputs: .* for 64 and 64 at least"),
            ({"outputs": 21}, TORCH, "256 channels and 21 outputs"),
            ({"dilation": (5, 5)}, TORCH, "rate 5: .* gain from rate 6 on"),
            ({"dilation": (12, 12), "kernel": (1, 1)}, TORCH, "rate 1:"),
            ({"kernel": (9, 3)}, TORCH, r"its kernel is \(9, 3\)"),
            ({"stride": (2, 2)}, TORCH, r"its stride is \(2, 2\)"),
            ({"groups": 2}, TORCH, "it is grouped"),
        ],
    )
    def test_rule_on_cuda(self, change, kernels, words):
        call = CALL._replace(device="cuda", dtype=torch.bfloat16)
        choice = choose(call._replace(**change))
        assert choice.kernels is kernels and re.search(words, choice.reason)

    def test_tf32_where_torch_allows_it(self):
        call = CALL._replace(device="cuda")
        allowed = torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cudnn.allow_tf32 = False
            choice = choose(call)
            assert choice.kernels is TORCH and "does not allow TF32" in choice.reason
            torch.backends.cudnn.allow_tf32 = True
            assert choose(call).kernels is DENSE
        finally:
            torch.backends.cudnn.allow_tf32 = allowed

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_numbers(self, dtype, monkeypatch):
        """Without instructions for them every dilated one is pydense's, of both formats."""
        small = CALL._replace(dtype=dtype, channels=3, dilation=(1, 2))
        monkeypatch.setattr(dispatch, "NARROW_WITHOUT_INSTRUCTIONS", frozenset({dtype}))
        for last in (False, True):
            choice = choose(small._replace(channels_last=last))
            assert choice.kernels is DENSE and "has no instructions" in choice.reason
        assert choose(small._replace(dilation=(1, 1))).kernels is TORCH
        assert choose(small._replace(dtype=torch.float32)).kernels is TORCH
        monkeypatch.setattr(dispatch, "NARROW_WITHOUT_INSTRUCTIONS", frozenset())
        assert choose(small).kernels is TORCH
        for channels, rate, kernels in (
            (256, 16, DENSE),
            (256, 15, TORCH),
            (768, 12, DENSE),
            (768, 11, TORCH),
            (767, 12, TORCH),
            (127, 16, TORCH),
        ):
            call = CALL._replace(dtype=dtype, channels=channels, dilation=(rate, rate))
            assert choose(call).kernels is kernels
            assert choose(call._replace(channels_last=True)).kernels is TORCH

    def test_what_torch_multiplies(self):
        assert dispatch.torch_multiplies(torch.float32) and dispatch.torch_multiplies(torch.float64)
        for dtype in (torch.bfloat16, torch.float16):
            narrow = dtype in dispatch.NARROW_WITHOUT_INSTRUCTIONS
            assert narrow is not dispatch.torch_multiplies(dtype)


def problem(dtype=torch.float32, channels=128):
    x = random(2, channels, 11, 13).to(dtype)
    weight = random(5, channels, 3, 3, seed=1).to(dtype) / (9 * channels) ** 0.5
    return x, weight, random(5, seed=2).to(dtype)


class TestCalls:
    @pytest.mark.parametrize("padding", ["same", "valid", (9, 3)])
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_dense(self, padding, activation):
        x, weight, bias = problem()
        options = {"dilation": (8, 3), "padding": padding, "activation": activation}
        if padding == "valid":
            options["dilation"] = (1, 9)
            weight = weight[:, :, :, :2]
        said = pydense.explain("atrous_conv2d", x, weight, bias, **options)
        assert said.startswith("pydense's dense kernels")
        own = atrous_conv2d(x, weight, bias, **options)
        theirs = reference.atrous_conv2d(x, weight, bias, **options)
        assert own.shape == theirs.shape and (own - theirs).abs().max() < 1e-5

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler):
        torch._dynamo.reset()

        def call(x, weight, bias):
            return atrous_conv2d(x.sin(), weight, bias, dilation=8, activation="relu")

        function = torch.compile(call, fullgraph=True, backend=compiler)
        arguments = [t.requires_grad_() for t in problem()]
        assert pydense.explain("atrous_conv2d", *arguments, dilation=8).startswith("pydense's de")
        found = []
        for run in (function, call):
            out = run(*arguments)
            found.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())

    def test_export(self):
        layer = AtrousConv2d(128, 4, 3, padding="same", dilation=8).eval()
        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        program = export(layer, (random(2, 128, 8, 9),), dynamic_shapes=shapes)
        assert "dense_atrous_conv2d" in str(program.graph)
        for size in ((2, 128, 8, 9), (3, 128, 2, 40), (1, 128, 21, 5)):
            x = random(*size)
            assert torch.allclose(program.module()(x), layer(x), atol=1e-5)

    def test_autocast(self):
        x, weight, bias = (t.requires_grad_() for t in problem())
        with torch.autocast("cpu", torch.bfloat16):
            out = atrous_conv2d(x, weight, bias, dilation=16)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.sum(), (x, weight, bias))
        assert all(grad.dtype == torch.float32 for grad in grads)


class TestPackedWeight:
    def layer(self):
        torch.manual_seed(0)
        return AtrousConv2d(128, 5, 3, padding=16, dilation=16).eval()

    def packed(self, layer):
        cache = layer.__dict__.get("_packed")
        return None if cache is None or cache._kept is None else cache._kept[1]

    def test_once_until_the_weight_changes(self):
        layer, x = self.layer(), random(1, 128, 9, 10)
        with torch.no_grad():
            first = layer(x)
            kept = self.packed(layer)
            assert kept is not None
            assert same_bits(layer(x), first) and self.packed(layer) is kept
            layer.weight.mul_(2)
            doubled = layer(x)
            assert self.packed(layer) is not kept
            expected = (first - layer.bias[:, None, None]) * 2 + layer.bias[:, None, None]
            assert (doubled - expected).abs().max() < 1e-5
            layer.weight = torch.nn.Parameter(layer.weight / 2)
            assert same_bits(layer(x), first)
            state = {key: value.clone() for key, value in layer.state_dict().items()}
            assert sorted(state) == ["bias", "weight"]
            layer.load_state_dict({key: 0 * value for key, value in state.items()})
            assert not layer(x).any()

    @pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
    @pytest.mark.parametrize("fused", [True, False])
    def test_seen_after_an_optimizer(self, name, fused):
        """Fused ones do not raise the weight's version."""
        layer, x = self.layer(), random(1, 128, 9, 10)
        optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.1, fused=fused)
        layer(x).square().sum().backward()
        with torch.no_grad():
            before = layer(x)
            assert self.packed(layer) is not None
        optimizer.step()
        with torch.no_grad():
            after = layer(x)
            assert same_bits(after, copy.deepcopy(layer)(x)) and not torch.equal(after, before)

    @pytest.mark.parametrize("fused", [True, False])
    def test_seen_after_a_compiled_optimizer(self, fused):
        torch._dynamo.reset()
        layer, x = self.layer(), random(1, 128, 9, 10)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
        step = torch.compile(optimizer.step, backend="aot_eager")
        layer(x).square().sum().backward()
        for _ in range(3):
            with torch.no_grad():
                before = layer(x)
            step()
            with torch.no_grad():
                after = layer(x)
                assert same_bits(after, copy.deepcopy(layer)(x)) and not torch.equal(after, before)

    def test_dropped_by_a_call_with_gradients(self):
        """As what follows may write the weight in a way of its own."""
        layer, x = self.layer(), random(1, 128, 9, 10)
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
        assert self.packed(layer) is None
        layer.weight.data.mul_(2)
        with torch.no_grad():
            assert same_bits(layer(x), copy.deepcopy(layer)(x))

    def test_threads_of_several_dtypes(self):
        layer, x = self.layer(), random(1, 128, 9, 10)

        def call(narrow):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                return layer(x)

        expected = [call(False), call(True)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(call, [False, True] * 1000))
        finally:
            sys.setswitchinterval(interval)
        assert all(same_bits(out, expected[i % 2]) for i, out in enumerate(found))

    def test_autocast(self):
        layer, x = self.layer(), random(1, 128, 9, 10)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            first = layer(x)
            kept = self.packed(layer)
            assert kept is not None and first.dtype == torch.bfloat16
            assert same_bits(layer(x), first) and self.packed(layer) is kept
        with torch.no_grad():
            assert layer(x).dtype == torch.float32 and self.packed(layer) is not kept

    def test_forgotten(self):
        for change in (
            lambda layer: layer.train(),
            lambda layer: layer.eval(),
            lambda layer: layer.double(),
            copy.deepcopy,
            lambda layer: pickle.loads(pickle.dumps(layer)),
        ):
            layer, x = self.layer(), random(1, 128, 9, 10)
            with torch.no_grad():
                expected = layer(x)
                assert self.packed(layer) is not None
                other = change(layer)
                assert self.packed(other) is None
                out = other(x.to(other.weight.dtype))
                assert (out - expected).abs().max() < 1e-5

    def test_not_kept(self):
        layer, x = self.layer(), random(1, 128, 9, 10)
        layer(x).sum().backward()
        assert layer.weight.grad is not None and self.packed(layer) is None
        with torch.no_grad():
            layer.train()(x)
            assert self.packed(layer) is None
            layer.eval()
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
            assert self.packed(layer) is None
        with torch.inference_mode():
            own = self.layer()
            assert own(x).shape == (1, 5, 9, 10) and self.packed(own) is None
