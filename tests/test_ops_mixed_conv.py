# SPDX-License-Identifier: Apache-2.0
"""Convolutions with torch's gradient of x and pydense's of the weight, and when they are taken."""

from __future__ import annotations

import re

import pytest
import torch
from _ops import random, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

import pydense
from pydense.nn import AtrousConv2d
from pydense.ops import _atrous_dispatch as dispatch
from pydense.ops import atrous_conv2d
from pydense.ops._atrous_dispatch import Call, Kernels, choose, own_weight_gradient

OPS = torch.ops.pydense
FORMATS = [torch.contiguous_format, torch.channels_last]
CALL = Call("cpu", torch.bfloat16, False, 256, 256, 1, (3, 3), (1, 1), (1, 1))


@pytest.fixture
def pairs(monkeypatch):
    """The rule of a CPU that multiplies pairs of bfloat16, for small maps, too."""
    monkeypatch.setattr(OPS, "_cpu_capability", lambda: "avx512_bf16")
    monkeypatch.setattr(dispatch, "LEAST_PRODUCTS_GRADIENT", 0)


def problem(shape, outputs, kernel, dtype, form=FORMATS[0]):
    scale = (shape[1] * kernel[0] * kernel[1]) ** -0.5
    x = random(*shape).to(dtype).contiguous(memory_format=form)
    weight = (scale * random(outputs, shape[1], *kernel, seed=1)).to(dtype)
    return x, weight.contiguous(memory_format=form), random(outputs, seed=2).to(dtype)


def gradients(function, arguments, grad):
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


class TestRule:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({}, "multiplies bfloat16 in pairs"),
            ({"channels_last": True}, "in pairs"),
            ({"channels": 64, "outputs": 64}, "in pairs"),
            ({"channels": 63}, None),
            ({"outputs": 63}, None),
            ({"kernel": (1, 1)}, None),
            ({"kernel": (1, 3)}, None),
            ({"kernel": (5, 5)}, "unwritten"),
            ({"dilation": (2, 2)}, "unwritten"),
            ({"dilation": (2, 2), "channels": 3}, "unwritten"),
            ({"dilation": (20, 20)}, None),  # pydense's dense kernels, with both gradients
            ({"dilation": (20, 20), "channels_last": True}, "unwritten"),
            ({"dtype": torch.float16}, None),
            ({"dtype": torch.float32}, None),
            ({"stride": (2, 2)}, None),
            ({"groups": 2}, None),
            ({"device": "meta"}, None),
            ({"device": "cuda"}, None),
        ],
    )
    def test_gradient(self, change, words, pairs, monkeypatch):
        monkeypatch.setattr(dispatch, "NARROW_WITHOUT_INSTRUCTIONS", frozenset())
        why = own_weight_gradient(CALL._replace(**change))
        assert why is None if words is None else re.search(words, why)

    @pytest.mark.parametrize("capability", ["amx", "avx512", "avx2", "baseline"])
    def test_other_cpus(self, capability, monkeypatch):
        """Tiles multiply many times as fast; others have no pairs."""
        monkeypatch.setattr(OPS, "_cpu_capability", lambda: capability)
        assert own_weight_gradient(CALL) is None
        assert choose(CALL._replace(channels=4096)).kernels is Kernels.TORCH

    def test_many_channels(self, pairs):
        for channels, last, kernels in (
            (2047, False, Kernels.TORCH),
            (2048, False, Kernels.DENSE),
            (4095, True, Kernels.TORCH),
            (4096, True, Kernels.DENSE),
        ):
            call = CALL._replace(channels=channels, channels_last=last)
            assert choose(call).kernels is kernels
            assert own_weight_gradient(call)
            assert choose(call._replace(dtype=torch.float16)).kernels is Kernels.TORCH

    def test_explained(self, pairs):
        x, weight, _ = problem((1, 64, 3, 4), 64, (3, 3), torch.bfloat16)
        said = pydense.explain("atrous_conv2d", x, weight)
        assert said.startswith("torch's convolution: it is not dilated; the gradient of the weight")
        x, weight, _ = problem((1, 2048, 3, 4), 64, (3, 3), torch.bfloat16)
        said = pydense.explain("atrous_conv2d", x, weight)
        assert said.startswith("pydense's dense kernels: it is 3x3, of bfloat16")
        assert said.endswith(
            "of the weight is pydense's (this CPU multiplies bfloat16 in pairs), that of x torch's"
        )


class TestValues:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize(
        ("shape", "outputs", "kernel", "options"),
        [
            ((2, 64, 9, 40), 70, (3, 3), {"padding": 1}),
            ((1, 70, 1, 1), 64, (3, 3), {"padding": 1}),
            ((1, 2050, 5, 7), 64, (3, 3), {"padding": (0, 1)}),
            ((1, 4100, 5, 7), 64, (3, 3), {"padding": 1}),
            ((2, 20, 13, 11), 5, (3, 3), {"dilation": 6}),
            ((2, 20, 33, 33), 5, (3, 3), {"dilation": 2}),  # torch's own, channels_last, is wrong
            ((2, 16, 9, 9), 16, (2, 2), {"dilation": 3}),  # more padding below than above
            ((1, 16, 21, 20), 16, (3, 3), {"dilation": 40}),
            ((3, 8, 9, 12), 4, (5, 5), {}),
            ((0, 64, 5, 5), 64, (3, 3), {}),
        ],
    )
    def test_against_float64(self, shape, outputs, kernel, options, form, pairs):
        arguments = problem(shape, outputs, kernel, torch.bfloat16, form)

        def call(x, weight, bias):
            return atrous_conv2d(x, weight, bias, **options)

        leaf = arguments[1].clone().requires_grad_()
        size = call(arguments[0], leaf, arguments[2]).shape
        grad = random(*size, seed=9).to(torch.bfloat16).contiguous(memory_format=form)
        own = gradients(call, arguments, grad)
        exact = gradients(call, [t.double() for t in arguments], grad)
        for a, e in zip(own, exact, strict=True):
            assert a.dtype == torch.bfloat16
            error = (a.double() - e).abs()
            assert e.numel() == 0 or (error <= 2**-8 * e.abs() + 2**-10 * e.abs().max()).all()

    @settings(max_examples=60)
    @given(
        batch=st.integers(1, 3),
        channels=st.integers(1, 70),
        outputs=st.integers(1, 70),
        size=st.tuples(st.integers(1, 12), st.integers(1, 40)),
        rate=st.integers(1, 9),
        last=st.booleans(),
    )
    def test_operator(self, batch, channels, outputs, size, rate, last):
        form = FORMATS[last]
        arguments = problem((batch, channels, *size), outputs, (3, 3), torch.float32, form)
        grad = random(batch, outputs, *size, seed=5).contiguous(memory_format=form)
        geometry = (*size, *(rate,) * 4, False, False)
        own = gradients(lambda *a: OPS.mixed_conv2d(*a, *geometry), arguments, grad)

        def torchs(*leaves):
            return conv2d(*leaves, padding=rate, dilation=rate)

        theirs = gradients(torchs, [t.contiguous() for t in arguments], grad)
        exact = gradients(torchs, [t.double() for t in arguments], grad)
        for a, b, e in zip(own, theirs, exact, strict=True):
            error, of_torch = (float((t - e).abs().max()) for t in (a, b))
            assert error <= 2 * of_torch + 8 * torch.finfo(torch.float32).eps * e.abs().max()

    @pytest.mark.parametrize("form", FORMATS)
    def test_gradcheck(self, form):
        x, weight, bias = problem((2, 3, 4, 5), 2, (3, 3), torch.float64, form)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]

        def call(*leaves):
            return OPS.mixed_conv2d(*leaves, 4, 5, 2, 2, 2, 2, False, False)

        assert gradcheck(call, leaves)
        assert gradgradcheck(call, leaves)

        def padded(x, weight):  # by more than the kernel reaches
            return OPS.mixed_conv2d(x, weight, None, 8, 9, 1, 1, 3, 3, False, False)

        assert gradcheck(padded, leaves[:2])
        assert gradgradcheck(padded, leaves[:2])

    def test_activation(self, pairs):
        arguments = problem((1, 64, 6, 7), 64, (3, 3), torch.bfloat16)
        grad = random(1, 64, 6, 7, seed=3).to(torch.bfloat16)
        found = [
            gradients(lambda *a: atrous_conv2d(*a, activation="relu"), arguments, grad),
            gradients(lambda *a: atrous_conv2d(*a).relu(), arguments, grad),
        ]
        assert all(map(same_bits, *found))

    @pytest.mark.parametrize("form", FORMATS)
    def test_threads(self, form, pairs):
        x, weight, _ = problem((2, 64, 20, 31), 80, (3, 3), torch.bfloat16, form)
        grad = random(2, 80, 20, 31, seed=3).to(torch.bfloat16)
        found = []
        for count in (1, 2, 4, 4):
            with threads(count):
                found.append(gradients(lambda w: atrous_conv2d(x, w), [weight], grad)[1])
        assert all(same_bits(f, found[0]) for f in found[1:])


class TestTorch:
    def test_opcheck(self):
        for form in FORMATS:
            x, weight, bias = problem((2, 3, 5, 6), 4, (3, 3), torch.float32, form)
            for leaves in ((x, weight, bias), (x, weight, None)):
                leaves = [None if t is None else t.requires_grad_() for t in leaves]
                for relu in (False, True):
                    opcheck(OPS.mixed_conv2d.default, (*leaves, 5, 6, 2, 1, 2, 1, False, relu))
            flipped = random(2, 4, 5, 6, seed=3).contiguous(memory_format=form)
            opcheck(
                OPS.mixed_conv2d.default, (flipped, weight, None, 5, 6, 1, 1, 1, 1, True, False)
            )

    @pytest.mark.parametrize("of_weight", FORMATS)
    @pytest.mark.parametrize("form", FORMATS)
    def test_memory_format(self, form, of_weight, pairs):
        """As torch's convolution has it."""
        x, weight, _ = problem((2, 64, 5, 6), 66, (3, 3), torch.bfloat16, form)
        weight = weight.contiguous(memory_format=of_weight).requires_grad_()
        assert atrous_conv2d(x, weight).stride() == conv2d(x, weight, padding=1).stride()

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler, pairs):
        torch._dynamo.reset()

        def call(x, weight, bias):
            y = atrous_conv2d(x.sin(), weight, bias, activation="relu")
            return atrous_conv2d(y[:, :64], weight, dilation=2)

        function = torch.compile(call, fullgraph=True, backend=compiler)
        for form in FORMATS:
            arguments = problem((2, 64, 7, 9), 65, (3, 3), torch.bfloat16, form)
            grad = random(2, 65, 7, 9, seed=4)
            found = [gradients(run, arguments, grad) for run in (function, call)]
            for a, b in zip(*found, strict=True):
                assert (a - b).abs().max() <= 2**-6 * b.abs().max()

    def test_others_are_torchs(self, pairs):
        """Where no weight is trained, and under transforms."""
        x, weight, bias = problem((2, 64, 5, 6), 64, (3, 3), torch.bfloat16)
        expected = conv2d(x, weight, bias, padding=1)

        def name(out):
            return type(out.grad_fn).__name__

        leaf = weight.clone().requires_grad_()
        assert "mixed_conv2d" in name(atrous_conv2d(x, leaf, bias))
        assert name(atrous_conv2d(x.clone().requires_grad_(), weight)) == "ConvolutionBackward0"
        with torch.no_grad():
            assert same_bits(atrous_conv2d(x, leaf, bias), expected)
        rows = torch.vmap(lambda one: atrous_conv2d(one[None], leaf, bias)[0])(x)
        assert torch.allclose(rows, expected, rtol=2**-7, atol=2**-8)
        made = torch.func.grad(lambda w: atrous_conv2d(x, w).float().sum())(weight)
        assert made.shape == weight.shape

    def test_autocast(self, pairs):
        x, weight, bias = problem((2, 64, 5, 6), 64, (3, 3), torch.float32)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            out = atrous_conv2d(*leaves, padding=1)
            loss = out.float().square().sum()
            found = torch.autograd.grad(loss, leaves)
        assert out.dtype == torch.bfloat16 and "mixed_conv2d" in type(out.grad_fn).__name__
        exact = [t.detach().double().requires_grad_() for t in leaves]
        loss = conv2d(*exact, padding=1).square().sum()
        for a, e in zip(found, torch.autograd.grad(loss, exact), strict=True):
            assert a.dtype == torch.float32
            assert (a - e).abs().max() <= 0.02 * e.abs().max()

    def test_flops(self, pairs):
        arguments = problem((2, 64, 5, 6), 65, (3, 3), torch.bfloat16)
        counts = []
        for function in (atrous_conv2d, lambda *a: conv2d(*a, padding=1)):
            leaves = [t.clone().requires_grad_() for t in arguments]
            with FlopCounterMode(display=False) as counter:
                out = function(*leaves)
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
            counts.append((counter.get_total_flops(), backward.get_total_flops()))
        assert counts[0] == counts[1] and counts[0][0] == 2 * 2 * 5 * 6 * 64 * 65 * 9

    def test_layer(self, pairs):
        layer = AtrousConv2d(64, 64, 3, padding=1).to(torch.bfloat16)
        x = random(1, 64, 5, 6).to(torch.bfloat16)
        assert "mixed_conv2d" in type(layer(x).grad_fn).__name__
        assert "mixed_conv2d" not in type(layer.requires_grad_(False)(x).grad_fn).__name__
