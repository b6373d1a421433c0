# SPDX-License-Identifier: Apache-2.0
"""HRNet: segmentation, object-contextual representations (OCR), and the ImageNet classifier.

Sources: J. Wang et al., *Deep High-Resolution Representation Learning for Visual Recognition*,
TPAMI 2020; Y. Yuan et al., *Object-Contextual Representations for Semantic Segmentation*, ECCV 2020
(code: HRNet-Semantic-Segmentation, branches pytorch-v1.1 and HRNet-OCR, HRNet-Image-Classification;
parameters have their names).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pydense.nn import UpsampleConcatConv1x1
from pydense.nn._operators import UsesOperators, use_operators
from pydense.ops import _crf_arguments as check

from ._base import SegmentationModel
from ._registry import register_model
from ._resnet import Bottleneck


class HRNetWidth(NamedTuple):
    """Width and depth of a published network.

    Attributes:
        channels: Of the branch at a quarter of the input; each coarser one has twice as many.
        stem: Bottleneck blocks of stage 1, and their inner channels.
        modules: Exchange modules of stages 2, 3 and 4.
        blocks: Basic blocks of each branch of a module.
    """

    channels: int
    stem: tuple[int, int] = (4, 64)
    modules: tuple[int, int, int] = (1, 4, 3)
    blocks: int = 4


WIDTHS = {
    "w18_small_v1": HRNetWidth(16, (1, 32), (1, 1, 1), 2),  # 16, whatever its name says
    "w18_small_v2": HRNetWidth(18, (2, 64), (1, 3, 2), 2),
    "w18": HRNetWidth(18),
    "w32": HRNetWidth(32),
    "w40": HRNetWidth(40),
    "w48": HRNetWidth(48),
}


def _conv_norm(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _conv_norm_relu(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(inputs, outputs, kernel_size, stride), nn.ReLU(inplace=True))


def _bottlenecks(inputs: int, width: int, blocks: int) -> nn.Sequential:
    outputs = width * Bottleneck.expansion
    first = Bottleneck(inputs, width, 1, 1, "3x3", inputs != outputs)
    others = [Bottleneck(outputs, width, 1, 1, "3x3", False) for _ in range(1, blocks)]
    return nn.Sequential(first, *others)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(channels, channels, 3)
        self.conv2, self.bn2 = _conv_norm(channels, channels, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)) + x)
        return out


class HighResolutionModule(UsesOperators, nn.Module):
    """Branches of basic blocks at several resolutions, and an exchange between all of them.

    The sums of the exchange are one pass each (:func:`pydense.ops.fuse_sum_upsample`).

    Args:
        channels: Of each branch, finest first.
        blocks: Of each branch.
        align_corners: Of the upsampling of coarser branches.
        mode: ``"bilinear"`` or ``"nearest"``.
    """

    def __init__(
        self,
        channels: Sequence[int],
        blocks: int,
        align_corners: bool = False,
        mode: str = "bilinear",
    ) -> None:
        super().__init__()
        self.align_corners, self.mode = align_corners, mode
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(c) for _ in range(blocks))) for c in channels
        )
        count = len(channels)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_exchange(channels, j, i) for j in range(count)) for i in range(count)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the same sizes and channels."""
        own = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        return [
            self.operators.fuse_sum_upsample(
                [layer(x) for layer, x in zip(cast(nn.ModuleList, row), own, strict=True)],
                tuple(own[i].shape[2:]),
                relu=True,
                align_corners=self.align_corners,
                mode=self.mode,
            )
            for i, row in enumerate(self.fuse_layers)
        ]


def _exchange(channels: Sequence[int], source: int, target: int) -> nn.Module:
    """From a branch to another: 1x1 to a finer one, 3x3 with stride 2 to each coarser one."""
    inputs, outputs = channels[source], channels[target]
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(*_conv_norm(inputs, outputs, 1))
    steps = [_conv_norm_relu(inputs, inputs, 3, 2) for _ in range(target - source - 1)]
    return nn.Sequential(*steps, nn.Sequential(*_conv_norm(inputs, outputs, 3, 2)))


class _Trunk(nn.Module):
    """Stem and stages, as children of the network itself, where checkpoints have them."""

    def _add_trunk(
        self, op: str, width: str | HRNetWidth, align_corners: bool, mode: str
    ) -> list[int]:
        if not isinstance(width, HRNetWidth):
            check.choice(op, "width", width, tuple(WIDTHS))
            width = WIDTHS[width]
        check.flag(op, "align_corners", align_corners)
        check.choice(op, "fuse_mode", mode, ("bilinear", "nearest"))
        if align_corners and mode == "nearest":
            raise ValueError(f"{op}: align_corners must be False for fuse_mode 'nearest', got True")
        first, (blocks, planes), modules, branch_blocks = width
        self.conv1, self.bn1 = _conv_norm(3, 64, 3, 2)
        self.conv2, self.bn2 = _conv_norm(64, 64, 3, 2)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _bottlenecks(64, planes, blocks)
        before = [planes * Bottleneck.expansion]
        for index, count in enumerate(modules):
            channels = [first << k for k in range(index + 2)]
            self.add_module(f"transition{index + 1}", _transition(before, channels))
            stage = [
                HighResolutionModule(channels, branch_blocks, align_corners, mode)
                for _ in range(count)
            ]
            self.add_module(f"stage{index + 2}", nn.Sequential(*stage))
            before = channels
        return before

    def _maps(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        maps = [self.layer1(x)]
        for index in (1, 2, 3):
            layers = cast(nn.ModuleList, getattr(self, f"transition{index}"))
            maps = [layer(maps[min(i, len(maps) - 1)]) for i, layer in enumerate(layers)]
            maps = getattr(self, f"stage{index + 1}")(maps)
        return maps

    def _set_momentum(self, momentum: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum


def _transition(before: Sequence[int], channels: Sequence[int]) -> nn.ModuleList:
    """3x3 where a branch changes its width; the new one is made from the coarsest, stride 2."""
    rows: list[nn.Module] = []
    for i, outputs in enumerate(channels):
        if i >= len(before):
            rows.append(nn.Sequential(_conv_norm_relu(before[-1], outputs, 3, 2)))
        elif before[i] != outputs:
            rows.append(_conv_norm_relu(before[i], outputs, 3))
        else:
            rows.append(nn.Identity())
    return nn.ModuleList(rows)


class _Head(nn.Sequential):
    """1x1 convolution of all maps at the finest size, batch normalisation, ReLU, convolution."""

    def __init__(
        self, channels: Sequence[int], num_classes: int, align_corners: bool, kernel_size: int = 1
    ) -> None:
        inputs = sum(channels)
        super().__init__(
            UpsampleConcatConv1x1(channels, inputs, align_corners=align_corners),
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, num_classes, kernel_size, padding=kernel_size // 2),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits at the size of the first map."""
        concat, norm, relu, classify = self
        out: Tensor = classify(relu(norm(concat(maps))))
        return out


class HRNet(_Trunk, SegmentationModel):
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
        self.last_layer = _Head(channels, num_classes, align_corners, final_kernel_size)
        _start_small(self)
        self._set_momentum(norm_momentum)
        self._finish(reference)

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps ``"0"`` (C channels, a quarter of the input) to ``"3"`` (8 C, 1/32)."""
        return OrderedDict((str(i), y) for i, y in enumerate(self._maps(x)))

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, ceil(H / 4), ceil(W / 4))."""
        out: Tensor = self.last_layer(self._maps(x))
        return out


def _start_small(model: nn.Module, but: tuple[str, ...] = ()) -> None:
    """The published initial weights, but where a name has one of the words."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, UpsampleConcatConv1x1)) and not any(
            word in name for word in but
        ):
            nn.init.normal_(module.weight, std=0.001)


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


class HRNetOCR(_Trunk, SegmentationModel):
    """HRNet with object-contextual representations.

    Auxiliary logits weigh the pixels of each class' region; each pixel then attends to the regions'
    means. The loss is that of the auxiliary logits with 0.4 and of the main ones with 1.

    Args:
        num_classes: Number of logits for each pixel.
        width: See :class:`HRNet`.
        align_corners: Of all upsampling; True in the published configurations.
        fuse_mode: See :class:`HRNet`.
        norm_momentum: Of batch normalisation in the trunk; the head has torch's 0.1.
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
        norm_momentum: float = 0.1,
        channels: int = 512,
        key_channels: int = 256,
        dropout: float = 0.05,
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(num_classes, features_only)
        row = self._add_trunk("HRNetOCR", width, align_corners, fuse_mode)
        self._set_momentum(norm_momentum)
        self.align_corners = align_corners
        self.feature_channels = {str(i): c for i, c in enumerate(row)}
        self.conv3x3_ocr = nn.Sequential(
            nn.Conv2d(sum(row), channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.ocr_distri_head = _Distribute(channels, key_channels, dropout)
        self.cls_head = nn.Conv2d(channels, num_classes, 1)
        self.aux_head = _Head(row, num_classes, align_corners)
        _start_small(self, but=("cls", "aux", "ocr"))
        self._finish(reference)

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


class HRNetClassifier(_Trunk, UsesOperators):
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
            _bottlenecks(c, p, 1) for c, p in zip(channels, planes, strict=True)
        )
        self.downsamp_modules = nn.ModuleList(
            _with_bias(wide[i], wide[i + 1], 3, 2) for i in range(3)
        )
        self.final_layer = _with_bias(wide[3], 2048, 1, 1)
        self.classifier = nn.Linear(2048, check.integer(op, "num_classes", num_classes, 1, 2**20))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._set_momentum(norm_momentum)
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


@register_model
def hrnet_ocr_w18(num_classes: int = 19, **options: Any) -> HRNetOCR:
    """HRNet-W18 with OCR; options of :class:`HRNetOCR`."""
    return HRNetOCR(num_classes, "w18", **options)


@register_model
def hrnet_ocr_w48(num_classes: int = 19, **options: Any) -> HRNetOCR:
    """HRNet-W48 with OCR."""
    return HRNetOCR(num_classes, "w48", **options)
