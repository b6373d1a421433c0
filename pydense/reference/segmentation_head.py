# SPDX-License-Identifier: Apache-2.0
"""Segmentation heads in plain torch: interpolate, then argmax, softmax or cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def upsample(logits: Tensor, size: int | Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear upsampling to (H, W)."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    result: Tensor = functional.interpolate(
        logits, pair, mode="bilinear", align_corners=align_corners
    )
    return result


def upsample_argmax(
    logits: Tensor,
    size: int | Sequence[int],
    align_corners: bool = False,
    *,
    dtype: torch.dtype = torch.int64,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ``pydense.ops.upsample_argmax``."""
    scores = upsample(logits, size, align_corners)
    labels = scores.argmax(1)
    if not return_confidence:
        return labels.to(dtype)
    return labels.to(dtype), scores.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def upsample_softmax(
    logits: Tensor, size: int | Sequence[int], align_corners: bool = False
) -> Tensor:
    """See ``pydense.ops.upsample_softmax``."""
    return upsample(logits, size, align_corners).softmax(1)


def upsample_accumulate(
    dst: Tensor,
    logits: Tensor,
    y0: int,
    x0: int,
    size: int | Sequence[int],
    align_corners: bool = False,
    *,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """See ``pydense.ops.upsample_accumulate``."""
    window = upsample(logits, size, align_corners)
    height, width = window.shape[2:]
    dst[:, :, y0 : y0 + height, x0 : x0 + width] += window * weight
    return dst


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    align_corners: bool = False,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    pixel_weight: Tensor | None = None,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """See ``pydense.ops.upsample_cross_entropy``."""
    scores = upsample(logits, tuple(target.shape[1:]) if size is None else size, align_corners)
    target = target.long()
    valid = target != ignore_index
    loss = functional.cross_entropy(
        scores,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    factor = loss.new_ones(()) if pixel_weight is None else pixel_weight
    loss = loss * factor
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean_all":
        loss = loss.mean()
    elif reduction == "mean":
        labels = target.where(valid, 0)
        weights = loss.new_ones(target.shape) if weight is None else weight[labels]
        loss = loss.sum() / (weights * valid * factor).sum()
    if not return_counts:
        return loss
    correct = (scores.argmax(1) == target) & valid
    return loss, correct.sum(), valid.sum()


def ohem_weight(
    scores: Tensor,
    target: Tensor,
    *,
    definition: str,
    threshold: float | None,
    min_kept: int,
    ignore_index: int,
    weight: Tensor | None = None,
) -> Tensor:
    """Which pixels online hard example mining keeps: (N, H, W), 1 or 0.

    Args:
        scores: (N, C, H, W) logits of full resolution.
        target: (N, H, W) labels.
        definition: "hrnet": ``OhemCrossEntropy`` of HRNet-Semantic-Segmentation; "mmseg":
            ``OHEMPixelSampler`` of mmsegmentation.
        threshold: Probability below which a pixel is hard; None, for "mmseg" alone, keeps the
            pixels of the largest losses.
        min_kept: Pixels to keep at least, of the batch ("hrnet") or of each image ("mmseg").
        ignore_index: Label of pixels that are never kept.
        weight: (C,) class weights of the losses that are compared where ``threshold`` is None.
    """
    target = target.long()
    valid = target != ignore_index
    kept = scores.new_zeros(target.shape)
    count = min_kept * target.shape[0] if definition == "mmseg" else max(1, min_kept)
    if threshold is None:
        loss = functional.cross_entropy(
            scores, target, weight=weight, ignore_index=ignore_index, reduction="none"
        )
        chosen = kept[valid]
        chosen[loss[valid].sort(descending=True).indices[:count]] = 1
        kept[valid] = chosen
        return kept
    labels = target.where(valid, 0).unsqueeze(1)
    probability = scores.softmax(1).gather(1, labels).squeeze(1)
    ordered = probability[valid].sort().values
    if ordered.numel() > 0:
        limit = max(float(ordered[min(count, ordered.numel() - 1)]), threshold)
        kept[valid & (probability < limit)] = 1
    return kept
