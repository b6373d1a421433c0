# SPDX-License-Identifier: Apache-2.0
"""SegNet: a decoder that puts values back where max pooling found them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check

from ._base import SegmentationModel
from ._narrow import local_response_norm
from ._pool import MaxPool
from ._registry import register_model

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_BASIC = ((64,), (64,), (64,), (64,))


def _finished(inputs: int, outputs: int, kernel_size: int, relu: bool) -> nn.Module:
    conv = convolution(inputs, outputs, kernel_size, bias=True)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.bias, 0.001)
    return nn.Sequential(conv, norm, *[nn.ReLU(inplace=True)] * relu)


class SegNet(SegmentationModel):
    """An encoder with max pooling, and a decoder that unpools by the encoder's positions.

    Children ``encoder.0`` and on are the stages, ``decoder.0`` and on those that undo them, in the
    order of the data; every convolution has a bias and batch normalisation. Logits are of full
    resolution. Input is BGR (VGG16's weights) or any, 0 to 255.

    Args:
        num_classes: 11 for CamVid.
        variant: ``"vgg16"``: 13 convolutions 3x3 and 13 more, ReLU in both, the last of which gives
            the logits. ``"basic"``: 4 and 4, 7x7 of 64 channels, no ReLU in the decoder, a 1x1
            classifier, and local response normalisation of the input.
        ceil_mode: Of the max pooling; Caffe's. The decoder always restores the sizes.
        frozen_norm: Batch normalisation keeps its statistics in training.
        norm_momentum: Of batch normalisation.
        features_only: The decoder's maps, finest first: ``decoder1``, the input of the classifier,
            to ``decoder4`` or ``decoder5``.
        reference: Plain torch; the unpooling is torch's in both.

    Source: V. Badrinarayanan, A. Kendall, R. Cipolla, *SegNet*, TPAMI 2017; SegNet-Tutorial.
    """

    _head = ("classifier",)

    def __init__(
        self,
        num_classes: int = 11,
        variant: str = "vgg16",
        *,
        ceil_mode: bool = True,
        frozen_norm: bool = False,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        check.choice("SegNet", "variant", variant, ("vgg16", "basic"))
        self.variant, self.basic = variant, variant == "basic"
        stages, size = (_BASIC, 7) if self.basic else (_VGG16, 3)
        self.pool = MaxPool(2, ceil_mode=ceil_mode)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        inputs, begins = 3, []
        for widths in stages:
            begins.append(inputs)
            self.encoder.append(_stage(inputs, widths, size, True))
            inputs = widths[-1]
        for index in reversed(range(len(stages))):
            # The mirror image of a stage; its last width is what the stage began with.
            mirrored = [*stages[index][1:], begins[index]]
            if index == 0:
                mirrored = [*stages[0]] if self.basic else [*stages[0][1:]]
            self.decoder.append(_stage(inputs, mirrored, size, not self.basic))
            inputs = mirrored[-1]
        self.feature_channels = {
            f"decoder{i + 1}": stages[max(i - 1, 0)][-1] for i in range(len(stages))
        }
        kernel = 1 if self.basic else 3
        self.classifier = nn.Conv2d(inputs, num_classes, kernel, padding=kernel // 2)
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of the decoder."""
        if self.basic:
            x = local_response_norm(x)
        found = []
        for stage in self.encoder:
            x = stage(x)
            size = (x.shape[2], x.shape[3])
            x, where = self.pool.with_indices(x)
            found.append((where, size))
        maps = []
        for stage in self.decoder:
            where, size = found.pop()
            # Not F.max_unpool2d, which compares sizes: dynamic ones could not be exported.
            x = stage(torch.ops.aten.max_unpool2d(x, where, size))
            maps.append((f"decoder{len(found) + 1}", x))
        return OrderedDict(reversed(maps))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits; of full resolution, there are no lower ones."""
        out: Tensor = self.classifier(self.features(x)["decoder1"])
        return out

    def upsample(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """The logits as they are."""
        return low


def _stage(inputs: int, widths: Sequence[int], kernel_size: int, relu: bool) -> nn.Sequential:
    rows = []
    for outputs in widths:
        rows.append(_finished(inputs, outputs, kernel_size, relu))
        inputs = outputs
    return nn.Sequential(*rows)


@register_model
def segnet(num_classes: int = 11, **options: Any) -> SegNet:
    """SegNet: 29,449,355 parameters for 11 classes."""
    return SegNet(num_classes, **options)


@register_model
def segnet_basic(num_classes: int = 11, **options: Any) -> SegNet:
    """SegNet-Basic: 1,416,587 parameters for 11 classes."""
    return SegNet(num_classes, "basic", **options)
