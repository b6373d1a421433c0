# SPDX-License-Identifier: Apache-2.0
"""Fully convolutional networks: FCN-32s, 16s and 8s on VGG16, FCN on AlexNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pydense.nn import UpsampleCrop
from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check
from pydense.ops import bilinear_filler, crop_offset
from pydense.ops.coord_map import Conv, Deconv, Pool

from . import _vgg as vgg
from ._base import Frame, SegmentationModel
from ._narrow import local_response_norm
from ._pool import MaxPool
from ._registry import register_model

_UPSAMPLING = ("bilinear", "learned")
_DROPOUT = {"element": nn.Dropout, "channel": nn.Dropout2d}


class DeconvolutionCrop(nn.ConvTranspose2d):
    """Caffe's Deconvolution and Crop with a weight that learns, bilinear at first.

    Args:
        channels: Of input and output.
        stride: Of the deconvolution.
        kernel_size: Of the deconvolution.
        offset: Of the crop.
        groups: 1, as FCN stores the weight, or ``channels``.
    """

    def __init__(
        self, channels: int, stride: int, kernel_size: int, offset: int, groups: int = 1
    ) -> None:
        super().__init__(channels, channels, kernel_size, stride, bias=False, groups=groups)
        self.crop = UpsampleCrop(1, 1, offset=offset)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The bilinear filter."""
        filler = bilinear_filler(self.in_channels, tuple(self.kernel_size), groups=self.groups)
        with torch.no_grad():
            self.weight.copy_(filler)

    def forward(self, x: Tensor, like: Any) -> Tensor:  # type: ignore[override]
        """The crop, of the size of ``like``, a map or a size."""
        out: Tensor = self.crop(super().forward(x), like)
        return out


class _FCN(SegmentationModel):
    """What the nets share: the last upsampling, and logits of low resolution before it.

    Low-resolution logits are the last score map within a ring of zeros. Upsampled by the stride,
    as F.interpolate does it (with ``align_corners`` for an odd filter), they hold the crop of the
    bilinear deconvolution exactly; see :meth:`frame`.
    """

    _stride: int
    _kernel_size: int
    _offset: int
    upsampling: str
    final: str  # name of the last deconvolution

    def _add_final(
        self, name: str, stride: int, kernel_size: int, offset: int, **more: Any
    ) -> None:
        self._stride, self._kernel_size, self._offset = stride, kernel_size, offset
        self.final = name
        self.add_module(name, self._deconvolution(stride, kernel_size, offset, **more))

    def _deconvolution(self, stride: int, kernel_size: int, offset: int, **more: Any) -> nn.Module:
        if self.upsampling == "bilinear":
            return UpsampleCrop(stride, kernel_size, offset=offset)
        return DeconvolutionCrop(self.num_classes, stride, kernel_size, offset, **more)

    def score(self, x: Tensor) -> Tensor:
        """The last score map, before the last deconvolution."""
        raise NotImplementedError(type(self).__name__)

    def forward_low(self, x: Tensor) -> Tensor:
        """The last score map within zeros; with ``"learned"`` upsampling the logits themselves."""
        score = self.score(x)
        if self.upsampling == "bilinear":
            return pad(score, (1, 1, 1, 1))
        out: Tensor = self.get_submodule(self.final)(score, x)
        return out

    def frame(self, low: Tensor, size: tuple[int, int]) -> Frame:
        """Where the crop lies in :meth:`forward_low` upsampled by the stride."""
        if self.upsampling == "learned":
            return Frame(size)
        stride, odd = self._stride, self._kernel_size % 2
        rows, columns = (n - odd for n in low.shape[2:])
        first = self._offset + (1 if odd else stride // 2)
        return Frame((stride * rows + odd, stride * columns + odd), bool(odd), (first, first))

    def upsample(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """The crop of the deconvolution, and nothing beside it."""
        if self.upsampling == "learned":
            return low
        full: Tensor = self.operators.upsample_crop(
            low,
            stride=self._stride,
            kernel_size=self._kernel_size,
            offset=self._offset + self._stride,  # of the ring
            size=size,
        )
        return full

    def _check_options(self, upsampling: str, dropout: str, padding: int | None) -> int:
        op = type(self).__name__
        check.choice(op, "upsampling", upsampling, _UPSAMPLING)
        check.choice(op, "dropout", dropout, tuple(_DROPOUT))
        self.upsampling = upsampling
        if padding is None:
            return 1 if self.features_only else 100
        return check.integer(op, "padding", padding, 0, 1000)

    def _classifier(self, channels: int, kernel_size: int, width: int, dropout: str) -> None:
        self.fc6 = nn.Conv2d(channels, width, kernel_size)
        self.fc7 = nn.Conv2d(width, width, 1)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.drop6 = _DROPOUT[dropout]()
        self.drop7 = _DROPOUT[dropout]()
        self.score_fr = _score(width, self.num_classes)

    def _classify(self, x: Tensor) -> Tensor:
        x = self.drop6(self.fc6(x).relu_())
        x = self.drop7(self.fc7(x).relu_())
        out: Tensor = self.score_fr(x)
        return out

    def coordinate_offset(self, layers: Sequence[Any], reference: Sequence[Any] = ()) -> int:
        """The crop's offset; an integer, or the nets would not fit.

        Raises:
            ValueError: A padding with which it is none, or negative.
        """
        return int(crop_offset(list(layers), list(reference)))


def _score(inputs: int, outputs: int) -> nn.Conv2d:
    """Starts from zero, as the published nets."""
    layer = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class FCN(_FCN):
    """FCN-32s, FCN-16s and FCN-8s: VGG16 as a convolutional network, scores of several depths.

    Children have Caffe's names (``conv1_1``, ..., ``fc7``, ``score_fr``, ``score_pool4``,
    ``upscore2``, ...), and so checkpoints of the widespread PyTorch port load. Input is BGR, 0 to
    255, less (104.00698793, 116.66876762, 122.67891434).

    Args:
        num_classes: 21 for Pascal VOC.
        stride: Of the finest score map: 32, 16 or 8.
        at_once: The 8s net that is trained in one go: ``pool4`` and ``pool3`` are multiplied by
            0.01 and 0.0001 before they are scored.
        fc_channels: Of ``fc6`` and ``fc7``.
        padding: Of ``conv1_1``: 100 as published, which gives pictures of any size a score map and
            makes all crops whole; 1 for ``features_only``, so that maps lie over the picture.
        ceil_mode: Of the max pooling; Caffe's.
        dropout: Of single elements (``"element"``, Caffe) or of channels (``"channel"``, the
            PyTorch port).
        upsampling: ``"bilinear"``, fixed, as published: the deconvolutions have no parameters, and
            logits of full resolution exist only where they are asked for. ``"learned"``:
            deconvolutions of all channels with all, bilinear at first; :meth:`forward_low` then
            gives the logits of full resolution.
        features_only: ``pool3``, ``pool4``, ``pool5``.
        reference: Plain torch.

    Source: J. Long, E. Shelhamer, T. Darrell, *Fully Convolutional Networks for Semantic
    Segmentation*, CVPR 2015; shelhamer/fcn.berkeleyvision.org.
    """

    _head = (
        *("fc6", "fc7", "drop6", "drop7", "score_fr", "score_pool4", "score_pool3"),
        *("upscore", "upscore2", "upscore_pool4", "upscore16", "upscore8"),
    )

    def __init__(
        self,
        num_classes: int = 21,
        stride: int = 8,
        at_once: bool = False,
        *,
        fc_channels: int = 4096,
        padding: int | None = None,
        ceil_mode: bool = True,
        dropout: str = "element",
        upsampling: str = "bilinear",
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        op = "FCN"
        if stride not in (8, 16, 32):
            raise ValueError(f"{op}: stride must be 8, 16 or 32, got {stride!r}")
        check.flag(op, "at_once", at_once)
        check.flag(op, "ceil_mode", ceil_mode)
        margin = self._check_options(upsampling, dropout, padding)
        self.stride, self.at_once, self.ceil_mode = stride, at_once, ceil_mode
        vgg.add_convolutions(self, padding=margin)
        self.pool = MaxPool(2, ceil_mode=ceil_mode)
        self.feature_channels = {f"pool{i + 1}": vgg.CHANNELS[i] for i in (2, 3, 4)}
        if not features_only:
            self._classifier(vgg.CHANNELS[4], 7, fc_channels, dropout)
            self._add_heads(num_classes, stride, margin)
        self._finish(reference)

    def _add_heads(self, num_classes: int, stride: int, margin: int) -> None:
        stages = [[Conv(3, padding=1)] * n + [Pool(2, stride=2)] for n in vgg.CONVOLUTIONS]
        stages[0][0] = Conv(3, padding=margin)
        layers: list[Any] = [*stages, Conv(7)]
        final = "upscore" if stride == 32 else f"upscore{stride}"
        for scale, pooled, name in ((16, 4, "upscore2"), (8, 3, "upscore_pool4")):
            if scale < stride:
                break
            # From here the map of the pooling layer, its score cropped to the upsampled one.
            layers = [*layers, Deconv(4, stride=2)]
            offset = self.coordinate_offset(stages[:pooled], layers)
            self.add_module(name, self._deconvolution(2, 4, 0))
            self.add_module(f"score_pool{pooled}", _score(vgg.CHANNELS[pooled - 1], num_classes))
            self.add_module(f"crop_pool{pooled}", UpsampleCrop(1, 1, offset=offset))
        last = Deconv(2 * stride, stride=stride)
        self._add_final(final, stride, 2 * stride, self.coordinate_offset([*layers, last]))

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of the last three pooling layers."""
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for stage in range(1, 6):
            x = self.pool(vgg.run_stage(self, stage, x))
            if stage > 2:
                maps[f"pool{stage}"] = x
        return maps

    def score(self, x: Tensor) -> Tensor:
        """The finest score map."""
        maps = self.features(x)
        score = self._classify(maps["pool5"])
        steps = (("upscore2", "pool4", 0.01, 16), ("upscore_pool4", "pool3", 0.0001, 8))
        for name, source, factor, scale in steps:
            if scale < self.stride:
                break
            finer = maps[source] * factor if self.at_once else maps[source]
            finer = self.get_submodule(f"score_{source}")(finer)
            # The deconvolution's whole output, (n - 1) * 2 + 4.
            size = (2 * score.shape[2] + 2, 2 * score.shape[3] + 2)
            score = self.get_submodule(name)(score, size)
            score = score + self.get_submodule(f"crop_{source}")(finer, score)
        return score


class FCNAlexNet(_FCN):
    """FCN-AlexNet as NVIDIA's DIGITS 5 has it.

    Input is 0 to 255, less 116 in all channels, RGB as DIGITS feeds it.

    Args:
        num_classes: 21 for Pascal VOC.
        fc_channels: Of ``fc6`` and ``fc7``.
        padding: Of ``conv1``: 100 as published; 1 for ``features_only``.
        ceil_mode: Of the max pooling; Caffe's.
        norm_first: Local response normalisation before pooling, as in the ``bvlc_alexnet`` whose
            weights DIGITS transplants; behind it, as in DIGITS' net and in CaffeNet, if False.
        dropout: ``"element"`` or ``"channel"``.
        upsampling: ``"bilinear"`` or ``"learned"``, channel by channel; see :class:`FCN`.
        features_only: ``conv5`` and ``pool5``.
        reference: Plain torch.

    Source: NVIDIA/DIGITS, ``examples/semantic-segmentation``; the same nets' ``voc-fcn-alexnet``.
    """

    _head = ("fc6", "fc7", "drop6", "drop7", "score_fr", "upscore")

    def __init__(
        self,
        num_classes: int = 21,
        *,
        fc_channels: int = 4096,
        padding: int | None = None,
        ceil_mode: bool = True,
        norm_first: bool = False,
        dropout: str = "element",
        upsampling: str = "bilinear",
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        check.flag("FCNAlexNet", "norm_first", norm_first)
        check.flag("FCNAlexNet", "ceil_mode", ceil_mode)
        margin = self._check_options(upsampling, dropout, padding)
        self.norm_first = norm_first
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4, padding=margin)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = convolution(256, 384, 3, bias=True)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.pool = MaxPool(3, ceil_mode=ceil_mode)
        self.feature_channels = {"conv5": 256, "pool5": 256}
        if not features_only:
            self._classifier(256, 6, fc_channels, dropout)
            pool, same = Pool(3, stride=2), Conv(3, padding=1)
            layers = [Conv(11, stride=4, padding=margin), pool, Conv(5, padding=2), pool]
            layers += [same, same, same, pool, Conv(6)]
            offset = self.coordinate_offset([*layers, Deconv(63, stride=32)])
            self._add_final("upscore", 32, 63, offset, groups=num_classes)
        self._finish(reference)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The last maps of the convolutions."""
        norm, pool = local_response_norm, self.pool
        for conv in (self.conv1, self.conv2):
            x = conv(x).relu_()
            x = pool(norm(x)) if self.norm_first else norm(pool(x))
        for conv in (self.conv3, self.conv4, self.conv5):
            x = conv(x).relu_()
        return OrderedDict(conv5=x, pool5=self.pool(x))

    def score(self, x: Tensor) -> Tensor:
        """The score map of stride 32."""
        return self._classify(self.features(x)["pool5"])


@register_model
def fcn32s_vgg16(num_classes: int = 21, **options: Any) -> FCN:
    """FCN-32s: 136,152,917 parameters, 1,806,336 of them in the fixed deconvolution."""
    return FCN(num_classes, 32, **options)


@register_model
def fcn16s_vgg16(num_classes: int = 21, **options: Any) -> FCN:
    """FCN-16s: 134,815,994 parameters, 458,640 of them in the fixed deconvolutions."""
    return FCN(num_classes, 16, **options)


@register_model
def fcn8s_vgg16(num_classes: int = 21, **options: Any) -> FCN:
    """FCN-8s: 134,489,759 parameters, 127,008 of them in the fixed deconvolutions."""
    return FCN(num_classes, 8, **options)


@register_model
def fcn8s_atonce_vgg16(num_classes: int = 21, **options: Any) -> FCN:
    """FCN-8s trained at once: as FCN-8s (Caffe stores its two factors as 768 numbers more)."""
    return FCN(num_classes, 8, at_once=True, **options)


@register_model
def fcn_alexnet(num_classes: int = 21, **options: Any) -> FCNAlexNet:
    """FCN-AlexNet of DIGITS: 57,037,610 parameters, 83,349 in the fixed deconvolution."""
    return FCNAlexNet(num_classes, **options)
