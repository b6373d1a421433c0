# SPDX-License-Identifier: Apache-2.0
"""Max pooling with stride 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments

_library.load()

from . import _pool_autograd as _pool_autograd  # noqa: E402  registers

MIN_POOL, MAX_POOL = 3, 13


def pool_size(op: str, name: str, value: Any) -> int:
    """An odd integer in [3, 13]."""
    size = check.integer(op, name, value, MIN_POOL, MAX_POOL)
    if size % 2 == 0:
        raise ValueError(f"{op}: {name} must be odd, got {size}")
    return size


def max_pool2d_same(x: Tensor, kernel_size: int = 5) -> Tensor:
    r"""Max pooling with stride 1 that keeps the size.

    ``F.max_pool2d(x, kernel_size, stride=1, padding=kernel_size // 2)``, to the letter: of equal
    maxima the first one in row-major order gets the gradient, -0 and 0 being equal; a NaN in the
    window makes the result NaN, and the last one gets the gradient; in a window of -inf alone it is
    the first element.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides; N may be 0.
        kernel_size: Odd, 3 to 13.

    Returns:
        (N, C, H, W) of the dtype of ``x`` (under autocast too), channels_last where torch takes
        ``x`` as such, contiguous otherwise. Bitwise the same on every CPU and for any number of
        threads. Backward gathers, without atomics, in one order; 16-bit gradients are summed in
        float32 and rounded once.

    Raises:
        ValueError: A shape or size out of range.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are not on the CPU; a tangent: there is no forward-mode
            derivative (``torch.func.jvp``).

    Memory: the result, some rows per thread, and a contiguous copy of a tensor whose pixels do not
    lie side by side. Saved for backward where ``x`` requires a gradient: one byte for each element,
    the row and column of its maximum in the window; neither ``x`` nor int64 indices. (A program
    that was exported without gradients saves ``x`` instead, and looks for the maxima again.) Second
    derivatives go through ``torch.gather`` and its int64 indices.

    Source: ATen's ``max_pool2d_with_indices``.

    Example:
        >>> import torch
        >>> from pydense.ops import max_pool2d_same
        >>> max_pool2d_same(torch.tensor([[[[0.0, 4.0, 1.0, 2.0]]]]), 3)
        tensor([[[[4., 4., 4., 2.]]]])
    """
    op = "max_pool2d_same"
    arguments.picture(op, "x", x)
    size = pool_size(op, "kernel_size", kernel_size)
    result: Tensor
    if x.requires_grad and torch.is_grad_enabled():
        result, _ = torch.ops.pydense.max_pool2d_same_with_offsets(x, size)
    else:
        result = torch.ops.pydense.max_pool2d_same(x, size)
    return result
