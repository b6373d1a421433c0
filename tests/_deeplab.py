# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3's head as torchvision builds it, and numbers for batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ASPPConv(nn.Sequential):
    def __init__(self, channels: int, outputs: int, rate: int) -> None:
        super().__init__(
            nn.Conv2d(channels, outputs, 3, padding=rate, dilation=rate, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class ASPPPooling(nn.Sequential):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return functional.interpolate(out, x.shape[2:], mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    def __init__(self, channels: int, rates: tuple[int, ...], outputs: int = 256) -> None:
        super().__init__()
        first = nn.Sequential(
            nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        atrous = [ASPPConv(channels, outputs, rate) for rate in rates]
        self.convs = nn.ModuleList([first, *atrous, ASPPPooling(channels, outputs)])
        self.project = nn.Sequential(
            nn.Conv2d(len(self.convs) * outputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([conv(x) for conv in self.convs], 1))


def fill_norms(model: nn.Module, scale: float = 1.0) -> None:
    """Statistics and parameters that a trained model may have; ``scale`` of their factors."""
    generator = torch.Generator().manual_seed(5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.1, generator)
            nn.init.uniform_(norm.running_var, 0.5, 1.5, generator)
            nn.init.uniform_(norm.weight, 0.5 * scale, 1.5 * scale, generator)
            nn.init.normal_(norm.bias, 0, 0.1, generator)
