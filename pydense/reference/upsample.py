# SPDX-License-Identifier: Apache-2.0
"""Upsampling in plain torch, written from the definitions.

Every axis is a matrix: W[y, i] = max(0, 1 - |s(y) - i|) with s the source coordinate, and the
picture is multiplied by one from each side. No table of taps, no floor: nothing here can be wrong
in the way a kernel can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor


def upsample_bilinear(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
) -> Tensor:
    """See :func:`pydense.ops.upsample_bilinear`."""
    scales = _two(scale_factor)
    if size is None:
        sizes = [math.floor(n * s) for n, s in zip(x.shape[2:], scales, strict=True)]
    else:
        sizes = list(_two(size))
    matrices = [
        _interpolation(n, out, align_corners, scale, x)
        for n, out, scale in zip(x.shape[2:], sizes, scales, strict=True)
    ]
    return _apply(matrices, x)


def upsample_crop(
    x: Tensor,
    *,
    stride: int | Sequence[int],
    kernel_size: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    offset: float | Fraction | Sequence[float | Fraction] = 0,
    size: int | Sequence[int],
    border: str = "zeros",
) -> Tensor:
    """See :func:`pydense.ops.upsample_crop`."""
    matrices = []
    options = (_two(stride), _two(kernel_size), _two(padding), _two(offset), _two(size))
    for n, s, k, p, o, out in zip(x.shape[2:], *options, strict=True):
        shift = float(Fraction(o) + Fraction(p) - Fraction(k - 1) / 2)
        source = (torch.arange(out, dtype=torch.float64, device=x.device) + shift) / s
        if border == "clamp":
            source = source.clamp(0, n - 1)
        matrices.append(_tent(source, n, x))
    return _apply(matrices, x)


def fuse_sum_upsample(
    inputs: Sequence[Tensor],
    size: int | Sequence[int] | None = None,
    relu: bool = False,
    align_corners: bool = False,
    mode: str = "bilinear",
) -> Tensor:
    """See :func:`pydense.ops.fuse_sum_upsample`."""
    wanted = tuple(inputs[0].shape[2:]) if size is None else tuple(_two(size))
    total: Tensor | None = None
    for x in inputs:
        if tuple(x.shape[2:]) == wanted:
            term = x
        elif mode == "nearest":
            rows, columns = (
                (torch.arange(out, device=x.device) * n).div(out, rounding_mode="floor")
                for n, out in zip(x.shape[2:], wanted, strict=True)
            )
            term = x[:, :, rows][..., columns]
        else:
            term = upsample_bilinear(x, wanted, align_corners=align_corners)
        total = term if total is None else total + term
    assert total is not None
    return total.relu() if relu else total


def _interpolation(n: int, out: int, align_corners: bool, scale: float | None, x: Tensor) -> Tensor:
    y = torch.arange(out, dtype=torch.float64, device=x.device)
    if align_corners:
        last: Any = torch.sym_max(out - 1, 1)  # type: ignore[no-untyped-call]
        source = y * (n - 1) / last
    else:
        step = n / out if scale is None else 1 / scale
        source = (y + 0.5) * step - 0.5
    return _tent(source.clamp(0, n - 1), n, x)


def _tent(source: Tensor, n: int, x: Tensor) -> Tensor:
    distance = (source[:, None] - torch.arange(n, device=x.device)).abs()
    return (1 - distance).clamp(min=0).to(x.dtype)


def _apply(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    return torch.einsum("yi,ncij,xj->ncyx", matrices[0], x, matrices[1])


def _two(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value, value)
