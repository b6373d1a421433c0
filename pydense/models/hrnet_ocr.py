# SPDX-License-Identifier: Apache-2.0
"""HRNet with object-contextual representations (OCR).

Source: Y. Yuan, X. Chen, J. Wang, *Object-Contextual Representations for Semantic Segmentation*,
ECCV 2020 (code: HRNet-Semantic-Segmentation, branch HRNet-OCR; parameters have its names).
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pydense.nn.atrous_conv import convolution

from ._base import SegmentationModel
from ._hrnet import HRNetHead, HRNetTrunk, HRNetWidth, start_small
from ._registry import register_model


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


def _transform(*channels: int) -> nn.Sequential:
    """1x1 convolutions without bias, each with batch normalisation and ReLU."""
    rows: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        rows += [nn.Conv2d(inputs, outputs, 1, bias=False), _norm_relu(outputs)]
    return nn.Sequential(*rows)


class ObjectAttention(nn.Module):
    r"""Attention of pixels to the regions of the classes.

    .. math:: f_{up}\Bigl(\mathrm{softmax}_k\bigl(q(x)^\top k(p) / \sqrt{d}\bigr)\, v(p)\Bigr)

    Args:
        channels: Of pixels and regions.
        key_channels: Of queries, keys and values, d.

    Shape:
        - x: (N, channels, H, W).
        - regions: (N, channels, K, 1).
        - output: as x.
    """

    def __init__(self, channels: int, key_channels: int) -> None:
        super().__init__()
        self.key_channels = key_channels
        self.f_pixel = _transform(channels, key_channels, key_channels)
        self.f_object = _transform(channels, key_channels, key_channels)
        self.f_down = _transform(channels, key_channels)
        self.f_up = _transform(key_channels, channels)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        """The context of each pixel."""
        query = self.f_pixel(x).flatten(2).transpose(1, 2)
        key = self.f_object(regions).flatten(2)
        value = self.f_down(regions).flatten(2).transpose(1, 2)
        weights = (query @ key * self.key_channels**-0.5).softmax(-1)
        # Channels last; beside contiguous pixels it becomes contiguous.
        context = (weights @ value).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        out: Tensor = self.f_up(context)
        return out


class _Distribute(nn.Module):
    """The context of each pixel beside the pixel itself, and a 1x1 convolution of both."""

    def __init__(self, channels: int, key_channels: int, dropout: float) -> None:
        super().__init__()
        self.object_context_block = ObjectAttention(channels, key_channels)
        self.conv_bn_dropout = _transform(2 * channels, channels)
        self.conv_bn_dropout.append(nn.Dropout2d(dropout))

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        context = self.object_context_block(x, regions)
        out: Tensor = self.conv_bn_dropout(torch.cat([context, x], 1))
        return out


class HRNetOCR(HRNetTrunk, SegmentationModel):
    """HRNet with object-contextual representations.

    Auxiliary logits weigh the pixels of each class' region; each pixel then attends to the regions'
    means. The loss is that of the auxiliary logits with 0.4 and of the main ones with 1.

    Args:
        num_classes: Number of logits for each pixel.
        width: See :class:`HRNet`.
        align_corners: Of all upsampling; True in the published configurations.
        fuse_mode: See :class:`HRNet`.
        frozen_norm: Batch normalisation keeps its statistics in training.
        norm_momentum: Of batch normalisation.
        channels: Of pixels and regions.
        key_channels: Of the attention.
        dropout: Of whole channels, before the last convolution.
        features_only: Make the four maps of the trunk only.
        reference: Build the twin in plain torch.
    """

    _head = ("conv3x3_ocr", "ocr_distri_head", "cls_head", "aux_head")
    output_weights = (0.4, 1.0)

    def __init__(
        self,
        num_classes: int,
        width: str | HRNetWidth = "w48",
        *,
        align_corners: bool = True,
        fuse_mode: str = "bilinear",
        frozen_norm: bool = False,
        norm_momentum: float = 0.1,
        channels: int = 512,
        key_channels: int = 256,
        dropout: float = 0.05,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        row = self._add_trunk("HRNetOCR", width, align_corners, fuse_mode)
        self.align_corners = align_corners
        self.feature_channels = {str(i): c for i, c in enumerate(row)}
        self.conv3x3_ocr = nn.Sequential(
            convolution(sum(row), channels, 3, bias=True),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.ocr_distri_head = _Distribute(channels, key_channels, dropout)
        self.cls_head = nn.Conv2d(channels, num_classes, 1)
        self.aux_head = HRNetHead(row, num_classes, align_corners)
        start_small(self, but=("cls", "aux", "ocr"))
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps ``"0"`` (C channels, a quarter of the input) to ``"3"`` (8 C, 1/32)."""
        return OrderedDict((str(i), y) for i, y in enumerate(self._maps(x)))

    def forward_outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Auxiliary and main logits, both of :meth:`forward_low`'s size."""
        maps = self._maps(x)
        auxiliary = self.aux_head(maps)
        size = tuple(maps[0].shape[2:])
        upsample = self.operators.upsample_bilinear
        wide = [upsample(y, size, align_corners=self.align_corners) for y in maps[1:]]
        pixels = self.conv3x3_ocr(torch.cat([maps[0], *wide], 1))
        share = auxiliary.flatten(2).softmax(2)
        regions = (share @ pixels.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None]
        return auxiliary, self.cls_head(self.ocr_distri_head(pixels, regions))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        return self.forward_outputs(x)[-1]


@register_model
def hrnet_ocr_w18(num_classes: int = 19, **options: Any) -> HRNetOCR:
    """HRNet-W18 with OCR; options of :class:`HRNetOCR`."""
    return HRNetOCR(num_classes, "w18", **options)


@register_model
def hrnet_ocr_w48(num_classes: int = 19, **options: Any) -> HRNetOCR:
    """HRNet-W48 with OCR."""
    return HRNetOCR(num_classes, "w48", **options)
