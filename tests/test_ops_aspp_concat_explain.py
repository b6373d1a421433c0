# SPDX-License-Identifier: Apache-2.0
"""What pydense.explain says of aspp_concat, and whether that is what runs."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random
from torch._subclasses.fake_tensor import FakeTensorMode

import pydense
from pydense.ops import _aspp_concat_autograd as operators
from pydense.ops import _atrous_dispatch as dispatch
from pydense.ops import aspp_concat

module = sys.modules[aspp_concat.__module__]
FORMATS = [torch.contiguous_format, torch.channels_last]
KERNELS, RATES = (1, 3, 3, 3), (1, 2, 12, 18)
OWN, TORCHS = "pydense's dense kernels: ", "torch's convolution: "


def problem(dtype, form=FORMATS[0], channels=128, outputs=64, kernels=KERNELS, device="cpu"):
    """x and weights."""
    like = {"dtype": dtype, "device": device}
    x = torch.empty(1, channels, 9, 9, memory_format=form, **like).fill_(1)
    return x, [torch.ones(outputs, channels, k, k, **like) for k in kernels]


def lines_of(x, weights, rates=RATES, **options):
    return pydense.explain("aspp_concat", x, weights, rates, **options).split("\n")


def whose(lines):
    """By branches that are convolved in every pixel, whether they are pydense's."""
    found = [re.fullmatch(r"branch \d+ \((\d)x\1(, rate \d+)?\): (.*)", line) for line in lines]
    words = [match[3] for match in found if match]
    assert all(word.startswith((OWN, TORCHS)) for word in words)
    return [word.startswith(OWN) for word in words]


class TestOnTheCpu:
    def test_words(self):
        x, weights = problem(torch.float32)
        first, second, third, _, pooled = lines_of(x, weights, pool_weight=weights[0])
        assert first == "branch 0 (1x1): torch's convolution: it is not dilated"
        assert second.startswith("branch 1 (3x3, rate 2): torch's convolution: it has rate 2 and")
        assert third.startswith("branch 2 (3x3, rate 12): pydense's dense kernels: it has rate 12")
        assert pooled.startswith("branch 4 (pooled): torch's mean of all pixels and torch's conv")
        assert len(lines_of(x, weights)) == 4

    @pytest.mark.parametrize(
        ("dtype", "form", "instructions", "expected"),
        [
            (torch.float32, FORMATS[0], True, [False, False, True, True]),
            (torch.float64, FORMATS[0], True, [False, False, True, True]),
            (torch.float32, FORMATS[1], True, [False] * 4),
            (torch.bfloat16, FORMATS[0], True, [False, False, False, True]),
            (torch.bfloat16, FORMATS[1], True, [False] * 4),
            (torch.bfloat16, FORMATS[0], False, [False, True, True, True]),
            (torch.bfloat16, FORMATS[1], False, [False, True, True, True]),
        ],
    )
    def test_what_runs(self, dtype, form, instructions, expected, monkeypatch):
        """As many convolutions of torch's, forward and backward, as it says."""
        narrow = frozenset() if instructions else frozenset({dtype})
        monkeypatch.setattr(dispatch, "NARROW_WITHOUT_INSTRUCTIONS", narrow)
        x, weights = problem(dtype, form)
        lines = lines_of(x, weights)
        assert whose(lines) == expected
        leaves = [t.requires_grad_() for t in (x, *weights)]
        with torch.profiler.profile() as profile:
            out = aspp_concat(x, weights, RATES)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        names = [event.name for event in profile.events()]
        others = [line.endswith("; the gradient of its weight is pydense's") for line in lines]
        bfloat16 = dtype == torch.bfloat16
        assert others == [
            bfloat16 and rate > 1 and not own for own, rate in zip(expected, RATES, strict=True)
        ]
        assert names.count("aten::conv2d") == expected.count(False)
        assert names.count("aten::convolution_backward") == expected.count(False)
        gradients = "pydense::dense_atrous_conv2d_weight_gradient"
        assert names.count(gradients) == expected.count(True) + others.count(True)

    def test_autocast(self):
        x, weights = problem(torch.float32)
        assert whose(lines_of(x, weights)) == [False, False, True, True]
        with torch.autocast("cpu", torch.bfloat16):
            assert "bfloat16" in lines_of(x, weights)[1]

    def test_one_channel(self):
        """To atrous_conv2d that is depthwise."""
        x, weights = problem(torch.float32, channels=1, outputs=1)
        assert whose(lines_of(x, weights)) == [False] * 4
        assert "it is depthwise, and branches have dense" in lines_of(x, weights)[2]
        with torch.profiler.profile() as profile:
            aspp_concat(x, weights, RATES)
        assert [event.name for event in profile.events()].count("aten::conv2d") == 4

    def test_packed_weights_are_read_where_branches_are_own(self):
        """A cache is asked for those that explain names, and no others."""
        x, weights = problem(torch.float32)
        asked = []

        class Cache:
            def get(self, weight, dtype):
                asked.append(next(i for i, w in enumerate(weights) if w is weight))

        module.concat(x, weights, RATES, None, None, None, None, [Cache()] * 4)
        assert asked == [i for i, own in enumerate(whose(lines_of(x, weights))) if own]

    def test_bad_arguments(self):
        x, weights = problem(torch.float32)
        with pytest.raises(ValueError, match="aspp_concat: rates must be 4 as the weights, got 1"):
            lines_of(x, weights, (1,))
        with pytest.raises(ValueError, match="aspp_concat: biases must be 4 as the branches"):
            lines_of(x, weights, biases=[random(64)])


class TestOnCuda:
    """Tensors without memory stand for those of a GPU."""

    @pytest.fixture(autouse=True)
    def fake(self):
        with FakeTensorMode():
            yield

    def said(self, dtype=torch.bfloat16, rates=RATES, kernels=KERNELS, **options):
        x, weights = problem(dtype, kernels=kernels, device="cuda", **options)
        lines = lines_of(x, weights, rates, pool_weight=weights[0])
        assert operators.are_own(x, weights, rates) == whose(lines[:-1])
        assert lines[-1].startswith("branch 4 (pooled): torch's mean")
        return lines[:-1]

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_one_fills_all(self, dtype, form):
        """The others go with it, forward; their gradients are torch's."""
        first, second, third, fourth = lines = self.said(dtype, form=form)
        assert whose(lines) == [True] * 4
        for line, rate in ((first, 1), (second, 2)):
            assert "kernels: branch 2 is pydense's, and the others fill its launch" in line
            assert f"(alone it would be torch's: it has rate {rate}: " in line
            assert line.endswith("; the gradients of x and its weight are torch's")
        for line in (third, fourth):
            assert "kernels: it is on CUDA, of" in line and "gradient" not in line

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"rates": (1, 2, 3, 5)}, "gain from rate 6 on"),
            ({"dtype": torch.float64}, "it is of float64"),
            ({"outputs": 21}, "128 channels and 21 outputs"),
        ],
    )
    def test_none(self, options, why):
        lines = self.said(**options)
        assert whose(lines) == [False] * 4
        assert why in lines[2] and not any("launch" in line for line in lines)

    @pytest.mark.parametrize("allowed", [True, False])
    def test_tf32(self, allowed, monkeypatch):
        monkeypatch.setattr(dispatch, "tf32_is_allowed", lambda: allowed)
        lines = self.said(torch.float32)
        assert whose(lines) == [allowed] * 4
        assert ("of TF32 with rate 12" if allowed else "does not allow TF32") in lines[2]
