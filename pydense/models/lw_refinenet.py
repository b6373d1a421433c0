# SPDX-License-Identifier: Apache-2.0
"""Light-Weight RefineNet on ResNet-50, 101, 152 and on MobileNet-v2.

Source: V. Nekrasov, C. Shen, I. Reid, *Light-Weight RefineNet for Real-Time Semantic Segmentation*,
BMVC 2018 (code: light-weight-refinenet; parameters have its names).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu6

from pydense.nn import ChainedResidualPooling
from pydense.ops import _crf_arguments as check

from . import _mobilenet
from ._base import SegmentationModel
from ._registry import register_model
from .refinenet import RefineNet, adopt_resnet


class LightWeightRefineNet(RefineNet):
    """RefineNet with 1x1 convolutions and without residual units and dropout.

    The 3x3 convolution of the classifier alone is left. The chained residual pooling is one
    operator. Input: RGB, ImageNet mean and standard deviation.

    Args:
        num_classes: Number of logits for each pixel.
        depth: Of the ResNet: 50, 101 or 152.
        variant: Of the chained residual pooling, ``"pool_conv"`` as published or ``"conv_pool"``.
        upsampling: Between the paths, see :class:`RefineNet`.
        align_corners: Of the bilinear upsampling between the paths.
        output_align_corners: Of the upsampling of the logits.
        channels: Of the coarsest path and of the others.
        stride_on: Where a block of the ResNet has its stride: the ``"3x3"`` or the first ``"1x1"``.
        frozen_norm: Batch normalisation keeps its statistics in training, as the authors' did. Give
            False to train a trunk that starts at random.
        norm_momentum: Of batch normalisation, where it is not frozen.
        features_only: Make the refined maps only.
        reference: Build the twin in plain torch.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 101,
        *,
        variant: str = "pool_conv",
        upsampling: str = "bilinear",
        align_corners: bool = True,
        output_align_corners: bool = False,
        channels: tuple[int, int] = (512, 256),
        stride_on: str = "3x3",
        frozen_norm: bool = True,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        SegmentationModel.__init__(self, num_classes, features_only)
        self._set_options(upsampling, align_corners, output_align_corners)
        adopt_resnet(self, depth, stride_on)
        self._add_paths(channels, 1, variant, units=(0, 0))
        self._finish(reference, frozen_norm, norm_momentum)

    def _drop(self, x: Tensor) -> Tensor:
        return x


class LightWeightRefineNetMobileNet(SegmentationModel):
    """Light-Weight RefineNet on MobileNet-v2: pairs of layers of a resolution are one path's input.

    Its MobileNet-v2 expands in the first block too (32 to 32 channels), where torchvision's has no
    such convolution, and every sum ends in a ReLU6. Input: RGB, ImageNet mean and standard
    deviation.

    Args:
        num_classes: Number of logits for each pixel.
        variant: Of the chained residual pooling, ``"pool_conv"`` as published or ``"conv_pool"``.
        align_corners: Of the bilinear upsampling between the paths.
        output_align_corners: Of the upsampling of the logits.
        channels: Of all paths.
        frozen_norm: Batch normalisation keeps its statistics in training, as the authors' did. Give
            False to train a trunk that starts at random.
        norm_momentum: Of batch normalisation, where it is not frozen.
        features_only: Make the refined maps only.
        reference: Build the twin in plain torch.
    """

    _head = ("segm",)

    def __init__(
        self,
        num_classes: int,
        *,
        variant: str = "pool_conv",
        align_corners: bool = True,
        output_align_corners: bool = False,
        channels: int = 256,
        frozen_norm: bool = True,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        op = type(self).__name__
        check.flag(op, "align_corners", align_corners)
        check.flag(op, "output_align_corners", output_align_corners)
        self.path_align_corners, self.align_corners = align_corners, output_align_corners
        for i, layer in enumerate(_mobilenet.layers()):
            self.add_module(f"layer{i + 1}", layer)
        for i in range(8, 2, -1):
            self.add_module(f"conv{i}", nn.Conv2d(_mobilenet.CHANNELS[i], channels, 1, bias=False))
        for i in range(4, 0, -1):
            pool = ChainedResidualPooling(channels, 4, 1, variant)
            self.add_module(f"crp{i}", nn.Sequential(pool))
            if i > 1:
                self.add_module(f"conv_adapt{i}", nn.Conv2d(channels, channels, 1, bias=False))
        self.segm = nn.Conv2d(channels, self.num_classes, 3, padding=1)
        self.feature_channels = {str(i): channels for i in range(4)}
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Refined maps ``"0"`` (a quarter of the input) to ``"3"`` (1/32), of equal channels."""
        maps: dict[int, Tensor] = {}
        for i in range(1, 9):
            x = getattr(self, f"layer{i}")(x)
            if i > 2:
                maps[i] = getattr(self, f"conv{i}")(x)
        refined: list[Tensor] = []
        for path, members in ((4, (8, 7)), (3, (5, 6)), (2, (4,)), (1, (3,))):
            terms = [maps[i] for i in members] + refined[-1:]
            total = self.operators.fuse_sum_upsample(
                terms, tuple(terms[0].shape[2:]), align_corners=self.path_align_corners
            )
            y = getattr(self, f"crp{path}")(relu6(total))
            refined.append(getattr(self, f"conv_adapt{path}")(y) if path > 1 else y)
        return OrderedDict((str(i), y) for i, y in enumerate(reversed(refined)))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        out: Tensor = self.segm(self.features(x)["0"])
        return out


@register_model
def lw_refinenet50(num_classes: int = 21, **options: Any) -> LightWeightRefineNet:
    """Light-Weight RefineNet-50; options of :class:`LightWeightRefineNet`."""
    return LightWeightRefineNet(num_classes, 50, **options)


@register_model
def lw_refinenet101(num_classes: int = 21, **options: Any) -> LightWeightRefineNet:
    """Light-Weight RefineNet-101."""
    return LightWeightRefineNet(num_classes, 101, **options)


@register_model
def lw_refinenet152(num_classes: int = 21, **options: Any) -> LightWeightRefineNet:
    """Light-Weight RefineNet-152."""
    return LightWeightRefineNet(num_classes, 152, **options)


@register_model
def lw_refinenet_mobilenet_v2(
    num_classes: int = 21, **options: Any
) -> LightWeightRefineNetMobileNet:
    """Light-Weight RefineNet on MobileNet-v2; options of :class:`LightWeightRefineNetMobileNet`."""
    return LightWeightRefineNetMobileNet(num_classes, **options)
