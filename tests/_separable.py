# SPDX-License-Identifier: Apache-2.0
"""Problems of depthwise-separable atrous convolution, held to torch's: on the CPU and on a GPU."""

from __future__ import annotations

import torch
from _ops import random

from pydense import reference
from pydense.ops import atrous_separable_conv2d

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
# (batch, channels, height, width), outputs, kernel, options: small, more channels than a slab, the
# published rates, rates of the map's size and beyond, one pixel, rows of several tiles, many
# outputs, odd kernels and pairs, without padding, much of it.
CASES = [
    ((2, 5, 9, 11), 3, (3, 3), {"dilation": 2}),
    ((1, 517, 17, 21), 40, (3, 3), {"dilation": 6}),
    ((1, 37, 33, 41), 13, (3, 3), {"dilation": 12}),
    ((2, 21, 7, 12), 64, (3, 3), {"dilation": 7}),
    ((2, 3, 7, 12), 1, (3, 3), {"dilation": 40}),
    ((3, 4, 1, 1), 33, (3, 3), {"dilation": 1}),
    ((1, 2, 3, 1030), 5, (3, 3), {"dilation": (1, 600)}),
    ((1, 1, 40, 19), 2, (5, 2), {"dilation": (3, 4)}),
    ((1, 18, 20, 21), 7, (1, 7), {"dilation": (5, 2), "padding": "valid"}),
    ((2, 6, 5, 6), 130, (2, 3), {"dilation": 2, "padding": (7, 0)}),
    ((1, 70, 6, 5), 6, (1, 1), {"padding": 2}),
    ((1, 3, 9, 2), 4, (300, 1), {"padding": (400, 0)}),
]
# In units in the last place of the largest number; four times as many for gradients of weights,
# sums over all pixels that may cancel. Of float64, torch itself is the reference.
FLOOR = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def problem(shape, outputs, kernel, dtype, form=FORMATS[0], seed=0, device="cpu"):
    x = random(*shape, seed=seed).to(dtype)
    scale = (kernel[0] * kernel[1]) ** -0.5
    depthwise = (scale * random(shape[1], 1, *kernel, seed=seed + 1)).to(dtype)
    pointwise = (shape[1] ** -0.5 * random(outputs, shape[1], 1, 1, seed=seed + 2)).to(dtype)
    biases = [random(n, seed=seed + i).to(dtype) for i, n in ((3, shape[1]), (4, outputs))]
    return [
        x.to(device).contiguous(memory_format=form),
        *(t.to(device) for t in (depthwise, pointwise, *biases)),
    ]


def gradients(function, arguments, options, dtype=None, seed=9):
    """Output and gradients of everything, for a gradient of ``dtype`` in the output's format."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in arguments
    ]
    out = function(*leaves, **options)
    form = FORMATS[0] if out.is_contiguous() else torch.channels_last
    grad = random(*out.shape, seed=seed).to(dtype or out.dtype).to(out.device, out.dtype)
    grads = torch.autograd.grad(out, leaves, grad.contiguous(memory_format=form))
    return [out.detach(), *grads]


def check(shape, outputs, kernel, options, dtype, form, seed=0, device="cpu"):
    """At most twice torch's own error on contiguous tensors, plus the floor."""
    arguments = problem(shape, outputs, kernel, dtype, form, seed, device)
    own = gradients(atrous_separable_conv2d, arguments, options)
    plain = [t.contiguous() for t in arguments]
    theirs = gradients(reference.atrous_separable_conv2d, plain, options)
    wide = [t.double() for t in plain]
    exact = gradients(reference.atrous_separable_conv2d, wide, options, dtype)
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    for i, (a, b, e) in enumerate(zip(own, theirs, exact, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        error, torchs = (float((t.double() - e).abs().max()) for t in (a, b))
        assert error <= 2 * torchs + (4 if i > 1 else 1) * floor * float(e.abs().max())
    if min(shape) > 1 and min(own[0].shape) > 1:
        assert all(t.is_contiguous(memory_format=form) for t in own[:2])
