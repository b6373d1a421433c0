# SPDX-License-Identifier: Apache-2.0
"""PSPNet: pyramid pooling over a dilated ResNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pydense.nn._operators import UsesOperators
from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check

from . import _resnet as resnet
from ._base import SegmentationModel
from ._registry import register_model


class PyramidPooling(UsesOperators, nn.Module):
    """Means over several grids, each convolved 1x1 and upsampled, beside the map itself.

    Args:
        in_channels: Of the map.
        out_channels: Of each grid's convolution.
        bins: Rows and columns of the grids.
        align_corners: Of the upsampling.
    """

    def __init__(
        self, in_channels: int, out_channels: int, bins: Sequence[int], align_corners: bool
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(count),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            )
            for count in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        """The map and what became of its grids, concatenated."""
        rows, size = [x], tuple(x.shape[2:])
        for layers in self.features:
            rows.append(
                self.operators.upsample_bilinear(layers(x), size, align_corners=self.align_corners)
            )
        return torch.cat(rows, 1)


def _classifier(inputs: int, inner: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, inner, 3),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(inner, num_classes, 1),
    )


class PSPNet(SegmentationModel):
    """The pyramid scene parsing network, as its authors' PyTorch code has it.

    A ResNet with a deep stem and output stride 8, pyramid pooling, and an auxiliary output on its
    third layer. Children are ``backbone``, ``ppm.features.N``, ``cls`` and ``aux``. Sizes 8 k + 1
    (473, 713) lie exactly under the low-resolution logits; others are upsampled to their size all
    the same, where the published code refuses them. Input is RGB, 0 to 255, less ImageNet's mean
    and divided by its deviation.

    Args:
        num_classes: 21 for Pascal VOC.
        depth: 50, 101 or 152.
        bins: Of the pyramid.
        aux: Whether there is the auxiliary output (weight 0.4); inference never computes it.
        dropout: Of channels, before the classifiers.
        align_corners: Of all upsampling.
        stride_on: Where a block has its stride: the ``"3x3"``, as in the authors' PyTorch code, or
            the first ``"1x1"``, as in their Caffe net of depth 50; that of depth 101 has ``"3x3"``.
        ceil_mode: Of the max pooling; True in the Caffe nets.
        frozen_norm: Batch normalisation keeps its statistics in training.
        norm_momentum: Of batch normalisation; 0.05 in the Caffe nets.
        features_only: ``layer1`` to ``layer4``.
        reference: Plain torch.

    Source: H. Zhao et al., *Pyramid Scene Parsing Network*, CVPR 2017; hszhao/semseg,
    and hszhao/PSPNet in Caffe.
    """

    _head = ("ppm", "cls", "aux")

    def __init__(
        self,
        num_classes: int = 21,
        depth: int = 50,
        bins: Sequence[int] = (1, 2, 3, 6),
        aux: bool = True,
        dropout: float = 0.1,
        *,
        align_corners: bool = True,
        stride_on: str = "3x3",
        ceil_mode: bool = False,
        frozen_norm: bool = False,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        op = "PSPNet"
        check.flag(op, "aux", aux)
        check.flag(op, "align_corners", align_corners)
        grids = [check.integer(op, "bins", n, 1, 64) for n in bins]
        channels = resnet.CHANNELS["layer4"]
        if not grids or channels % len(grids):
            raise ValueError(f"{op}: bins must be a number that divides {channels}, got {bins!r}")
        self.align_corners = align_corners
        self.output_weights = (0.4, 1.0) if aux else (1.0,)
        self.depth, self.stride_on = depth, stride_on
        self.backbone = resnet.ResNet(
            depth, output_stride=8, stem="deep", stride_on=stride_on, ceil_mode=ceil_mode
        )
        self.feature_channels = dict(resnet.CHANNELS)
        self.ppm = PyramidPooling(channels, channels // len(grids), grids, align_corners)
        self.cls = _classifier(2 * channels, 512, num_classes, dropout)
        self.aux = _classifier(1024, 256, num_classes, dropout) if aux else None
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of the four layers."""
        return cast("OrderedDict[str, Tensor]", self.backbone(x))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits of stride 8."""
        logits: Tensor = self.cls(self.ppm(self.features(x)["layer4"]))
        return logits

    def forward_outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The auxiliary logits, where there are any, and the logits."""
        maps = self.features(x)
        logits = self.cls(self.ppm(maps["layer4"]))
        return (logits,) if self.aux is None else (self.aux(maps["layer3"]), logits)


@register_model
def pspnet_resnet50(num_classes: int = 21, **options: Any) -> PSPNet:
    """PSPNet-50: 49,081,578 parameters with the auxiliary output."""
    return PSPNet(num_classes, 50, **options)


@register_model
def pspnet_resnet101(num_classes: int = 21, **options: Any) -> PSPNet:
    """PSPNet-101: 68,073,706 parameters with the auxiliary output."""
    return PSPNet(num_classes, 101, **options)
