# SPDX-License-Identifier: Apache-2.0
"""Winograd's algorithm behind ``atrous_conv2d``: when it is taken, and what users see of it."""

from __future__ import annotations

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random, same_bits, threads
from torch.export import Dim, export
from torch.nn.functional import conv2d

import pydense
from pydense.nn import AtrousConv2d
from pydense.ops import atrous_conv2d
from pydense.ops._atrous_dispatch import Call, Kernels, choose_winograd
from pydense.ops._winograd import ERROR, TILES, best_tile

CALL = Call("cpu", torch.float32, True, 128, 128, 1, (3, 3), (1, 1), (2, 2))
SAME = (2, 2)
RATE = 2


def problem(channels: int = 128, size: int = 33):
    x = random(1, channels, size, size)
    weight = random(128, channels, 3, 3, seed=1) * (9 * channels) ** -0.5
    return x, weight, random(128, seed=2)


def error(result, exact):
    return float((result.double() - exact).square().mean().sqrt())


class TestRule:
    def test_taken(self):
        for tile in TILES:
            choice = choose_winograd(CALL, SAME, SAME, tile)
            assert choice and choice.kernels is Kernels.WINOGRAD
            assert f"F({tile}x{tile}, 3x3)" in choice.reason

    @pytest.mark.parametrize(
        "change",
        [
            {"device": "cuda"},
            {"dtype": torch.float64},
            {"dtype": torch.bfloat16},
            {"channels": 127},
            {"outputs": 127},
            {"groups": 2},
            {"kernel": (3, 1)},
            {"kernel": (5, 5)},
            {"stride": (1, 2)},
            {"dilation": (2, 3)},
        ],
    )
    def test_not_taken(self, change):
        assert choose_winograd(CALL._replace(**change), SAME, SAME, 2) is None

    def test_other_padding(self):
        assert choose_winograd(CALL, (1, 2), SAME, 2) is None
        assert choose_winograd(CALL, SAME, (2, 3), 2) is None
        assert choose_winograd(CALL, SAME, SAME, None) is None
        plain = CALL._replace(dilation=(1, 1))
        assert choose_winograd(plain, (0, 0), (0, 0), 2) is None
        assert choose_winograd(plain, (1, 1), (1, 1), 2) is not None

    def test_explained(self):
        x, weight, _ = problem()
        said = pydense.explain("atrous_conv2d", x, weight, dilation=RATE)
        assert said.startswith("pydense's Winograd kernels: Winograd F(2x2, 3x3) on 4 phase grids")
        said = pydense.explain("atrous_conv2d", x, weight, dilation=RATE, winograd_tile=None)
        assert said.startswith("torch's convolution")

    @pytest.mark.parametrize(("tile", "kind"), [(1, ValueError), (5, ValueError), ("2", TypeError)])
    def test_bad_tile(self, tile, kind):
        x, weight, _ = problem()
        with pytest.raises(kind, match="atrous_conv2d: winograd_tile must be"):
            atrous_conv2d(x, weight, dilation=RATE, winograd_tile=tile)


class TestValues:
    @pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(("tile", "rate"), [*((t, RATE) for t in TILES), (2, 1)])
    def test_error(self, form, tile, rate):
        """Within what is documented, of the result and of the picture's gradient."""
        x, weight, bias = problem()
        x = x.contiguous(memory_format=form)
        x.requires_grad_()
        assert best_tile(1, 33, 33, rate, tile) is not None
        out = atrous_conv2d(x, weight, bias, dilation=rate, winograd_tile=tile)
        assert out.is_contiguous(memory_format=form)
        grad = random(*out.shape, seed=3).contiguous(memory_format=form)
        (of_x,) = torch.autograd.grad(out, x, grad)

        def direct(dtype):
            own = x.detach().to(dtype).requires_grad_()
            made = conv2d(own, weight.to(dtype), bias.to(dtype), padding=rate, dilation=rate)
            return made.detach(), torch.autograd.grad(made, own, grad.to(dtype))[0]

        exact = direct(torch.float64)
        for ours, theirs, truth in zip((out, of_x), direct(torch.float32), exact, strict=True):
            assert 0 < error(ours, truth) <= ERROR[tile] * error(theirs, truth) + 1e-8

    def test_all_gradients(self):
        x, weight, bias = (t.requires_grad_() for t in problem())
        out = atrous_conv2d(x, weight, bias, dilation=RATE, activation="relu")
        grad = random(*out.shape, seed=3)
        ours = torch.autograd.grad(out, (x, weight, bias), grad)
        wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        made = conv2d(*wide, padding=RATE, dilation=RATE)
        # Where both are certain of the sign.
        grad = grad.double() * (out > 0)
        exact = torch.autograd.grad(made, wide, grad)
        for own, truth in zip(ours, exact, strict=True):
            assert (own - truth).abs().max() <= 1e-4 * max(1.0, float(truth.abs().max()))

    @pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("rate", [RATE, 12])
    def test_backward_inside_autocast(self, rate, form):
        """On small maps torch's convolution is called there, which autocast would cast."""
        found = []
        for narrow in (False, True):
            x, weight, bias = (
                t.contiguous(memory_format=form) if t.dim() == 4 else t for t in problem()
            )
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            loss = atrous_conv2d(*leaves, dilation=rate).square().sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss.backward()
            found.append([t.grad for t in leaves])
        assert all(map(torch.equal, *found))

    def test_small_maps_are_not_copied(self):
        """What torch's convolution makes is the result, where it lies as that has to."""
        x, weight, bias = problem()
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.profiler.profile(record_shapes=True) as profile:
            out = atrous_conv2d(x, weight, bias, dilation=12)
        assert out.is_contiguous(memory_format=torch.channels_last)
        calls = [(event.name, (event.input_shapes or [[]])[0]) for event in profile.events()]
        assert ("aten::conv2d", [*x.shape]) in calls and ("aten::copy_", [*out.shape]) not in calls

    def test_small_maps_run_what_the_rule_says_else(self):
        """At rate 12 and 33x33 two of three taps of a tile are padding."""
        x, weight, bias = problem()
        assert best_tile(1, 33, 33, 12, 2) is None
        out = atrous_conv2d(x, weight, bias, dilation=12)
        assert same_bits(out, atrous_conv2d(x, weight, bias, dilation=12, winograd_tile=None))
        last = x.contiguous(memory_format=torch.channels_last)
        out = atrous_conv2d(last, weight, bias, dilation=12, activation="relu")
        torch.testing.assert_close(
            out, conv2d(last, weight, bias, padding=12, dilation=12).relu_(), rtol=0, atol=0
        )

    def test_threads(self):
        x, weight, bias = (t.requires_grad_() for t in problem())

        def run():
            out = atrous_conv2d(x, weight, bias, dilation=RATE)
            return out, *torch.autograd.grad(out, (x, weight), out.detach())

        one = run()
        for count in (2, 4):
            with threads(count):
                assert all(same_bits(a, b) for a, b in zip(one, run(), strict=True))


class TestTorch:
    def test_layer(self):
        layer = AtrousConv2d(128, 128, 3, padding=RATE, dilation=RATE).eval()
        x, _, _ = problem()
        expected = atrous_conv2d(x, layer.weight, layer.bias, dilation=RATE)
        assert same_bits(layer(x), expected)
        layer.winograd_tile = 4
        assert not same_bits(layer(x), expected)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler):
        torch._dynamo.reset()
        x, weight, bias = problem()
        weight.requires_grad_()

        def call(x, weight):
            return atrous_conv2d(x, weight, bias, dilation=RATE)

        compiled = torch.compile(call, backend=compiler, fullgraph=True)
        out, expected = compiled(x, weight), call(x, weight)
        assert same_bits(out, expected)
        grads = [torch.autograd.grad(made.sum(), weight)[0] for made in (out, expected)]
        assert same_bits(*grads)

    def test_export(self):
        class Net(torch.nn.Module):
            def forward(self, x, weight):
                return atrous_conv2d(x, weight, dilation=RATE)

        x, weight, _ = problem()
        sizes = {2: Dim("height", min=2), 3: Dim("width", min=2)}
        program = export(Net(), (x, weight), dynamic_shapes=(sizes, None)).module()
        for size in (33, 20):
            other = random(1, 128, size, size + 1, seed=5)
            assert same_bits(program(other, weight), Net()(other, weight))
