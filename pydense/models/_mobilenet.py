# SPDX-License-Identifier: Apache-2.0
"""MobileNet-v2 without its classifier, under the names that Light-Weight RefineNet gave it."""

from __future__ import annotations

from torch import Tensor, nn

# Expansion, channels, blocks and stride of layer2 to layer8.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
CHANNELS = {i + 2: stage[1] for i, stage in enumerate(_STAGES)}
"""Of the layers, by number."""


def _finished(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection without activation; a skip where sizes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.skips = stride == 1 and inputs == outputs
        self.output = nn.Sequential(
            _finished(inputs, width, 1),
            _finished(width, width, 3, stride, width),
            _finished(width, outputs, 1)[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's result."""
        out: Tensor = self.output(x)
        return x + out if self.skips else out


def layers() -> list[nn.Sequential]:
    """``layer1`` (3x3, 32 channels) to ``layer8`` (320 channels), output stride 32.

    The first block expands too (32 to 32 channels), where torchvision's has no such convolution.
    """
    rows, inputs = [_finished(3, 32, 3, 2)], 32
    for expansion, outputs, blocks, stride in _STAGES:
        stage = []
        for block in range(blocks):
            stage.append(InvertedResidual(inputs, outputs, expansion, 1 if block else stride))
            inputs = outputs
        rows.append(nn.Sequential(*stage))
    return rows
