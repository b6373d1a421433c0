# SPDX-License-Identifier: Apache-2.0
"""ResNet with what segmentation networks change in it, under torchvision's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from pydense.nn.atrous_conv import convolution
from pydense.ops import _crf_arguments as check

from ._pool import MaxPool

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
CHANNELS = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a skip."""

    expansion = 4

    def __init__(
        self, inputs: int, width: int, stride: int, dilation: int, stride_on: str, project: bool
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        outputs = width * self.expansion
        self.conv1 = convolution(inputs, width, 1, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, second, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    """ResNet-50, 101 or 152 without its classifier.

    Args:
        depth: 50, 101 or 152.
        output_stride: 32, 16 or 8: layers that would go beyond it are dilated instead.
        stem: ``"plain"``, one 7x7 convolution of 64 channels; ``"deep"``, three 3x3 ones of 64, 64
            and 128 (PSPNet).
        stride_on: ``"3x3"`` of a block, as PyTorch's networks ("v1.5"), or its first ``"1x1"``, as
            the original in Caffe (DeepLab v2).
        ceil_mode: Of the max pooling, as in Caffe.
        first_dilation: Of a dilated layer's first block: that of the layer before (``"previous"``,
            torchvision) or the layer's ``"own"`` (DeepLab v2, PSPNet).

    The children have torchvision's names; a deep stem has conv1, bn1, ..., conv3, bn3.
    """

    def __init__(
        self,
        depth: int,
        *,
        output_stride: int = 32,
        stem: str = "plain",
        stride_on: str = "3x3",
        ceil_mode: bool = False,
        first_dilation: str = "own",
    ) -> None:
        super().__init__()
        op = "ResNet"
        if depth not in LAYERS:
            raise ValueError(f"{op}: depth must be 50, 101 or 152, got {depth!r}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"{op}: output_stride must be 8, 16 or 32, got {output_stride!r}")
        check.choice(op, "stem", stem, ("plain", "deep"))
        check.choice(op, "stride_on", stride_on, ("3x3", "1x1"))
        check.choice(op, "first_dilation", first_dilation, ("own", "previous"))
        check.flag(op, "ceil_mode", ceil_mode)
        self.stem = stem
        channels = self._add_stem(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool(3, 1, ceil_mode)
        dilation, reached = 1, 4
        for index, blocks in enumerate(LAYERS[depth]):
            stride = 1 if index == 0 else 2
            previous = dilation
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            first = previous if first_dilation == "previous" else dilation
            layer = _layer(channels, 64 << index, blocks, stride, (first, dilation), stride_on)
            self.add_module(f"layer{index + 1}", layer)
            channels = (64 << index) * Bottleneck.expansion
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _add_stem(self, stem: str) -> int:
        if stem == "plain":
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            return 64
        for i, (inputs, outputs) in enumerate(((3, 64), (64, 64), (64, 128))):
            self.add_module(f"conv{i + 1}", convolution(inputs, outputs, 3, 1 if i else 2))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(outputs))
        return 128

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps of ``layer1`` to ``layer4``."""
        for i in range(1 if self.stem == "plain" else 3):
            x = self.relu(getattr(self, f"bn{i + 1}")(getattr(self, f"conv{i + 1}")(x)))
        x = self.maxpool(x)
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for name in CHANNELS:
            x = getattr(self, name)(x)
            maps[name] = x
        return maps


def _layer(
    inputs: int, width: int, blocks: int, stride: int, dilations: Sequence[int], stride_on: str
) -> nn.Sequential:
    outputs = width * Bottleneck.expansion
    project = stride > 1 or inputs != outputs
    rows = [Bottleneck(inputs, width, stride, dilations[0], stride_on, project)]
    for _ in range(1, blocks):
        rows.append(Bottleneck(outputs, width, 1, dilations[1], stride_on, False))
    return nn.Sequential(*rows)
