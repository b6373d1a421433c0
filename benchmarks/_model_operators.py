# SPDX-License-Identifier: Apache-2.0
"""Torch's operators under the names of pydense's: what a model's twin calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv_transpose2d, cross_entropy, interpolate, pad


def torch_operators() -> SimpleNamespace:
    """Functions with the arguments of ``pydense.ops``, over the operators that users call."""
    from pydense import reference

    def upsample_bilinear(
        x: Tensor,
        size: Sequence[int] | None = None,
        scale_factor: float | None = None,
        align_corners: bool = False,
    ) -> Tensor:
        return interpolate(x, size, scale_factor, mode="bilinear", align_corners=align_corners)

    def upsample_crop(
        x: Tensor,
        *,
        stride: int | tuple[int, int],
        kernel_size: int | tuple[int, int],
        padding: int = 0,
        offset: int = 0,
        size: tuple[int, int],
        border: str = "zeros",
    ) -> Tensor:
        from pydense.ops import bilinear_filler

        step = stride if isinstance(stride, int) else stride[0]
        kernel = kernel_size if isinstance(kernel_size, int) else kernel_size[0]
        if step > 1:
            channels = x.shape[1]
            weight = bilinear_filler(channels, kernel, groups=channels, dtype=x.dtype)
            x = conv_transpose2d(x, weight, stride=step, groups=channels)
        rows, columns = (max(0, offset + n - m) for n, m in zip(size, x.shape[2:], strict=True))
        if rows or columns:
            x = pad(x, (0, columns, 0, rows))
        return x[:, :, offset : offset + size[0], offset : offset + size[1]]

    def fuse_sum_upsample(
        inputs: Sequence[Tensor],
        size: Sequence[int] | None = None,
        relu: bool = False,
        align_corners: bool = False,
        mode: str = "bilinear",
    ) -> Tensor:
        wanted = tuple(inputs[0].shape[2:] if size is None else size)
        corners = {"align_corners": align_corners} if mode == "bilinear" else {}
        total: Any = 0
        for x in inputs:
            same = tuple(x.shape[2:]) == wanted
            row = x if same else interpolate(x, wanted, mode=mode, **corners)
            total = row if isinstance(total, int) else total + row
        return torch.relu(total) if relu else total

    def upsample_argmax(
        logits: Tensor, size: Sequence[int], align_corners: bool = False, **_: Any
    ) -> Tensor:
        return upsample_bilinear(logits, size, align_corners=align_corners).argmax(1)

    def upsample_cross_entropy(
        logits: Tensor,
        target: Tensor,
        size: None = None,
        align_corners: bool = False,
        **options: Any,
    ) -> Tensor:
        wanted = tuple(target.shape[1:])
        scores = logits
        if tuple(logits.shape[2:]) != wanted:
            scores = upsample_bilinear(logits, wanted, align_corners=align_corners)
        return cross_entropy(scores, target, **options)

    own = {name: getattr(reference, name) for name in reference.__all__}
    return SimpleNamespace(
        **{
            **own,
            "upsample_bilinear": upsample_bilinear,
            "upsample_crop": upsample_crop,
            "fuse_sum_upsample": fuse_sum_upsample,
            "upsample_argmax": upsample_argmax,
            "upsample_cross_entropy": upsample_cross_entropy,
        }
    )
