# SPDX-License-Identifier: Apache-2.0
"""Chained residual pooling in plain torch, from the definitions."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import max_pool2d


def max_pool2d_same(x: Tensor, kernel_size: int = 5) -> Tensor:
    """See :func:`pydense.ops.max_pool2d_same`."""
    return max_pool2d(x, kernel_size, stride=1, padding=kernel_size // 2)
