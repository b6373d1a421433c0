# SPDX-License-Identifier: Apache-2.0
"""The gradient of a dense convolution's weight: what it does not read, and its error.

Values of all shapes are in test_ops_dense_atrous_conv.py.
"""

from __future__ import annotations

import pytest
import torch
from _ops import random, rms_error

import pydense.ops  # registers

OPS = torch.ops.pydense
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
assert pydense.ops


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_beside_no_output(dtype, form):
    """It is finite where its tap reads finite pixels alone, at any rate."""
    for rate, width in ((1, 40), (2, 75), (9, 20)):
        x = random(2, 5, 11, width, seed=3).to(dtype).contiguous(memory_format=form)
        grad = random(2, 3, 11, width, seed=4).to(dtype).contiguous(memory_format=form)
        x[:, :, :, -1] = float("inf")  # the taps on the left do not read it
        x[1, 2, 0] = float("nan")  # nor those below this
        grad[0, 1, :, 0] = float("inf")  # the taps on the left read the padding there
        exact = torch.zeros(3, 5, 3, 3, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                own, read = [], []
                for n, move in ((11, (i - 1) * rate), (width, (j - 1) * rate)):
                    own.append(slice(max(0, -move), n - max(0, move)))
                    read.append(slice(max(0, move), n - max(0, -move)))
                of = grad[:, :, None, own[0], own[1]].double()
                by = x[:, None, :, read[0], read[1]].double()
                exact[:, :, i, j] = (of * by).sum((0, 3, 4))
        assert exact.isfinite().any() and not exact.isfinite().all()
        found = OPS.dense_atrous_conv2d_weight_gradient(grad, x, 3, 3, *(rate,) * 4).double()
        limit = 4 * torch.finfo(dtype).eps * float(exact[exact.isfinite()].abs().max())
        torch.testing.assert_close(found, exact, rtol=0, atol=limit, equal_nan=True)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rate", [1, 20])
def test_error_of_many_pixels(rate, form):
    """Of float32: at most twice that of the better of torch's two formats."""
    x, grad, weight = (
        random(*shape, seed=seed)
        for seed, shape in enumerate([(1, 16, 161, 120), (1, 24, 161, 120), (24, 16, 3, 3)])
    )
    both = [rate, rate]

    def torchs(dtype, form):
        arguments = [t.to(dtype).contiguous(memory_format=form) for t in (grad, x, weight)]
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(
            *arguments, None, [1, 1], both, both, False, [0, 0], 1, mask
        )[1]

    exact = torchs(torch.float64, FORMATS[0])
    best = min(rms_error(torchs(torch.float32, f), exact) for f in FORMATS)
    arguments = [t.contiguous(memory_format=form) for t in (grad, x)]
    own = OPS.dense_atrous_conv2d_weight_gradient(*arguments, 3, 3, *both, *both)
    assert rms_error(own, exact) <= 2 * best
