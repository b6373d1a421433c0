# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3 and the FCN on ResNet as torchvision has them, with its keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pydense.nn import ASPP
from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check

from . import _resnet as resnet
from ._base import SegmentationModel
from ._registry import register_model

RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


def _fcn_head(inputs: int, num_classes: int) -> nn.Sequential:
    inner = inputs // 4
    return nn.Sequential(
        convolution(inputs, inner, 3),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(inner, num_classes, 1),
    )


class _OnResNet(SegmentationModel):
    """A dilated ResNet, a classifier on its last layer and an auxiliary one on the third."""

    _head = ("classifier", "aux_classifier")

    def _set_up(
        self,
        classifier: nn.Sequential,
        depth: int,
        output_stride: int,
        aux: bool,
        align_corners: bool,
        stride_on: str,
        first_dilation: str,
        ceil_mode: bool,
    ) -> None:
        op = type(self).__name__
        check.flag(op, "aux", aux)
        check.flag(op, "align_corners", align_corners)
        self.align_corners = align_corners
        self.backbone = resnet.ResNet(
            depth,
            output_stride=output_stride,
            stride_on=stride_on,
            ceil_mode=ceil_mode,
            first_dilation=first_dilation,
        )
        self.feature_channels = dict(resnet.CHANNELS)
        self.classifier = classifier
        self.aux_classifier = _fcn_head(1024, self.num_classes) if aux else None
        self.output_weights = (0.5, 1.0) if aux else (1.0,)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of the four layers."""
        maps: OrderedDict[str, Tensor] = self.backbone(x)
        return maps

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits of the backbone's stride."""
        logits: Tensor = self.classifier(self.features(x)["layer4"])
        return logits

    def forward_outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The auxiliary logits, where there are any, and the logits."""
        maps = self.features(x)
        logits = self.classifier(maps["layer4"])
        if self.aux_classifier is None:
            return (logits,)
        return self.aux_classifier(maps["layer3"]), logits


class DeepLabV3(_OnResNet):
    """DeepLab v3: ResNet, atrous spatial pyramid pooling with image pooling, a 3x3 convolution.

    Keys, layers and results are torchvision's ``deeplabv3_resnet50`` and ``..101``: checkpoints
    load as they are. Input is RGB, 0 to 1, normalised with ImageNet's mean and deviation.

    With ``first_dilation="own"``, ``align_corners=True`` and ``aux=False`` (and rates 12, 24, 36
    for both strides) it is the network that segmentation_models.pytorch calls DeepLabV3.

    Args:
        num_classes: 21 for torchvision's weights.
        depth: 50, 101 or 152.
        output_stride: 8 as torchvision's, or 16.
        aux: Whether there is an auxiliary output for training (weight 0.5). Inference never
            computes it.
        rates: Of the pyramid; 12, 24, 36, and 6, 12, 18 for output stride 16, if left out.
        align_corners: Of the upsampling of the logits.
        stride_on: Where a block has its stride: the ``"3x3"``, or the first ``"1x1"``.
        first_dilation: Of a dilated layer's first block: that of the layer before (``"previous"``,
            torchvision) or the layer's ``"own"``.
        ceil_mode: Of the max pooling.
        frozen_norm: Batch normalisation keeps its statistics in training.
        norm_momentum: Of batch normalisation.
        features_only: ``layer1`` to ``layer4``.
        reference: Plain torch.

    Source: L.-C. Chen et al., *Rethinking Atrous Convolution for Semantic Image Segmentation*,
    2017; torchvision.
    """

    def __init__(
        self,
        num_classes: int = 21,
        depth: int = 50,
        output_stride: int = 8,
        aux: bool = True,
        *,
        rates: Sequence[int] | None = None,
        align_corners: bool = False,
        stride_on: str = "3x3",
        first_dilation: str = "previous",
        ceil_mode: bool = False,
        frozen_norm: bool = False,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        if output_stride not in RATES:
            raise ValueError(f"DeepLabV3: output_stride must be 8 or 16, got {output_stride!r}")
        classifier = nn.Sequential(
            ASPP(2048, RATES[output_stride] if rates is None else rates, 256),
            convolution(256, 256, 3),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, num_classes, 1),
        )
        self._set_up(
            classifier,
            depth,
            output_stride,
            aux,
            align_corners,
            stride_on,
            first_dilation,
            ceil_mode,
        )
        self._finish(reference, frozen_norm, norm_momentum)


class FCNResNet(_OnResNet):
    """torchvision's FCN: a dilated ResNet, a 3x3 convolution, a classifier.

    The arguments are those of :class:`DeepLabV3`, without ``rates``.
    """

    def __init__(
        self,
        num_classes: int = 21,
        depth: int = 50,
        output_stride: int = 8,
        aux: bool = True,
        *,
        align_corners: bool = False,
        stride_on: str = "3x3",
        first_dilation: str = "previous",
        ceil_mode: bool = False,
        frozen_norm: bool = False,
        norm_momentum: float = 0.1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        classifier = _fcn_head(2048, num_classes)
        self._set_up(
            classifier,
            depth,
            output_stride,
            aux,
            align_corners,
            stride_on,
            first_dilation,
            ceil_mode,
        )
        self._finish(reference, frozen_norm, norm_momentum)


@register_model
def deeplab_v3_resnet50(num_classes: int = 21, **options: Any) -> DeepLabV3:
    """Torchvision's ``deeplabv3_resnet50``: 42,004,074 parameters with the auxiliary output."""
    return DeepLabV3(num_classes, 50, **options)


@register_model
def deeplab_v3_resnet101(num_classes: int = 21, **options: Any) -> DeepLabV3:
    """Torchvision's ``deeplabv3_resnet101``: 60,996,202 parameters with the auxiliary output."""
    return DeepLabV3(num_classes, 101, **options)


@register_model
def fcn_resnet50(num_classes: int = 21, **options: Any) -> FCNResNet:
    """Torchvision's ``fcn_resnet50``: 35,322,218 parameters with the auxiliary output."""
    return FCNResNet(num_classes, 50, **options)


@register_model
def fcn_resnet101(num_classes: int = 21, **options: Any) -> FCNResNet:
    """Torchvision's ``fcn_resnet101``: 54,314,346 parameters with the auxiliary output."""
    return FCNResNet(num_classes, 101, **options)
