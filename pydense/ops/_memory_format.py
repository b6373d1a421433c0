# SPDX-License-Identifier: Apache-2.0
"""Which memory format a result has, by the strides of the input."""

from __future__ import annotations

import torch
from torch import Tensor


def suggested(x: Tensor) -> torch.memory_format:
    """What torch itself takes for pictures: channels_last where strides say so.

    A cut-out of a channels_last tensor counts as such; what is both, or empty, is contiguous. The
    operators follow the same rule in C++.
    """
    shape, strides = x.shape, x.stride()
    if strides[1] == 0:
        return torch.contiguous_format
    least: int | torch.SymInt = 0
    for axis in (1, 3, 2, 0):
        stride = strides[axis]
        if shape[axis] == 0 or stride < least:
            return torch.contiguous_format
        if axis == 0 and least == strides[1]:  # N x 1 x 1 x 1
            return torch.contiguous_format
        least = stride * (shape[axis] if stride > 1 else 1)
    return torch.channels_last


def in_format(x: Tensor, layout: torch.memory_format) -> Tensor:
    """X, not empty but in N, with the very strides of a new tensor of this format, or a copy."""
    channels, height, width = x.shape[1:]
    if layout == torch.channels_last:
        strides = (channels * height * width, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    return x if x.stride() == strides else x.clone(memory_format=layout)


def empty_picture(
    like: Tensor,
    height: int | torch.SymInt,
    width: int | torch.SymInt,
    dtype: torch.dtype | None = None,
    channels: int | torch.SymInt | None = None,
) -> Tensor:
    """An uninitialised picture with the batch, channels, dtype and memory format of ``like``."""
    return torch.empty(
        (like.shape[0], like.shape[1] if channels is None else channels, height, width),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=suggested(like),
    )
