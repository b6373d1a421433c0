# SPDX-License-Identifier: Apache-2.0
"""Upsampled argmax against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from _heads import SHAPES, assert_in_budget, scores
from _ops import layouts, one_number
from _ops import one_thread as one_thread
from torch.nn import functional

from pydense import reference
from pydense.ops import upsample_argmax
from pydense.reference.segmentation_head import upsample

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Rounding of coordinates and of exp, where torch happens to be exact.
FLOOR = {torch.float64: 1e-13}


def assert_torchs_labels(labels, logits, size, align_corners):
    """Equal to torch's wherever float64 decides by more than the rounding of float32."""
    exact = upsample(logits.double(), size, align_corners)
    if exact.shape[1] == 1:
        assert not labels.any()
        return
    first, second = exact.topk(2, 1).values.unbind(1)
    decided = first - second > 2e-6 * (1 + logits.abs().max())
    assert decided.float().mean() > 0.9
    assert torch.equal(labels.long()[decided], exact.argmax(1)[decided])


class TestArgmax:
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_labels(self, backend, dtype, align_corners):
        for shape, size in SHAPES:
            logits = scores(*shape).to(backend.device, dtype)
            labels = upsample_argmax(logits, size, align_corners)
            assert labels.dtype == torch.int64 and labels.is_contiguous()
            assert_torchs_labels(labels, logits, size, align_corners)
            for kind in (torch.int32, torch.uint8):
                other = upsample_argmax(logits, size, align_corners, dtype=kind)
                assert other.dtype == kind and torch.equal(other.long(), labels)

    def test_smooth_maps(self, backend):
        """Large areas of one label: most cells are decided by their corners."""
        logits = functional.interpolate(scores(2, 21, 4, 5), (40, 50), mode="bicubic")
        logits = logits.to(backend.device)
        for size in [(320, 400), (163, 77), (40, 50)]:
            for align_corners in (False, True):
                labels = upsample_argmax(logits.float(), size, align_corners)
                assert_torchs_labels(labels, logits.float(), size, align_corners)

    def test_corners_and_classes_give_the_same(self, backend):
        """The skip changes no label: with the confidence every pixel is computed."""
        logits = functional.interpolate(scores(1, 9, 5, 6), (30, 31), mode="bicubic").float()
        logits = logits.to(backend.device)
        labels, _ = upsample_argmax(logits, (203, 199), return_confidence=True)
        assert torch.equal(labels, upsample_argmax(logits, (203, 199)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_confidence(self, backend, dtype):
        for shape, size in SHAPES:
            logits = scores(*shape).to(backend.device, dtype)
            labels, sure = upsample_argmax(logits, size, return_confidence=True)
            assert torch.equal(labels, upsample_argmax(logits, size))
            assert sure.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            exact = upsample(logits.double(), size).softmax(1).amax(1)
            wide = logits.to(sure.dtype)
            assert_in_budget(
                sure,
                exact,
                lambda w=wide, s=size: upsample(w, s).softmax(1).amax(1),
                FLOOR.get(dtype, 1e-6),
                shape,
            )

    def test_ties_go_to_the_first(self, backend):
        for classes in (2, 17, 40):
            logits = torch.full((1, classes, 3, 4), -2.5, device=backend.device)
            logits[:, classes // 2 :] = 1.25
            for confidence in (False, True):
                out = upsample_argmax(logits, (13, 11), return_confidence=confidence)
                labels = out[0] if confidence else out
                assert (labels == classes // 2).all()

    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("bad", [[NAN], [INF], [-INF], [INF, NAN], [NAN, NAN], [INF, -INF]])
    def test_not_finite(self, backend, bad, align_corners):
        """torch's labels, 0 * inf included. The third image is finite."""
        logits = scores(3, 5, 6, 7, seed=3).float()
        for k, value in enumerate(bad):
            logits[0, 1 + 2 * k, 2, 3] = value
            logits[1, k, 5 - k, 6] = value
        logits[1, :, 0, 0] = -INF
        logits = logits.to(backend.device)
        for size in [(6, 7), (12, 14), (23, 40), (11, 13), (3, 20)]:
            expected = reference.upsample_argmax(logits, size, align_corners)
            for layout in (torch.contiguous_format, torch.channels_last):
                x = logits.to(memory_format=layout)
                assert torch.equal(upsample_argmax(x, size, align_corners), expected), size

    def test_layouts(self, backend):
        logits = scores(2, 21, 9, 11).float().to(backend.device)
        expected = upsample_argmax(logits, (37, 50))
        for name, x in layouts(logits):
            assert torch.equal(upsample_argmax(x, (37, 50)), expected), name
        constant = one_number((2, 21, 9, 11)).to(backend.device)
        assert not upsample_argmax(constant, (37, 50)).any()
        reverse = logits.flip(0, 1, 2, 3)
        assert torch.equal(
            upsample_argmax(reverse, (37, 50)), upsample_argmax(reverse.clone(), (37, 50))
        )

    def test_sizes(self, backend):
        empty = torch.zeros(0, 3, 4, 5, device=backend.device)
        assert upsample_argmax(empty, (8, 9)).shape == (0, 8, 9)
        logits = torch.zeros(1, 256, 1, 1, device=backend.device)
        assert upsample_argmax(logits, 4, dtype=torch.uint8).shape == (1, 4, 4)
        logits[0, 255] = 1
        assert (upsample_argmax(logits, 4, dtype=torch.uint8) == 255).all()

    def test_errors(self):
        logits = torch.zeros(1, 3, 4, 5)
        cases = [
            (dict(logits=None), TypeError, "logits must be a tensor, got None"),
            (dict(logits=logits.long()), TypeError, "logits must be of dtype float32"),
            (dict(logits=logits[0]), ValueError, "logits must have a shape out of (N, C, H, W)"),
            (dict(logits=logits[:, :0]), ValueError, "with C >= 1, got (1, 0, 4, 5)"),
            (dict(logits=logits[..., :0]), ValueError, "logits must have at least one pixel"),
            (dict(size=(0, 4)), ValueError, "size must be positive, got (0, 4)"),
            (dict(size=(1, 2, 3)), ValueError, "size must be an integer or (height, width)"),
            (dict(size=2.5), TypeError, "size must be an integer or (height, width), got 2.5"),
            (dict(align_corners=1), TypeError, "align_corners must be a bool, got int"),
            (dict(dtype=torch.int16), ValueError, "dtype must be torch.int64, torch.int32 or"),
            (
                dict(logits=torch.zeros(1, 257, 1, 1), dtype=torch.uint8),
                ValueError,
                "dtype must hold 257 classes, got torch.uint8",
            ),
            (dict(logits=logits.to("meta")), NotImplementedError, "logits must be on the CPU"),
        ]
        for change, error, text in cases:
            options = {"logits": logits, "size": (8, 9), **change}
            with pytest.raises(error) as caught:
                upsample_argmax(**options)
            assert f"upsample_argmax: {text}" in str(caught.value) or text in str(caught.value)
        with pytest.raises(ValueError, match="dtype must hold 300 classes, got uint8"):
            torch.ops.pydense.upsample_argmax(
                torch.zeros(1, 300, 1, 1), 2, 2, False, "uint8", False
            )
