# SPDX-License-Identifier: Apache-2.0
"""Functions of torch that have no 16-bit form on the CPU; there they compute in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def local_response_norm(x: Tensor) -> Tensor:
    """AlexNet's: x / (1 + 1e-4 / 5 * sum of squares of five neighbouring channels)^0.75.

    Args:
        x: (N, C, H, W).
    """
    made = functional.local_response_norm(_wide(x), 5, alpha=1e-4, beta=0.75, k=1.0)
    return made.to(x.dtype)


def bicubic(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic upsampling as MATLAB's.

    With antialias torch's kernel is MATLAB's (a = -1/2); of a map that grows it filters nothing.

    Args:
        x: (N, C, H, W).
        size: Rows and columns of the result.
    """
    return functional.interpolate(_wide(x), size, mode="bicubic", antialias=True).to(x.dtype)
