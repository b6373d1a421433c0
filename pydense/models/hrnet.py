# SPDX-License-Identifier: Apache-2.0
"""HRNet for segmentation, and its ImageNet classifier.

Source: J. Wang et al., *Deep High-Resolution Representation Learning for Visual Recognition*, TPAMI
2020 (code: HRNet-Semantic-Segmentation, branch pytorch-v1.1, and HRNet-Image-Classification;
parameters have their names).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from pydense.nn._operators import UsesOperators, use_operators
from pydense.ops import _crf_arguments as check

from ._base import SegmentationModel, set_norm_momentum
from ._hrnet import HRNetHead, HRNetTrunk, HRNetWidth, bottlenecks, start_small
from ._registry import register_model
from ._resnet import Bottleneck


class HRNet(HRNetTrunk, SegmentationModel):
    """HRNet for segmentation (HRNetV2): all resolutions upsampled to a quarter, then 1x1.

    Published checkpoints need the flags that they were trained with: the wrong ``align_corners``
    changes one label in eight. Input: RGB, ImageNet mean and standard deviation.

    Args:
        num_classes: Number of logits for each pixel.
        width: ``"w18"``, ``"w32"``, ``"w40"``, ``"w48"``, ``"w18_small_v1"`` (whose finest branch
            has 16 channels) or ``"w18_small_v2"``; or another :class:`HRNetWidth`.
        align_corners: Of all upsampling: in the exchanges, in the head and of the logits. False in
            the configurations without OCR.
        fuse_mode: Of the exchanges: ``"bilinear"``; ``"nearest"`` as in the networks for
            classification and poses.
        frozen_norm: Batch normalisation keeps its statistics in training.
        norm_momentum: Of batch normalisation: 0.01 (branch pytorch-v1.1), 0.1 in the OCR branch.
        final_kernel_size: Of the last convolution, 1 or 3.
        features_only: Make the four maps of the trunk only, C to 8 C channels, 1/4 to 1/32.
        reference: Build the twin in plain torch.
    """

    _head = ("last_layer",)

    def __init__(
        self,
        num_classes: int,
        width: str | HRNetWidth = "w48",
        *,
        align_corners: bool = False,
        fuse_mode: str = "bilinear",
        frozen_norm: bool = False,
        norm_momentum: float = 0.01,
        final_kernel_size: int = 1,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        channels = self._add_trunk("HRNet", width, align_corners, fuse_mode)
        if final_kernel_size not in (1, 3):
            raise ValueError(f"HRNet: final_kernel_size must be 1 or 3, got {final_kernel_size!r}")
        self.align_corners = align_corners
        self.feature_channels = {str(i): c for i, c in enumerate(channels)}
        self.last_layer = HRNetHead(channels, num_classes, align_corners, final_kernel_size)
        start_small(self)
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps ``"0"`` (C channels, a quarter of the input) to ``"3"`` (8 C, 1/32)."""
        return OrderedDict((str(i), y) for i, y in enumerate(self._maps(x)))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        out: Tensor = self.last_layer(self._maps(x))
        return out


class HRNetClassifier(HRNetTrunk, UsesOperators):
    """HRNet's ImageNet classifier: where segmentation networks take their trunk from.

    Parameters have the names of the published checkpoints, which are those of timm's ``hrnet_*``.
    Exchanges upsample to the nearest pixel. Input sizes need not be multiples of 32; for those that
    are, results are the original's.

    Args:
        width: See :class:`HRNet`.
        num_classes: Of the pictures.
        norm_momentum: Of batch normalisation.
        reference: Build the twin in plain torch.

    Shape:
        - x: (N, 3, H, W).
        - output: (N, num_classes).
    """

    def __init__(
        self,
        width: str | HRNetWidth = "w18",
        num_classes: int = 1000,
        norm_momentum: float = 0.1,
        reference: bool = False,
    ) -> None:
        super().__init__()
        op = "HRNetClassifier"
        check.flag(op, "reference", reference)
        channels = self._add_trunk(op, width, False, "nearest")
        planes = (32, 64, 128, 256)
        wide = [p * Bottleneck.expansion for p in planes]
        self.incre_modules = nn.ModuleList(
            bottlenecks(c, p, 1) for c, p in zip(channels, planes, strict=True)
        )
        self.downsamp_modules = nn.ModuleList(
            _with_bias(wide[i], wide[i + 1], 3, 2) for i in range(3)
        )
        self.final_layer = _with_bias(wide[3], 2048, 1, 1)
        self.classifier = nn.Linear(2048, check.integer(op, "num_classes", num_classes, 1, 2**20))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        set_norm_momentum(op, self, norm_momentum)
        use_operators(self, "reference" if reference else "pydense")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes of a picture."""
        own = [layer(y) for layer, y in zip(self.incre_modules, self._maps(x), strict=True)]
        y = own[0]
        for layer, finer in zip(self.downsamp_modules, own[1:], strict=True):
            y = finer + layer(y)
        out: Tensor = self.classifier(self.final_layer(y).mean((2, 3)))
        return out


def _with_bias(inputs: int, outputs: int, kernel_size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@register_model
def hrnet_w18_small_v1(num_classes: int = 19, **options: Any) -> HRNet:
    """HRNet-W18-Small v1 for segmentation; options of :class:`HRNet`."""
    return HRNet(num_classes, "w18_small_v1", **options)


@register_model
def hrnet_w18_small_v2(num_classes: int = 19, **options: Any) -> HRNet:
    """HRNet-W18-Small v2 for segmentation."""
    return HRNet(num_classes, "w18_small_v2", **options)


@register_model
def hrnet_w18(num_classes: int = 19, **options: Any) -> HRNet:
    """HRNet-W18 for segmentation."""
    return HRNet(num_classes, "w18", **options)


@register_model
def hrnet_w32(num_classes: int = 19, **options: Any) -> HRNet:
    """HRNet-W32 for segmentation."""
    return HRNet(num_classes, "w32", **options)


@register_model
def hrnet_w40(num_classes: int = 19, **options: Any) -> HRNet:
    """HRNet-W40 for segmentation."""
    return HRNet(num_classes, "w40", **options)


@register_model
def hrnet_w48(num_classes: int = 19, **options: Any) -> HRNet:
    """HRNet-W48 for segmentation."""
    return HRNet(num_classes, "w48", **options)
