# SPDX-License-Identifier: Apache-2.0
"""The trunk and the head that HRNet's networks share.

Source: J. Wang et al., *Deep High-Resolution Representation Learning for Visual Recognition*, TPAMI
2020 (code: HRNet-Semantic-Segmentation, branch pytorch-v1.1, and HRNet-Image-Classification;
parameters have their names).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn

from pydense.nn import UpsampleConcatConv1x1
from pydense.nn._operators import UsesOperators
from pydense.ops import _crf_arguments as check

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


def bottlenecks(inputs: int, width: int, blocks: int) -> nn.Sequential:
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
        out = self.bn2(self.conv2(out))
        out += x
        out = self.relu(out)
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


class HRNetTrunk(nn.Module):
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
        self.layer1 = bottlenecks(64, planes, blocks)
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


class HRNetHead(nn.Sequential):
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


def start_small(model: nn.Module, but: tuple[str, ...] = ()) -> None:
    """The published initial weights, but where a name has one of the words."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, UpsampleConcatConv1x1)) and not any(
            word in name for word in but
        ):
            nn.init.normal_(module.weight, std=0.001)
