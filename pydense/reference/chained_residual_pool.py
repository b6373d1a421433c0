# SPDX-License-Identifier: Apache-2.0
"""Chained residual pooling in plain torch, from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d


def max_pool2d_same(x: Tensor, kernel_size: int = 5) -> Tensor:
    """See :func:`pydense.ops.max_pool2d_same`."""
    return max_pool2d(x, kernel_size, stride=1, padding=kernel_size // 2)


def chained_residual_pool(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    variant: str = "pool_conv",
    pool_size: int = 5,
) -> Tensor:
    """See :func:`pydense.ops.chained_residual_pool`."""
    top, total = x, x
    for i, weight in enumerate(weights):
        bias = None if biases is None else biases[i]
        padding = weight.shape[2] // 2
        if variant == "pool_conv":
            top = conv2d(max_pool2d_same(top, pool_size), weight, bias, padding=padding)
        else:
            top = max_pool2d_same(conv2d(top, weight, bias, padding=padding), pool_size)
        total = total + top
    return total
