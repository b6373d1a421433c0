# SPDX-License-Identifier: Apache-2.0
"""DeepLab v1 and v2: atrous VGG16 and ResNet-101, several scales, dense CRF."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from pydense.nn import ASPPSum, AtrousConv2d, DenseCRF
from pydense.ops import _crf_arguments as check

from . import _resnet as resnet
from . import _vgg as vgg
from ._base import SegmentationModel
from ._pool import MaxPool
from ._registry import register_model

_SCALES = (Fraction(1), Fraction(3, 4), Fraction(1, 2))
RATES = (6, 12, 18, 24)
_HEADS = ("large_fov", "aspp")


class _DeepLabV2(SegmentationModel):
    """What both backbones share: scales, the loss on shrunk labels, the CRF.

    Low-resolution logits are those of stride 8. Of H = 8 k + 1 rows they have k + 1, and lie
    exactly on every eighth. Other heights have (H - 1) // 8 + 1 rows too, but with ``ceil_mode``
    one more where a window of the pooling hangs over the end: for VGG16 at all other heights (320
    become 41), for ResNet where (H - 1) % 8 is 6 or 7.
    """

    def _set_up(self, msc: bool, align_corners: bool, crf: Mapping[str, Any] | None) -> None:
        op = type(self).__name__
        check.flag(op, "msc", msc)
        check.flag(op, "align_corners", align_corners)
        self.msc, self.align_corners = msc, align_corners
        self.output_weights = (1.0,) * (len(_SCALES) + 1 if msc else 1)
        self.crf = None if crf is None else DenseCRF(**crf)

    def forward_scale(self, x: Tensor) -> Tensor:
        """Logits of one scale."""
        raise NotImplementedError(type(self).__name__)

    def forward_outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """With ``msc`` the logits at scales 1, 0.75 and 0.5 and their maximum; else the logits."""
        if not self.msc:
            return (self.forward_scale(x),)
        rows = [self.forward_scale(self._scaled(x, scale)) for scale in _SCALES]
        largest, size = rows[0], tuple(rows[0].shape[2:])
        for row in rows[1:]:
            larger = self.operators.upsample_bilinear(row, size, align_corners=self.align_corners)
            largest = torch.maximum(largest, larger)
        return (*rows, largest)

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits of stride 8, with ``msc`` the maximum over the scales."""
        return self.forward_outputs(x)[-1]

    def _scaled(self, x: Tensor, scale: Fraction) -> Tensor:
        if scale == 1:
            return x
        if self.align_corners:
            # Caffe's Interp shrinks by the denominator and zooms by the numerator.
            size = [(n - 1) // scale.denominator * scale.numerator + 1 for n in x.shape[2:]]
            smaller: Tensor = self.operators.upsample_bilinear(x, tuple(size), align_corners=True)
        elif 1 in x.shape[2:]:
            size = [max(1, n * scale.numerator // scale.denominator) for n in x.shape[2:]]
            smaller = self.operators.upsample_bilinear(x, tuple(size))
        else:
            smaller = self.operators.upsample_bilinear(x, scale_factor=float(scale))
        return smaller

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        reduction: str = "mean",
        ignore_index: int = 255,
        shrink_labels: bool = True,
        **options: Any,
    ) -> Tensor:
        """The sum of the cross-entropies of all outputs.

        Args:
            x: (N, 3, H, W).
            target: (N, H, W), any integer dtype.
            reduction: ``"mean"``, ``"mean_all"`` (over the shrunk labels) or ``"sum"``.
            ignore_index: Label of pixels that take no part.
            shrink_labels: As published: labels are shrunk to each output's size, taking the nearest
                pixel (of the same corners with ``align_corners``). False: outputs are upsampled to
                the size of the labels.
            **options: ``weight``, ``label_smoothing``.
        """
        check.flag(type(self).__name__, "shrink_labels", shrink_labels)
        if not shrink_labels:
            return super().loss(
                x, target, reduction=reduction, ignore_index=ignore_index, **options
            )
        total: Tensor | None = None
        for factor, low in zip(self.output_weights, self.forward_outputs(x), strict=True):
            labels = self._shrunk(target, low)
            term = factor * self.operators.upsample_cross_entropy(
                low, labels, reduction=reduction, ignore_index=ignore_index, **options
            )
            total = term if total is None else total + term
        assert total is not None
        return total

    def _shrunk(self, target: Tensor, low: Tensor) -> Tensor:
        rows, columns = (
            _nearest(n, out, self.align_corners, target)
            for n, out in zip(target.shape[1:], low.shape[2:], strict=True)
        )
        return target[:, rows][:, :, columns]

    def refine(self, logits: Tensor, image: Tensor) -> Tensor:
        """Probabilities (N, num_classes, H, W) of the CRF; see :class:`pydense.nn.DenseCRF`.

        Args:
            logits: Of full resolution.
            image: (N or 1, 3, H, W), the picture itself, 0 to 255.

        Raises:
            RuntimeError: The model was built without ``crf``.
        """
        if self.crf is None:
            raise RuntimeError(f"{type(self).__name__}: crf must be given to the constructor")
        refined: Tensor = self.crf(logits, image)
        return refined

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        *,
        image: Tensor | None = None,
        dtype: torch.dtype = torch.int64,
        return_confidence: bool = False,
    ) -> Any:
        """Labels (N, H, W); with ``image`` (N or 1, 3, H, W), 0 to 255, those of the CRF."""
        if image is None:
            return super().predict(x, dtype=dtype, return_confidence=return_confidence)
        sure, labels = self.refine(self(x), image).max(1)
        return (labels.to(dtype), sure) if return_confidence else labels.to(dtype)


def _nearest(n: Any, out: Any, align_corners: bool, like: Tensor) -> Tensor:
    """Which of n rows stands for each of ``out``."""
    y: Tensor = torch.arange(out, device=like.device)
    index: Tensor
    if align_corners:
        last = max(out - 1, 1)
        index = (2 * y * (n - 1) + last).div(2 * last, rounding_mode="floor")
    else:
        index = ((2 * y + 1) * n).div(2 * out, rounding_mode="floor")
    return index


CRF_RESNET: Mapping[str, Any] = {
    "gaussian": {"sxy": 1, "compat": 3},
    "bilateral": {"sxy": 67, "srgb": 3, "compat": 4},
}
"""The published CRF behind ResNet-101."""
CRF_VGG: Mapping[str, Any] = {
    "gaussian": {"sxy": 2, "compat": 2},
    "bilateral": {"sxy": 65, "srgb": 3, "compat": 4},
}
"""That behind VGG16, as a port gives it."""


class DeepLabV2ResNet(_DeepLabV2):
    """DeepLab v2 on an atrous ResNet: the sum of four 3x3 convolutions of different rates.

    Input is BGR, 0 to 255, less (104.008, 116.669, 122.675).

    Args:
        num_classes: 21 for Pascal VOC.
        depth: 101 as published; 50 or 152.
        rates: Of the head; (6, 12, 18, 24) is ASPP-L.
        msc: Run scales 1, 0.75 and 0.5 and take the maximum of their logits, as published.
        align_corners: Of all resizing; True is Caffe's. With False inputs are scaled to
            floor(0.75 H) rows, as a widespread PyTorch port has it.
        ceil_mode: Of the max pooling; Caffe's.
        stride_on: Where a block has its stride: the first ``"1x1"``, Caffe's, or the ``"3x3"``.
        frozen_norm: Batch normalisation keeps its statistics in training, as published.
        norm_momentum: Of batch normalisation, where it is not frozen.
        crf: Options of the :class:`pydense.nn.DenseCRF` behind it, such as ``CRF_RESNET``; None for
            none. It is run by :meth:`refine` and by ``predict(x, image=...)``.
        features_only: ``layer1`` to ``layer4``, of strides 4, 8, 8 and 8.
        reference: Plain torch.

    Source: L.-C. Chen et al., *DeepLab*, TPAMI 2018 (code: deeplab-public-ver2).
    """

    _head = ("aspp", "crf")

    def __init__(
        self,
        num_classes: int = 21,
        depth: int = 101,
        rates: tuple[int, ...] = RATES,
        *,
        msc: bool = True,
        align_corners: bool = True,
        ceil_mode: bool = True,
        stride_on: str = "1x1",
        frozen_norm: bool = True,
        norm_momentum: float = 0.001,
        crf: Mapping[str, Any] | None = None,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        self._set_up(msc, align_corners, crf)
        self.backbone = resnet.ResNet(
            depth,
            output_stride=8,
            stride_on=stride_on,
            ceil_mode=ceil_mode,
        )
        self.feature_channels = dict(resnet.CHANNELS)
        self.aspp = ASPPSum(resnet.CHANNELS["layer4"], num_classes, rates)
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of the four layers, scale 1."""
        maps: OrderedDict[str, Tensor] = self.backbone(x)
        return maps

    def forward_scale(self, x: Tensor) -> Tensor:
        """Logits of one scale."""
        logits: Tensor = self.aspp(self.features(x)["layer4"])
        return logits


class DeepLabV2VGG(_DeepLabV2):
    """DeepLab on an atrous VGG16: LargeFOV (v1 and v2) or ASPP (v2).

    LargeFOV has ``fc6`` (3x3, rate 12), ``fc7`` and ``fc8``; ASPP four such branches ``fc6_1`` to
    ``fc8_4``, whose scores are added. Children have Caffe's names. Input as of the ResNet.

    Args:
        num_classes: 21 for Pascal VOC.
        head: ``"large_fov"`` or ``"aspp"``.
        rates: Of the branches; (12,) and (6, 12, 18, 24) if left out.
        pool5a: The 3x3 average behind the last max pooling. Caffe's nets have it (padding counts as
            zeros); three PyTorch ports of the ASPP net do not, and name no checkpoint by it.
        msc: Run three scales and take the maximum of their logits; not published for VGG16.
        align_corners: Of all resizing; True is Caffe's.
        ceil_mode: Of the max pooling; Caffe's. Without it 320 rows become 40 instead of 41.
        crf: Options of a :class:`pydense.nn.DenseCRF`, such as ``CRF_VGG``; None for none.
        features_only: ``conv3_3``, ``conv4_3``, ``conv5_3``, of strides 4, 8 and 8.
        reference: Plain torch.

    Source: as of :class:`DeepLabV2ResNet`.
    """

    def __init__(
        self,
        num_classes: int = 21,
        head: str = "aspp",
        rates: tuple[int, ...] | None = None,
        *,
        pool5a: bool = True,
        msc: bool = False,
        align_corners: bool = True,
        ceil_mode: bool = True,
        crf: Mapping[str, Any] | None = None,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        op = "DeepLabV2VGG"
        check.choice(op, "head", head, _HEADS)
        check.flag(op, "pool5a", pool5a)
        self._set_up(msc, align_corners, crf)
        row = rates if rates is not None else RATES if head == "aspp" else (12,)
        if not row or (head == "large_fov" and len(row) > 1):
            raise ValueError(f"{op}: rates must be 1 or more, 1 for 'large_fov', got {rates!r}")
        vgg.add_convolutions(self, dilations=(1, 1, 1, 1, 2))
        self.pool = MaxPool(3, 1, ceil_mode)
        self.pool_same = vgg.MaxPoolSame(3)
        self.pool5a = nn.AvgPool2d(3, 1, 1) if pool5a else None
        self.feature_channels = {f"conv{i + 1}_3": vgg.CHANNELS[i] for i in (2, 3, 4)}
        self.suffixes = [""] if head == "large_fov" else [f"_{i + 1}" for i in range(len(row))]
        if not features_only:
            self.dropout = nn.Dropout(0.5)
            for suffix, rate in zip(self.suffixes, row, strict=True):
                self._add_branch(suffix, rate)
        self._finish(reference)

    def _add_branch(self, suffix: str, rate: int) -> None:
        layers = {
            "fc6": AtrousConv2d(vgg.CHANNELS[4], 1024, 3, padding=rate, dilation=rate),
            "fc7": nn.Conv2d(1024, 1024, 1),
            "fc8": nn.Conv2d(1024, self.num_classes, 1),
        }
        for name, layer in layers.items():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            self.add_module(f"{name}{suffix}", layer)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The last maps of the last three stages."""
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for stage in range(1, 6):
            x = vgg.run_stage(self, stage, x)
            if stage > 2:
                maps[f"conv{stage}_3"] = x
            if stage < 5:
                x = self.pool(x) if stage < 4 else self.pool_same(x)
        return maps

    def forward_scale(self, x: Tensor) -> Tensor:
        """Logits of one scale."""
        x = self.pool_same(self.features(x)["conv5_3"])
        if self.pool5a is not None:
            x = self.pool5a(x)
        total: Tensor | None = None
        for suffix in self.suffixes:
            branch = x
            for name in ("fc6", "fc7"):
                branch = self.dropout(getattr(self, name + suffix)(branch).relu_())
            score = getattr(self, f"fc8{suffix}")(branch)
            total = score if total is None else total + score
        assert total is not None
        return total


@register_model
def deeplab_v2_resnet101(num_classes: int = 21, **options: Any) -> DeepLabV2ResNet:
    """DeepLab v2, ResNet-101, ASPP-L, three scales: 44,048,532 parameters."""
    return DeepLabV2ResNet(num_classes, **options)


@register_model
def deeplab_v2_resnet101_single_scale(num_classes: int = 21, **options: Any) -> DeepLabV2ResNet:
    """The same net at one scale."""
    return DeepLabV2ResNet(num_classes, msc=False, **options)


@register_model
def deeplab_v2_resnet101_crf(num_classes: int = 21, **options: Any) -> DeepLabV2ResNet:
    """The same net, three scales, with its CRF."""
    return DeepLabV2ResNet(num_classes, crf=CRF_RESNET, **options)


@register_model
def deeplab_largefov_vgg16(num_classes: int = 21, **options: Any) -> DeepLabV2VGG:
    """DeepLab-LargeFOV: 20,505,429 parameters."""
    return DeepLabV2VGG(num_classes, "large_fov", **options)


@register_model
def deeplab_v2_vgg16(num_classes: int = 21, **options: Any) -> DeepLabV2VGG:
    """DeepLab v2, VGG16, ASPP-L: 37,877,652 parameters."""
    return DeepLabV2VGG(num_classes, "aspp", **options)


@register_model
def deeplab_v2_vgg16_crf(num_classes: int = 21, **options: Any) -> DeepLabV2VGG:
    """The same net with its CRF."""
    return DeepLabV2VGG(num_classes, "aspp", crf=CRF_VGG, **options)


@register_model
def deeplab_v2_vgg16_no_pool5a(num_classes: int = 21, **options: Any) -> DeepLabV2VGG:
    """The same as PyTorch ports have it, without ``pool5a``."""
    return DeepLabV2VGG(num_classes, "aspp", pool5a=False, **options)
