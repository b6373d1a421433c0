# SPDX-License-Identifier: Apache-2.0
"""What the tests of chained residual pooling share: shapes, problems, their gradients."""

from __future__ import annotations

import torch
from _ops import random

OPS = torch.ops.pydense
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
VARIANTS = ["pool_conv", "conv_pool"]
# (batch, channels, height, width): small and odd, more rows of weights than a panel, several tiles,
# one pixel, panels of pixels that begin inside of rows.
SHAPES = [(2, 5, 9, 11), (1, 30, 33, 70), (1, 3, 40, 300), (3, 13, 1, 1), (1, 70, 20, 37)]


# Under the shim, and on a GPU: with vectors and without.
FEW_SHAPES = [(2, 5, 9, 11), (1, 32, 8, 20), (3, 13, 1, 1)]


def shapes_of(backend):
    return FEW_SHAPES if backend.is_cuda_code else SHAPES


def problem(shape, stages, kernel, dtype, form, bias, seed=0, device="cpu"):
    """Inputs whose maxima do not tie, so that float64 and narrower types choose the same."""
    c = shape[1]
    x = random(*shape, seed=seed).to(device, dtype).contiguous(memory_format=form)
    scale = (c * kernel * kernel) ** -0.5
    weights = [
        (scale * random(c, c, kernel, kernel, seed=seed + 1 + i)).to(device, dtype)
        for i in range(stages)
    ]
    biases = [random(c, seed=seed + 50 + i).to(device, dtype) for i in range(stages)]
    return x, weights, biases if bias else None


def leaves(x, weights, biases):
    x, *rest = (
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, *weights, *(biases or []))
    )
    n = len(weights)
    return x, rest[:n], rest[n:] or None


def gradients(function, arguments, grad, **options):
    x, weights, biases = leaves(*arguments)
    out = function(x, weights, biases, **options)
    return [out.detach(), *torch.autograd.grad(out, [x, *weights, *(biases or [])], grad)]


def wide(arguments):
    x, weights, biases = arguments
    return (
        x.double(),
        [w.double() for w in weights],
        biases and [b.double() for b in biases],
    )
