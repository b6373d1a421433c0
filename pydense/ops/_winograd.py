# SPDX-License-Identifier: Apache-2.0
"""Which atrous convolutions Winograd's algorithm serves, and how they run.

At rate r an output reads pixels of its own phase grid alone, (y mod r, x mod r): r * r plain 3x3
convolutions. Tiles of m x m outputs take (m + 2)^2 multiplications for each pair of channels
instead of 9 m^2, in float32 with an error (rms, relative to a direct convolution's) that grows with
m; the tests hold it to ``ERROR``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._memory_format import empty_picture

_OPS = torch.ops.pydense
TILES = (2, 3, 4)
ERROR = {2: 2.5, 3: 8.0, 4: 14.0}  # times a direct convolution's
MIN_CHANNELS = 64
# Tiles reach beyond the grids they cut, direct convolutions skip padding: Winograd runs where it
# has at most this share of the multiplications that a direct convolution cannot skip.
MAX_SHARE = 0.75


def winograd_wins(
    channels: int, outputs: int, rate: int, dtype: torch.dtype, tile: int = 2
) -> tuple[bool, str]:
    """Whether a dense 3x3 convolution of stride 1 with padding = rate is best done by Winograd.

    By what is known without sizes: on maps that are too small for their rate the operator itself
    takes a direct convolution (:func:`fits`).
    """
    if dtype != torch.float32:
        return False, f"Winograd's transforms are made for float32, not {dtype}"
    least = min(channels, outputs)
    if least < MIN_CHANNELS:
        return False, f"with {least} channels, transforms take longer than what Winograd saves"
    share = (tile + 2) ** 2 / (9 * tile**2)
    return True, (
        f"Winograd F({tile}x{tile}, 3x3) on {rate * rate} phase grids: "
        f"{share:.0%} of the multiplications"
    )


def phase_tiles(size: int, rate: int, tile: int) -> int:
    """Tiles of all phase grids of an axis."""
    if rate >= size:
        return size
    whole = (size - 1) // (rate * tile)
    return whole * rate + min(size - whole * rate * tile, rate)


def share_of_direct(height: int, width: int, rate: int, tile: int) -> float:
    """Multiplications beside those of a direct convolution that skips padding."""
    share = float((tile + 2) ** 2)
    for size in (height, width):
        taps = size + 2 * max(0, size - rate)  # that read the map, of three for each pixel
        share *= phase_tiles(size, rate, tile) / taps
    return share


def fits(height: int, width: int, rate: int, tile: int) -> bool:
    """Whether a map is large enough for its rate."""
    return share_of_direct(height, width, rate, tile) <= MAX_SHARE


def convolve(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rate: int,
    relu: bool,
    flipped: bool,
    tile: int,
) -> Tensor:
    """The operator: relu(scale * conv + bias); sizes are plain numbers here."""
    height, width = x.shape[2:]
    outputs = weight.shape[1 if flipped else 0]
    if x.numel() == 0 or fits(height, width, rate, tile):
        out = empty_picture(x, height, width, channels=outputs)
        _OPS._winograd_atrous_conv2d(out, x, weight, scale, bias, rate, relu, flipped, tile)
        return out
    return direct(x, weight, scale, bias, rate, relu, flipped)


def direct(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rate: int,
    relu: bool,
    flipped: bool,
) -> Tensor:
    """The same by torch's convolution."""
    kernel = weight.transpose(0, 1).flip(2, 3) if flipped else weight
    of_torch = None if scale is not None else bias
    made = torch.nn.functional.conv2d(x, kernel, of_torch, padding=rate, dilation=rate)
    out = empty_picture(x, *x.shape[2:], channels=made.shape[1]).copy_(made)
    if scale is not None:
        out.mul_(scale[:, None, None])
        if bias is not None:
            out.add_(bias[:, None, None])
    return out.relu_() if relu else out
