# SPDX-License-Identifier: Apache-2.0
"""Upsampling: bad arguments and their messages; numbers of other libraries."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from _ops import same_bits

from pydense.ops import bilinear_filler, fuse_sum_upsample, upsample_bilinear, upsample_crop

NAN, INF = float("nan"), float("inf")
X = torch.zeros(1, 2, 3, 4)
CROP = {"stride": 2, "kernel_size": 4, "size": 5}


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: upsample_bilinear(None, 3), TypeError, "x must be a tensor, got None"),
        (lambda: upsample_bilinear(X.int(), 3), TypeError, "x must be of dtype float32, float64"),
        (lambda: upsample_bilinear(X[0], 3), ValueError, "x must have a shape out of (N, C, H, W)"),
        (lambda: upsample_bilinear(X[:, :0], 3), ValueError, "with C >= 1, got (1, 0, 3, 4)"),
        (lambda: upsample_bilinear(X[..., :0], 3), ValueError, "x must have H and W >= 1, got"),
        (lambda: upsample_bilinear(X), ValueError, "one of size and scale_factor must be given"),
        (lambda: upsample_bilinear(X, 3, 2.0), ValueError, "one of size and scale_factor must"),
        (lambda: upsample_bilinear(X, 0), ValueError, "size must be at least 1, got 0"),
        (
            lambda: upsample_bilinear(X, 2**40),
            ValueError,
            "size must be in [1, 2147483583], got (10",
        ),
        (lambda: upsample_bilinear(X, (3,)), ValueError, "size must be a number or (y, x), got"),
        (lambda: upsample_bilinear(X, 2.5), TypeError, "size must hold integers, got 2.5"),
        (lambda: upsample_bilinear(X, True), TypeError, "size must hold integers, got True"),
        (lambda: upsample_bilinear(X, scale_factor=0.0), ValueError, "must be positive and at"),
        (lambda: upsample_bilinear(X, scale_factor=NAN), ValueError, "must be positive and at"),
        (lambda: upsample_bilinear(X, scale_factor=INF), ValueError, "must be positive and at"),
        (lambda: upsample_bilinear(X, scale_factor=1e30), ValueError, "at most 2147483583, got 1e"),
        (lambda: upsample_bilinear(X, scale_factor=1e9), ValueError, "size must be in [1, 21474"),
        (
            lambda: upsample_bilinear(X, scale_factor=0.1),
            ValueError,
            "scale_factor must give a size of at least 1, got 0.1 for shape (1, 2, 3, 4)",
        ),
        (
            lambda: upsample_bilinear(X, 2**31 - 65),
            ValueError,
            "size must give a tensor of less than 2^63 bytes, got (2147483583, 2147483583)",
        ),
        (lambda: upsample_bilinear(X, scale_factor="2"), TypeError, "must hold real numbers"),
        (lambda: upsample_bilinear(X, 3, align_corners=1), TypeError, "must be a bool, got int"),
        (
            lambda: upsample_bilinear(X.to("meta"), 3),
            NotImplementedError,
            "must be on the CPU or a GPU",
        ),
        (lambda: upsample_crop(X, **{**CROP, "kernel_size": 5}), ValueError, "must be 2 * stride"),
        (lambda: upsample_crop(X, **{**CROP, "stride": 0}), ValueError, "stride must be in [1, "),
        (lambda: upsample_crop(X, **{**CROP, "stride": 1.5}), TypeError, "must be an integer"),
        (lambda: upsample_crop(X, **CROP, padding=-1), ValueError, "padding must be in [0, "),
        (lambda: upsample_crop(X, **CROP, offset=INF), ValueError, "offset must be finite, got"),
        (lambda: upsample_crop(X, **CROP, offset=1e13), ValueError, "offset must be within"),
        (lambda: upsample_crop(X, **CROP, offset="1"), TypeError, "offset must hold real numbers"),
        (lambda: upsample_crop(X, **CROP, border="wrap"), ValueError, "'zeros', 'clamp', got"),
        (lambda: fuse_sum_upsample(X), TypeError, "inputs must be a sequence of tensors, got"),
        (lambda: fuse_sum_upsample([]), ValueError, "inputs must be 1 to 16 tensors, got 0"),
        (lambda: fuse_sum_upsample([X] * 17), ValueError, "inputs must be 1 to 16 tensors, got 17"),
        (lambda: fuse_sum_upsample([X, X.half()]), TypeError, "inputs[1] must be of dtype"),
        (lambda: fuse_sum_upsample([X, X[:, :1]]), ValueError, "inputs[1] must have shape (1, 2,"),
        (lambda: fuse_sum_upsample([X], mode="area"), ValueError, "mode must be one of"),
        (lambda: fuse_sum_upsample([X], 3, False, True, "nearest"), ValueError, "must be False"),
        (lambda: bilinear_filler(0, 4), ValueError, "channels must be in [1, "),
        (lambda: bilinear_filler(4, 4, groups=3), ValueError, "groups must divide channels = 4"),
    ],
)
def test_bad_arguments(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_bad_arguments_of_the_operators():
    """What Python cannot pass wrongly, C++ callers can."""
    ops = torch.ops.pydense
    for call, text in (
        (lambda: ops.upsample_bilinear(X, 0, 3, False, 0.0, 0.0), "size must be in"),
        (lambda: ops.upsample_bilinear(X[0], 3, 3, False, 0.0, 0.0), "4 dimensions"),
        (lambda: ops.upsample_bilinear(X.int(), 3, 3, False, 0.0, 0.0), "must be of dtype"),
        (lambda: ops.upsample_bilinear_backward(X, 0, 3, False, 0.0, 0.0), "must be in [1, "),
        (lambda: ops.upsample_crop(X, 3, 3, 0, 1, 0.0, 0.0, "zeros"), "stride must be in"),
        (lambda: ops.upsample_crop(X, 3, 3, 1, 1, NAN, 0.0, "zeros"), "offset must be within"),
        (lambda: ops.upsample_crop(X, 3, 3, 1, 1, 0.0, 0.0, "wrap"), "border must be"),
        (lambda: ops.fuse_sum_upsample([X], 3, 3, "area", False, False), "mode must be"),
        (
            lambda: ops.fuse_sum_upsample_backward(X, None, [3, 3], [4, 4], "nearest", False),
            "at most one gradient",
        ),
        (
            lambda: ops.fuse_sum_upsample_backward(X, X[..., 1:], [1], [1], "nearest", False),
            "out must have the shape of grad, got 3 instead of 4 along axis 3",
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(text)):
            call()


def test_numbers_of_numpy():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    out = upsample_bilinear(x, (np.int64(5), np.int32(7)))
    assert same_bits(out, upsample_bilinear(x, (5, 7)))
    for offset in (np.float32(0.5), np.float64(0.5), np.float16(0.5)):
        assert same_bits(
            upsample_crop(x, offset=offset, **CROP), upsample_crop(x, offset=0.5, **CROP)
        )
    out = upsample_crop(x, offset=np.int64(3), **{**CROP, "size": np.int64(5)})
    assert same_bits(out, upsample_crop(x, offset=3, **CROP))
