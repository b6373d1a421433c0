# SPDX-License-Identifier: Apache-2.0
"""What torch promises of its operators, and corners of values, of the segmentation heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _heads import scores, targets
from torch.autograd import forward_ad
from torch.nn import functional

from pydense.ops import (
    upsample_accumulate,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_softmax,
)
from pydense.reference.segmentation_head import upsample

NAN, INF = math.nan, math.inf


class TestInPlace:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_the_loss_may_change(self, reduction, compiled):
        """Gradient accumulation divides the loss in place; nothing of it is saved."""
        target = targets(2, (9, 13), 5)

        def scaled(x):
            loss = upsample_cross_entropy(x, target, ignore_index=255, reduction=reduction)
            loss /= 4
            return loss.sum()

        def expected(x):
            full = upsample(x, (9, 13))
            return (
                functional.cross_entropy(full, target, ignore_index=255, reduction=reduction) / 4
            ).sum()

        x = scores(2, 5, 4, 6).requires_grad_()
        run = torch.compile(scaled, backend="aot_eager", fullgraph=True) if compiled else scaled
        got = torch.autograd.grad(run(x), x)[0]
        torch.testing.assert_close(got, torch.autograd.grad(expected(x), x)[0])
        loss = upsample_cross_entropy(x, target, ignore_index=255, reduction=reduction)
        loss.div_(4)
        got = torch.autograd.grad(loss.sum(), x)[0]
        torch.testing.assert_close(got, torch.autograd.grad(expected(x), x)[0])

    def test_a_change_of_the_sum_is_seen(self):
        """What was saved for backward before the change is stale: torch must know."""
        dst, factor = torch.ones(1, 2, 4, 4), torch.ones(1, requires_grad=True)
        product = (factor * dst).sum()
        before = dst._version
        upsample_accumulate(dst, torch.ones(1, 2, 2, 2), 0, 0, 4)
        assert dst._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()

    def test_a_change_in_a_compiled_function_is_seen(self):
        dst, factor = torch.ones(1, 2, 4, 4), torch.ones(1, requires_grad=True)
        product = (factor * dst).sum()

        @torch.compile(backend="aot_eager", fullgraph=True)
        def step(total):
            upsample_accumulate(total, torch.ones(1, 2, 2, 2), 0, 0, 4)

        step(dst)
        assert torch.equal(dst, torch.full_like(dst, 2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()

    def test_inference_mode(self):
        with torch.inference_mode():
            dst = torch.ones(1, 2, 4, 4)
            upsample_accumulate(dst, torch.ones(1, 2, 2, 2), 0, 0, 4)
        assert torch.equal(dst, torch.full((1, 2, 4, 4), 2.0))


class TestForwardMode:
    def test_raises(self):
        """Not a tangent of 0."""
        target, dst = torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 2, 4, 4)
        with forward_ad.dual_level():
            x = forward_ad.make_dual(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2))
            for call in (
                lambda: upsample_cross_entropy(x, target),
                lambda: upsample_cross_entropy(x, target, reduction="none"),
                lambda: upsample_softmax(x, 4),
                lambda: upsample_argmax(x, 4),
                lambda: upsample_accumulate(dst, x, 0, 0, 4),
                lambda: upsample_cross_entropy(
                    dst, target, reduction="none", pixel_weight=x.expand(2, 2, 2, 2)[:1, 0, :1]
                ),
            ):
                with pytest.raises(NotImplementedError, match="must have no tangent, got one"):
                    call()
        with pytest.raises(NotImplementedError, match="upsample_softmax: logits must have no tan"):
            torch.func.jvp(lambda x: upsample_softmax(x, 4), (dst,), (dst,))


class TestSoftmaxZeros:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_masked_class(self, dtype, layout):
        """A class at -200 or -inf in float32, -2000 in float64: exactly 0, as in torch."""
        x = scores(2, 5, 6, 7).to(dtype)
        for value in (-2000.0 if dtype == torch.float64 else -200.0, -INF):
            x[:, 3] = value
            # align_corners False and an even scale: no tap has the weight 0.
            out = upsample_softmax(x.to(memory_format=layout), (12, 14))
            expected = upsample(x.double(), (12, 14)).softmax(1)
            inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
            assert not out[inner][:, 3].any()
            torch.testing.assert_close(
                out[inner].double(), expected[inner], rtol=0, atol=1e-2 if x.itemsize == 2 else 1e-6
            )

    def test_small_ones_stay(self):
        """Neighbours of different classes: sums of powers are small, probabilities are not."""
        x = torch.full((1, 3, 2, 12), -40.0)
        x[:, 0, :, ::2] = 40.0
        x[:, 1, :, 1::2] = 40.0
        x[:, 2] = -50.0
        out = upsample_softmax(x, (5, 97)).double()
        expected = upsample(x.double(), (5, 97)).softmax(1)
        assert expected.min() < 1e-20
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-30)


class TestCounts:
    @pytest.mark.parametrize("bad", [[0], [1], [2], [1, 2]])
    def test_nan_is_the_largest(self, backend, bad):
        """As in torch.argmax: the first NaN."""
        logits = scores(1, 3, 4, 5).float().to(backend.device)
        logits[0, bad, 2, 3] = NAN
        labels = upsample(logits, (16, 20)).argmax(1)
        for k in range(3):
            target = torch.full((1, 16, 20), k, device=backend.device)
            out = upsample_cross_entropy(logits, target, reduction="none", return_counts=True)
            assert out.correct == (labels == k).sum()


class TestArguments:
    def test_pixel_weight_of_ignored_pixels(self, backend):
        x = scores(1, 3, 4, 4).to(backend.device).requires_grad_()
        target = torch.zeros(1, 8, 8, dtype=torch.long, device=backend.device)
        target[0, 3, 3] = 255
        factor = torch.ones(1, 8, 8, dtype=torch.float64, device=backend.device)
        factor[0, 3, 3] = NAN
        options = {"ignore_index": 255, "pixel_weight": factor}
        each = upsample_cross_entropy(x, target, reduction="none", **options)
        total = upsample_cross_entropy(x, target, reduction="sum", **options)
        assert each[0, 3, 3] == 0
        torch.testing.assert_close(each.sum(), total)
        gradients = [torch.autograd.grad(loss, x)[0] for loss in (each.sum(), total)]
        torch.testing.assert_close(*gradients)

    def test_labels_beyond_int64(self):
        x, target = scores(1, 3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.uint64)
        numbers = np.zeros((1, 8, 8), dtype=np.uint64)
        numbers[0, 1, 2] = 2**64 - 100  # -100 where it wraps
        assert not upsample_cross_entropy(x, target).isnan()
        with pytest.raises(ValueError, match=r"target must be in .* or ignore_index -100, got"):
            upsample_cross_entropy(x, torch.from_numpy(numbers))

    def test_sizes(self):
        x = torch.zeros(1, 2, 2, 2)
        for size in ((2**31, 1), (1, 2**31), (2**40, 2**40)):
            for call in (
                upsample_softmax,
                upsample_argmax,
                lambda x, s: upsample_argmax(x, s, dtype=torch.uint8),
            ):
                with pytest.raises(ValueError, match=r"^upsample_\w+: size must be from 1 to 2147"):
                    call(x, size)
        with pytest.raises(ValueError, match=r"^upsample_softmax: size must leave arrays below 2"):
            upsample_softmax(x, (2**31 - 65, 2**31 - 65))
        with pytest.raises(TypeError, match=r"size must be an integer or .* got True"):
            upsample_softmax(x, True)

    def test_accumulate(self):
        x = torch.ones(1, 2, 2, 2)
        dst = torch.zeros(1, 2, 4, 4)
        out = upsample_accumulate(dst, x, np.int64(0), np.int32(0), 4, weight=np.float32(2))
        assert (out == 2).all()
        overlapping = torch.zeros(64).as_strided((1, 2, 4, 4), (16, 4, 1, 1))
        rows = torch.zeros(64).as_strided((1, 2, 4, 4), (16, 14, 4, 1))
        for bad in (overlapping, rows):
            with pytest.raises(ValueError, match="dst must not share memory between its elements"):
                upsample_accumulate(bad, x, 0, 0, 4)
            assert not bad.any()
        both = torch.ones(1, 2, 4, 4)
        with pytest.raises(ValueError, match="dst must not share memory with logits"):
            upsample_accumulate(both, both[:, :, :2, :2], 0, 0, 4)
        with pytest.raises(ValueError, match="dst must not share memory with weight"):
            upsample_accumulate(both, x, 0, 0, 4, weight=both[0, 1])
        assert (both == 1).all()
        halves = torch.ones(2, 2, 4, 4)
        upsample_accumulate(halves[:1], halves[1:, :, :2, :2], 0, 0, 4)
        assert (halves[0] == 2).all() and (halves[1] == 1).all()
        with pytest.raises(TypeError, match="x0 must be an integer, got bool"):
            upsample_accumulate(dst, x, 0, False, 4)
