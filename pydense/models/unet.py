# SPDX-License-Identifier: Apache-2.0
"""U-Net with padded convolutions and batch normalisation."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pydense.nn._operators import UsesOperators
from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check

from ._base import SegmentationModel
from ._pool import MaxPool
from ._registry import register_model


class _DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or outputs
        self.double_conv = nn.Sequential(
            convolution(inputs, inner, 3),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            convolution(inner, outputs, 3),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.double_conv(x)
        return out


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        pool = MaxPool(2, ceil_mode=False)
        self.maxpool_conv = nn.Sequential(pool, _DoubleConv(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.maxpool_conv(x)
        return out


class _Up(UsesOperators, nn.Module):
    def __init__(self, inputs: int, outputs: int, bilinear: bool, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.up = None if bilinear else nn.ConvTranspose2d(inputs, inputs // 2, 2, 2)
        self.conv = _DoubleConv(inputs, outputs, inputs // 2 if bilinear else None)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.up is None:
            size = (2 * x.shape[2], 2 * x.shape[3])
            x = self.operators.upsample_bilinear(x, size, align_corners=self.align_corners)
        else:
            x = self.up(x)
        # Pooling left out the last row and column of odd maps: these are zeros. (What it added to
        # maps of one row or column is left out again.) This is F.pad without its decisions by size,
        # with which dynamic sizes could not be exported.
        x = self.operators.upsample_crop(x, stride=1, kernel_size=1, size=tuple(skip.shape[2:]))
        out: Tensor = self.conv(torch.cat([skip, x], 1))
        return out


class UNet(SegmentationModel):
    """U-Net: five levels, skips by concatenation.

    Convolutions are padded and followed by batch normalisation, unlike those of the 2015 paper, as
    in the widespread PyTorch implementation whose keys (``inc``, ``down1``, ..., ``up4``, ``outc``)
    it has. Logits are of full resolution.

    Args:
        num_classes: Of the logits.
        in_channels: Of the picture.
        bilinear: Upsample bilinearly and halve the channels below, instead of transposed
            convolutions.
        width: Channels of the first level, 64 as published.
        align_corners: Of the bilinear upsampling; True as published.
        frozen_norm: Batch normalisation keeps its statistics in training.
        norm_momentum: Of batch normalisation.
        features_only: See :class:`SegmentationModel`: the five maps of the decoder's levels, finest
            first: ``up4`` to ``up1`` and ``down4``.
        reference: Plain torch.

    Source: O. Ronneberger, P. Fischer, T. Brox, *U-Net*, MICCAI 2015; milesial/Pytorch-UNet.
    """

    _head = ("outc",)

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        bilinear: bool = False,
        width: int = 64,
        *,
        align_corners: bool = True,
        frozen_norm: bool = False,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        op = "UNet"
        check.integer(op, "in_channels", in_channels, 1, 2**20)
        check.integer(op, "width", width, 2, 2**16)
        check.flag(op, "bilinear", bilinear)
        check.flag(op, "align_corners", align_corners)
        factor = 2 if bilinear else 1
        widths = [width << i for i in range(4)] + [(width << 4) // factor]
        self.inc = _DoubleConv(in_channels, width)
        for i in range(4):
            self.add_module(f"down{i + 1}", _Down(widths[i], widths[i + 1]))
        self.feature_channels = {"down4": widths[4]}
        for i in range(4):
            level = 3 - i
            outputs = (width << level) // (factor if level else 1)
            up = _Up(width << (level + 1), outputs, bilinear, align_corners)
            self.add_module(f"up{i + 1}", up)
            self.feature_channels = {f"up{i + 1}": outputs, **self.feature_channels}
        self.outc = nn.Module()
        self.outc.add_module("conv", nn.Conv2d(width, num_classes, 1))
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of the decoder."""
        skips = [self.inc(x)]
        for i in range(4):
            skips.append(getattr(self, f"down{i + 1}")(skips[-1]))
        maps = [("down4", skips.pop())]
        for i in range(4):
            maps.append((f"up{i + 1}", getattr(self, f"up{i + 1}")(maps[-1][1], skips.pop())))
        return OrderedDict(reversed(maps))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits; of full resolution, there are no lower ones."""
        out: Tensor = self.outc.get_submodule("conv")(self.features(x)["up4"])
        return out

    def upsample(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """The logits as they are."""
        return low


@register_model
def unet(num_classes: int = 2, **options: Any) -> UNet:
    """U-Net with transposed convolutions: 31,037,698 parameters for two classes."""
    return UNet(num_classes, **options)


@register_model
def unet_bilinear(num_classes: int = 2, **options: Any) -> UNet:
    """U-Net with bilinear upsampling: 17,263,042 parameters for two classes."""
    return UNet(num_classes, bilinear=True, **options)
