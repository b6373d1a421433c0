# SPDX-License-Identifier: Apache-2.0
"""MobileNet-v2 without its classifier, under torchvision's parameter names."""

from __future__ import annotations

from torch import Tensor, nn

# Expansion, channels, blocks, stride of the first.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
CHANNELS = tuple(stage[1] for stage in _STAGES)


def _finished(
    inputs: int, outputs: int, kernel_size: int, stride: int, groups: int
) -> list[nn.Module]:
    conv = nn.Conv2d(
        inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
    )
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)]


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection without activation; a skip where sizes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        rows: list[nn.Module] = []
        if expansion != 1:
            rows.append(nn.Sequential(*_finished(inputs, width, 1, 1, 1)))
        rows.append(nn.Sequential(*_finished(width, width, 3, stride, width)))
        rows += [nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*rows)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's result."""
        out: Tensor = self.conv(x)
        return x + out if self.skips else out


class MobileNetV2(nn.Module):
    """The convolutions up to 320 channels, output stride 32.

    Children are ``features.0`` (3x3, 32 channels) and the 17 inverted residuals ``features.1`` to
    ``features.17``, as torchvision's.
    """

    def __init__(self) -> None:
        super().__init__()
        rows: list[nn.Module] = [nn.Sequential(*_finished(3, 32, 3, 2, 1))]
        self.ends = []
        inputs = 32
        for expansion, channels, blocks, stride in _STAGES:
            for i in range(blocks):
                rows.append(InvertedResidual(inputs, channels, 1 if i else stride, expansion))
                inputs = channels
            self.ends.append(len(rows) - 1)
        self.features = nn.Sequential(*rows)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps behind each of the seven stages: 16, 24, 32, 64, 96, 160, 320 channels."""
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                maps.append(x)
        return maps
