# SPDX-License-Identifier: Apache-2.0
"""What the tests of the segmentation heads share: shapes, targets, the error budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (N, C, h, w) and (H, W): scales from 1/5 to 13, whole and broken, one pixel, one class, tails of
# vectors and tiles.
SHAPES = [
    ((2, 21, 7, 9), (33, 41)),
    ((1, 3, 5, 5), (5, 5)),
    ((2, 19, 16, 20), (64, 80)),
    ((1, 150, 9, 8), (36, 33)),
    ((2, 1, 3, 4), (10, 12)),
    ((1, 5, 40, 50), (13, 7)),
    ((1, 33, 1, 1), (9, 9)),
    ((1, 7, 9, 1), (1, 30)),
    ((3, 17, 30, 31), (31, 61)),
    ((1, 2, 3, 40), (39, 521)),
    ((1, 16, 13, 70), (26, 140)),
    ((2, 6, 1, 5), (40, 9)),
]


def scores(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Logits in float64 whose float32 and 16-bit copies are the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).bfloat16().double()


def targets(
    images: int, size: Sequence[int], classes: int, ignored: int = 255, seed: int = 1
) -> Tensor:
    """Labels of which a tenth is ignored, in patches and single."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, *size)
    labels = torch.randint(classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.1] = ignored
    labels[:, : size[0] // 6, : size[1] // 2] = ignored
    return labels


def assert_in_budget(
    got: Tensor,
    exact: Tensor,
    rival: Callable[[], Tensor],
    floor: float,
    name: object = "",
    unit: float = 1e-30,
) -> None:
    """The error against float64 is at most twice torch's own in that dtype, plus a floor.

    Args:
        got: The result.
        exact: The same in float64.
        rival: Computes torch's result in the dtype of the input.
        floor: Relative to the largest number of ``exact``, or to ``unit`` where that is larger.
        name: Said where it fails.
        unit: Size of the terms whose sum may be 0.
    """
    assert got.shape == exact.shape, name
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    torchs = (rival().double() - exact).abs().max().item()
    limit = 2 * torchs + floor * max(exact.abs().max().item(), unit)
    assert error <= limit, (name, error, torchs, limit)
