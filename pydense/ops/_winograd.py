# SPDX-License-Identifier: Apache-2.0
"""Which 3x3 convolutions Winograd's algorithm serves, dilated or not, and with which tiles.

At rate r an output reads pixels of its own phase grid alone, (y mod r, x mod r): r * r plain 3x3
convolutions. Tiles of m x m outputs take (m + 2)^2 multiplications for each pair of channels
instead of 9 m^2, in float32 with an error (rms) that grows with m: about 1.7, 6 and 10 times a
direct convolution's for m = 2, 3 and 4. The tests hold it to ``ERROR``.
"""

from __future__ import annotations

from functools import lru_cache

import torch

TILES = (2, 3, 4)
ERROR = {2: 2.5, 3: 8.0, 4: 14.0}  # times a direct convolution's
# Least channels, and outputs, on which Winograd was measured faster than the best of torch.
MIN_CHANNELS = {2: 128, 3: 64, 4: 64}
# Transforming the weights takes as long as multiplying them by so many tiles; Winograd runs where
# it has at most this share of the work of a direct convolution that skips padding.
WEIGHT_TILES = 100
MAX_SHARE = 0.91


def winograd_wins(
    channels: int, outputs: int, rate: int, dtype: torch.dtype, tile: int = 2
) -> tuple[bool, str]:
    """Whether a dense 3x3 convolution of stride 1 with padding = rate is best done by Winograd.

    By what is known without sizes: on maps that are too small for their rate the operator itself
    takes a direct convolution (:func:`best_tile`).

    Args:
        channels: Of the picture.
        outputs: Channels of the result.
        rate: Dilation and padding.
        dtype: Of picture and weight.
        tile: The largest tile that is allowed.
    """
    if dtype != torch.float32:
        return False, f"Winograd's transforms are made for float32, not {dtype}"
    least = min(channels, outputs)
    if least < MIN_CHANNELS[tile]:
        return False, (
            f"with {least} channels, less than {MIN_CHANNELS[tile]}, "
            "Winograd's transforms take longer than what it saves"
        )
    share = (tile + 2) ** 2 / (9 * tile**2)
    grids = f" on {rate * rate} phase grids" if rate > 1 else ""
    return True, (
        f"Winograd F({tile}x{tile}, 3x3){grids}: {share:.0%} of the multiplications, on maps that "
        "are not too small for the rate"
    )


def phase_tiles(size: int, rate: int, tile: int) -> int:
    """Tiles of all phase grids of an axis."""
    if rate >= size:
        return size
    whole = (size - 1) // (rate * tile)
    return whole * rate + min(size - whole * rate * tile, rate)


def share_of_direct(batch: int, height: int, width: int, rate: int, tile: int) -> float:
    """Multiplications, and those that the weights cost, beside a direct convolution's."""
    share = float((tile + 2) ** 2)
    tiles = batch
    for size in (height, width):
        taps = size + 2 * max(0, size - rate)  # that read the map, of three for each pixel
        each = phase_tiles(size, rate, tile)
        share *= each / taps
        tiles *= each
    return share * (1 + WEIGHT_TILES / tiles)


@lru_cache(maxsize=1024)
def best_tile(batch: int, height: int, width: int, rate: int, largest: int) -> int | None:
    """The tile of those up to ``largest`` that leaves the least, or None: a direct convolution."""
    shares = [(share_of_direct(batch, height, width, rate, t), t) for t in TILES if t <= largest]
    share, tile = min(shares)
    return tile if share <= MAX_SHARE else None
