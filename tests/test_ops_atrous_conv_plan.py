# SPDX-License-Identifier: Apache-2.0
"""Calls of atrous convolutions: who runs small ones, and that known ones are not checked again."""

from __future__ import annotations

import pytest
import torch
from _ops import random, same_bits
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pydense import explain, reference
from pydense.nn import AtrousConv2d
from pydense.ops import _atrous_dispatch as dispatch
from pydense.ops import _atrous_plan as plans
from pydense.ops import atrous_conv, atrous_conv2d

OPS = torch.ops.pydense
SHAPES = ((2, 3, 4, 5), (2, 3, 3, 3), (2,))
LARGE = ((1, 128, 33, 33), (128, 128, 3, 3))


def of(dtype, *shapes):
    return [random(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]


class TestSizes:
    """What is too small is torch's, and ``explain`` says what runs."""

    @pytest.mark.parametrize(
        ("size", "rate", "kernels", "made_by"),
        [
            (33, 1, "pydense's Winograd kernels", "winograd_atrous_conv2d_Backward"),
            (9, 1, "torch's convolution: it is not dilated, and the map is too small", "Conv"),
            (9, 6, "torch's convolution: it has rate 6 and 128 channels", "mixed_conv2d_Backward"),
            (9, 12, "pydense's dense kernels", "dense_atrous_conv2d_Backward"),
        ],
    )
    def test_winograd(self, size, rate, kernels, made_by):
        x, weight = of(torch.float32, (1, 128, size, size), LARGE[1])
        said = explain("atrous_conv2d", x, weight, dilation=rate)
        assert said.startswith(kernels)
        assert ("too small for Winograd" in said) == (size == 9)
        assert ("of the weight is pydense's (torch's reads all taps)" in said) == (rate == 6)
        out = atrous_conv2d(x, weight.requires_grad_(), dilation=rate)
        assert type(out.grad_fn).__name__.startswith(made_by)
        with FlopCounterMode(display=False):  # who looks at it changes nothing
            assert made_by[:4] in type(atrous_conv2d(x, weight, dilation=rate).grad_fn).__name__

    def test_products(self, monkeypatch):
        monkeypatch.setattr(OPS, "_cpu_capability", lambda: "avx512_bf16")
        weight = torch.zeros(64, 64, 3, 3, dtype=torch.bfloat16)
        monkeypatch.setattr(dispatch, "LEAST_PRODUCTS_GRADIENT", 20 * 64 * 64 * 9)
        for height, own in ((4, True), (3, False)):
            x = torch.zeros(1, 64, height, 5, dtype=torch.bfloat16)
            assert ("in pairs" in explain("atrous_conv2d", x, weight)) == own
        x = torch.zeros(1, 64, 4, 4, dtype=torch.bfloat16)
        monkeypatch.setattr(dispatch, "LEAST_PRODUCTS_GRADIENT", 182 * 182 * 64 * 64 * 9)
        assert "in pairs" in explain("atrous_conv2d", x, weight, padding=90)

    def test_autocast(self):
        x, weight = of(torch.float32, *LARGE)
        with torch.autocast("cpu", torch.bfloat16):
            assert explain("atrous_conv2d", x, weight).startswith("torch's convolution")


class TestKnownCalls:
    @pytest.fixture
    def planned(self, monkeypatch):
        """The calls that were looked at."""
        made = []

        def plan_of(*arguments):
            made.append(arguments)
            return plans.plan_of(*arguments)

        monkeypatch.setattr(atrous_conv, "plan_of", plan_of)
        return made

    def test_once(self, planned):
        for seed in (1, 2, 3):
            x, weight, bias = (t + seed for t in of(torch.float32, *SHAPES))
            out = atrous_conv2d(x, weight, bias, dilation=2)
            expected = torch.nn.functional.conv2d(x, weight, bias, padding=2, dilation=2)
            assert torch.equal(out, expected)
        assert len(planned) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda a: a.update(x=a["x"][:, :, :3]),
            lambda a: a.update(x=a["x"][:1]),
            lambda a: a.update(x=a["x"].contiguous(memory_format=torch.channels_last)),
            lambda a: a.update(weight=a["weight"][:1], bias=a["bias"][:1]),
            lambda a: a.update(weight=a["weight"][..., :1]),
            lambda a: a.update(bias=None),
            lambda a: a.update(x=a["x"].double(), weight=a["weight"].double(), bias=None),
            lambda a: a.update(dilation=2),
            lambda a: a.update(padding=(1, 1)),
            lambda a: a.update(stride=2, padding=1),
            lambda a: a.update(activation="relu"),
            lambda a: a.update(winograd_tile=None),
        ],
    )
    def test_others_are_looked_at(self, planned, change):
        names = ("x", "weight", "bias")
        call = dict(zip(names, of(torch.float32, *SHAPES), strict=True))
        atrous_conv2d(**call)
        change(call)
        out = atrous_conv2d(**call)
        assert len(planned) == 2
        call.pop("winograd_tile", None)
        assert torch.allclose(out, reference.atrous_conv2d(**call), atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"dilation": 1.0}, TypeError),
            ({"dilation": (1.0, 1)}, TypeError),
            ({"stride": (1, 1.0)}, TypeError),
            ({"padding": 1.0}, TypeError),
            ({"groups": 1.0}, TypeError),
            ({"winograd_tile": 2.0}, TypeError),
            ({"x": None}, TypeError),
            ({"weight": None}, TypeError),
            ({"bias": 0.0}, TypeError),
            ({"weight": torch.zeros(2, 4, 3, 3)}, ValueError),
            ({"weight": torch.zeros(2, 3, 3, 3).double()}, TypeError),
            ({"weight": torch.zeros(2, 3, 3, 3, device="meta")}, ValueError),
        ],
    )
    def test_bad_ones_stay_bad(self, change, error):
        names = ("x", "weight", "bias")
        call = dict(zip(names, of(torch.float32, *SHAPES), strict=True))
        call |= {"stride": (1, 1), "padding": 1, "dilation": 1, "groups": 1, "winograd_tile": 2}
        for _ in range(2):
            atrous_conv2d(**call)
            with pytest.raises(error, match="atrous_conv2d: "):
                atrous_conv2d(**call | change)

    def test_lists(self, planned):
        x, weight = of(torch.float32, *SHAPES[:2])
        for _ in range(2):
            atrous_conv2d(x, weight, dilation=[2, 1])
        assert len(planned) == 2

    def test_autocast(self, planned):
        x, weight = of(torch.float32, *SHAPES[:2])
        assert atrous_conv2d(x, weight).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert atrous_conv2d(x, weight).dtype == torch.bfloat16
        assert atrous_conv2d(x, weight).dtype == torch.float32
        assert len(planned) == 2

    def test_tangents_are_refused(self):
        x, weight = of(torch.float32, *SHAPES[:2])
        atrous_conv2d(x, weight)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="x must have no tangent"):
                atrous_conv2d(dual, weight)

    def test_training_and_inference(self):
        """The same plan serves both."""
        layer = AtrousConv2d(128, 128, 3, padding=12, dilation=12)
        x = random(1, 128, 40, 40)
        with torch.no_grad():
            alone = layer(x)
        out = layer(x)
        assert out.requires_grad and same_bits(out.detach(), alone)
        out.sum().backward()
        assert layer.weight.grad is not None
        layer.requires_grad_(False)
        assert not layer(x).requires_grad

    def test_not_more_than_so_many(self, planned, monkeypatch):
        monkeypatch.setattr(plans, "_MOST_KNOWN", 3)
        x, weight = of(torch.float32, (1, 3, 4, 5), (2, 3, 3, 3))
        for rate in (1, 2, 3, 4, 4, 1):  # the fourth forgets the first three
            atrous_conv2d(x, weight, dilation=rate)
        assert len(planned) == 5
