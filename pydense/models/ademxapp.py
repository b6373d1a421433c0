# SPDX-License-Identifier: Apache-2.0
"""Wider ResNet-38: models A, A1 and A2 for ImageNet, and FCRN, the segmentation form.

Sources: Z. Wu, C. Shen, A. van den Hengel, *Wider or Deeper: Revisiting the ResNet Model for Visual
Recognition*, 2016 (code: ademxapp); S. Rota Bulo, L. Porzi, P. Kontschieder, *In-Place Activated
BatchNorm*, CVPR 2018 (A2; code: inplace_abn, whose names the trunk's parameters have).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, max_pool2d, pad

from pydense.nn import AtrousConv2d
from pydense.nn._operators import UsesOperators, use_operators
from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check

from ._base import SegmentationModel, set_norm_momentum
from ._pool import MaxPool
from ._registry import register_model

# Of levels 2 to 7: channels of a block's convolutions, and blocks.
_CHANNELS = ((128, 128), (256, 256), (512, 512), (512, 1024), (512, 1024, 2048), (1024, 2048, 4096))
_BLOCKS = (3, 3, 6, 3, 1, 1)
# What halves the size in front of levels 2 to 6: a pool, or the stride of the level's first block.
_DOWNSAMPLING = {"A": "ppppp", "A1": "sssss", "A2": "ppsss"}
_DROPOUT = {"element": nn.Dropout, "channel": nn.Dropout2d}
# The authors', changed on purpose from 1e-5.
_EPS = 1.001e-5


class _NormReLU(nn.BatchNorm2d):
    """Batch normalisation and the activation; parameters have the names of the former."""

    negative_slope = 0.0

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = super().forward(input)
        return leaky_relu(out, self.negative_slope) if self.negative_slope else out.relu()


class IdentityResidualBlock(nn.Module):
    """Batch normalisation, ReLU, convolution, two or three times, beside a skip.

    Where the size or the number of channels changes, the skip is a 1x1 convolution of the activated
    input. Two convolutions are 3x3, three are 1x1, 3x3, 1x1.

    Args:
        inputs: Channels of the input.
        channels: Of each convolution.
        stride: Of the first convolution.
        dilations: Of the first and of the other 3x3 convolutions.
        dropout: Before the last convolution.
        dropout_kind: Of single elements (``"element"``) or of channels (``"channel"``).
    """

    def __init__(
        self,
        inputs: int,
        channels: Sequence[int],
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
        dropout: float = 0.0,
        dropout_kind: str = "element",
    ) -> None:
        super().__init__()
        sizes = (3, 3) if len(channels) == 2 else (1, 3, 1)
        rows = OrderedDict[str, nn.Module]()
        before = inputs
        for i, (outputs, size) in enumerate(zip(channels, sizes, strict=True)):
            if i:
                rows[f"bn{i + 1}"] = _NormReLU(before)
            if dropout and i == len(channels) - 1:
                rows["dropout"] = _DROPOUT[dropout_kind](dropout)
            first = i == 0
            rows[f"conv{i + 1}"] = convolution(
                before, outputs, size, stride if first else 1, dilations[0 if first else 1]
            )
            before = outputs
        self.bn1 = _NormReLU(inputs)
        self.convs = nn.Sequential(rows)
        project = stride > 1 or inputs != before
        self.proj_conv = convolution(inputs, before, 1, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        active = self.bn1(x)
        out: Tensor = self.convs(active)
        return out + (x if self.proj_conv is None else self.proj_conv(active))


class _DilatedPool(nn.Module):
    """Max pooling 3x3 of stride 1; torch's own pads by no more than half a window."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        return max_pool2d(pad(x, (d, d, d, d), value=-torch.inf), 3, 1, dilation=d)


class _Trunk(nn.Module):
    """``mod1`` to ``mod7`` and ``bn_out``, as children of the network itself."""

    def _add_trunk(
        self,
        op: str,
        variant: str,
        output_stride: int,
        *,
        first_dilation: str,
        dropout: tuple[float, float],
        dropout_kind: str,
        pool_padding: int,
        ceil_mode: bool,
        norm_eps: float,
        negative_slope: float,
        blocks: Sequence[int],
        width: float,
    ) -> list[int]:
        check.choice(op, "variant", variant, tuple(_DOWNSAMPLING))
        if output_stride not in (8, 16, 32):
            raise ValueError(f"{op}: output_stride must be 8, 16 or 32, got {output_stride!r}")
        check.choice(op, "first_dilation", first_dilation, ("previous", "own"))
        check.choice(op, "dropout_kind", dropout_kind, tuple(_DROPOUT))
        check.integer(op, "pool_padding", pool_padding, 0, 1)
        check.flag(op, "ceil_mode", ceil_mode)
        if len(blocks) != len(_CHANNELS):
            raise ValueError(f"{op}: blocks must be {len(_CHANNELS)} numbers, got {blocks!r}")
        before = max(1, round(64 * width))
        conv = nn.Conv2d(3, before, 3, padding=1, bias=False)
        self.mod1 = nn.Sequential(OrderedDict(conv1=conv))
        ends = []
        dilation = reached = 1
        for level, count in enumerate(blocks, 2):
            channels = [max(1, round(c * width)) for c in _CHANNELS[level - 2]]
            way = _DOWNSAMPLING[variant][level - 2] if level < 7 else "none"
            previous, halves = dilation, 2 * reached <= output_stride
            if way != "none":
                reached, dilation = (2 * reached, dilation) if halves else (reached, 2 * dilation)
            if way == "p":
                pool = MaxPool(3, pool_padding, ceil_mode) if halves else _DilatedPool(previous)
                self.add_module(f"pool{level}", pool)
            first = previous if way == "s" and first_dilation == "previous" else dilation
            rows = OrderedDict[str, nn.Module]()
            for i in range(check.integer(op, "blocks", count, 1, 1000)):
                rows[f"block{i + 1}"] = IdentityResidualBlock(
                    before,
                    channels,
                    2 if way == "s" and halves and i == 0 else 1,
                    (first if i == 0 else dilation, dilation),
                    dropout[level - 6] if level >= 6 else 0.0,
                    dropout_kind,
                )
                before = channels[-1]
            self.add_module(f"mod{level}", nn.Sequential(rows))
            ends.append(before)
        self.bn_out = _NormReLU(before)
        for module in self.modules():
            if isinstance(module, _NormReLU):
                module.eps, module.negative_slope = norm_eps, negative_slope
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return ends

    def _levels(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The maps of levels 2 to 7, the last activated."""
        x = self.mod1(x)
        for level in range(2, 8):
            pool = self._modules.get(f"pool{level}")
            x = getattr(self, f"mod{level}")(x if pool is None else pool(x))
            yield f"mod{level}", self.bn_out(x) if level == 7 else x


class WiderResNet38(_Trunk, UsesOperators):
    """Models A, A1 and A2 for ImageNet.

    Input: RGB, ImageNet mean and standard deviation.

    Args:
        num_classes: Of the pictures.
        variant: What halves the size in front of levels 2 to 6: ``"A"``, max pooling 3x3; ``"A1"``,
            the stride of the level's first convolution and of its skip; ``"A2"``, pools twice, then
            strides.
        output_stride: 32, 16 or 8: levels that would go beyond it are dilated.
        first_dilation: Of the first convolution of a dilated level that has no pool: that of the
            level before (``"previous"``, ademxapp) or the level's ``"own"`` (inplace_abn).
        dropout: Before the last convolutions of levels 6 and 7; published A2 have (0.3, 0.5).
        dropout_kind: Of single elements (``"element"``, ademxapp) or of channels (``"channel"``,
            inplace_abn).
        pool_padding: 1, or 0 with ``ceil_mode`` as in the MXNet that model A was trained with.
        ceil_mode: Of the pooling.
        norm_eps: Of batch normalisation; inplace_abn has 1e-5.
        norm_momentum: Of batch normalisation.
        negative_slope: Of the activation; 0.01 in networks trained with inplace_abn's own.
        blocks: Of levels 2 to 7; inplace_abn's Wider ResNet-16 has (1, 1, 1, 1, 1, 1), its 20
            (1, 1, 1, 3, 1, 1).
        width: Factor of all channels.
        reference: Build the twin in plain torch.

    Shape:
        - x: (N, 3, H, W).
        - output: (N, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        variant: str = "A1",
        *,
        output_stride: int = 32,
        first_dilation: str = "previous",
        dropout: tuple[float, float] = (0.0, 0.0),
        dropout_kind: str = "element",
        pool_padding: int = 1,
        ceil_mode: bool = False,
        norm_eps: float = _EPS,
        norm_momentum: float = 0.1,
        negative_slope: float = 0.0,
        blocks: Sequence[int] = _BLOCKS,
        width: float = 1.0,
        reference: bool = False,
    ) -> None:
        super().__init__()
        op = "WiderResNet38"
        check.integer(op, "num_classes", num_classes, 1, 2**20)
        check.flag(op, "reference", reference)
        channels = self._add_trunk(
            op,
            variant,
            output_stride,
            first_dilation=first_dilation,
            dropout=dropout,
            dropout_kind=dropout_kind,
            pool_padding=pool_padding,
            ceil_mode=ceil_mode,
            norm_eps=norm_eps,
            negative_slope=negative_slope,
            blocks=blocks,
            width=width,
        )
        self.classifier = nn.Sequential(OrderedDict(fc=nn.Linear(channels[-1], num_classes)))
        set_norm_momentum(op, self, norm_momentum)
        use_operators(self, "reference" if reference else "pydense")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes of a picture."""
        for _, y in self._levels(x):
            x = y
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


class FCRN(_Trunk, SegmentationModel):
    """A dilated model A, A1 or A2 with two atrous convolutions on top ("2 conv." of the paper).

    Input: RGB, ImageNet mean and standard deviation. The authors test on pictures that are padded
    with zeros to a multiple of the stride and shifted by half of it, and resize probabilities.

    Args:
        num_classes: Number of logits for each pixel.
        variant: See :class:`WiderResNet38`.
        output_stride: Of the logits.
        first_dilation: See :class:`WiderResNet38`.
        dropout: Before the last convolutions of levels 6 and 7.
        dropout_kind: See :class:`WiderResNet38`.
        head_channels: Of the first convolution of the head.
        head_dilation: Of both.
        pool_padding: See :class:`WiderResNet38`.
        ceil_mode: See :class:`WiderResNet38`.
        norm_eps: See :class:`WiderResNet38`.
        norm_momentum: Of batch normalisation, where it is not frozen.
        negative_slope: See :class:`WiderResNet38`.
        blocks: See :class:`WiderResNet38`.
        width: Factor of all channels of the trunk.
        align_corners: Of the upsampling of the logits.
        frozen_norm: Batch normalisation keeps its statistics in training, as the authors' did. Give
            False to train a trunk that starts at random.
        features_only: Make the maps of levels 3 to 7 only.
        reference: Build the twin in plain torch.
    """

    _head = ("conv6a", "linear")

    def __init__(
        self,
        num_classes: int,
        variant: str = "A1",
        *,
        output_stride: int = 8,
        first_dilation: str = "previous",
        dropout: tuple[float, float] = (0.3, 0.5),
        dropout_kind: str = "element",
        head_channels: int = 512,
        head_dilation: int = 12,
        pool_padding: int = 1,
        ceil_mode: bool = False,
        norm_eps: float = _EPS,
        norm_momentum: float = 0.1,
        negative_slope: float = 0.0,
        blocks: Sequence[int] = _BLOCKS,
        width: float = 1.0,
        align_corners: bool = False,
        frozen_norm: bool = True,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        op = "FCRN"
        check.flag(op, "align_corners", align_corners)
        channels = self._add_trunk(
            op,
            variant,
            output_stride,
            first_dilation=first_dilation,
            dropout=dropout,
            dropout_kind=dropout_kind,
            pool_padding=pool_padding,
            ceil_mode=ceil_mode,
            norm_eps=norm_eps,
            negative_slope=negative_slope,
            blocks=blocks,
            width=width,
        )
        self.align_corners = align_corners
        self.feature_channels = {f"mod{i}": channels[i - 2] for i in range(3, 8)}
        d = head_dilation
        self.conv6a = AtrousConv2d(channels[-1], head_channels, 3, padding=d, dilation=d)
        self.linear = AtrousConv2d(head_channels, num_classes, 3, padding=d, dilation=d)
        self._finish(reference, frozen_norm, norm_momentum)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps ``"mod3"`` to ``"mod7"``, the last activated."""
        return OrderedDict(list(self._levels(x))[1:])

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, ceil(H / 8), ceil(W / 8)), or by another ``output_stride``."""
        for _, y in self._levels(x):
            x = y
        out: Tensor = self.linear(self.conv6a(x).relu())
        return out


_INPLACE_ABN = {"first_dilation": "own", "norm_eps": 1e-5, "dropout_kind": "channel"}


def wider_resnet38_a(num_classes: int = 1000, **options: Any) -> WiderResNet38:
    """Model A; options of :class:`WiderResNet38`."""
    return WiderResNet38(num_classes, "A", **options)


def wider_resnet38_a1(num_classes: int = 1000, **options: Any) -> WiderResNet38:
    """Model A1."""
    return WiderResNet38(num_classes, "A1", **options)


def wider_resnet38_a2(num_classes: int = 1000, **options: Any) -> WiderResNet38:
    """Model A2 as inplace_abn has it, with ReLU."""
    own = {**_INPLACE_ABN, "dropout": (0.3, 0.5)}
    return WiderResNet38(num_classes, "A2", **cast(dict[str, Any], own | options))


@register_model
def fcrn_a1(num_classes: int = 21, **options: Any) -> FCRN:
    """FCRN on model A1, output stride 8; options of :class:`FCRN`."""
    return FCRN(num_classes, "A1", **options)


@register_model
def fcrn_a2(num_classes: int = 19, **options: Any) -> FCRN:
    """FCRN on model A2 (the paper's for Cityscapes), dilated as inplace_abn does.

    Its dropout is of channels, too.
    """
    return FCRN(num_classes, "A2", **cast(dict[str, Any], _INPLACE_ABN | options))
