# SPDX-License-Identifier: Apache-2.0
"""Colours for labels: the Pascal VOC colour map, and blending labels over a photo."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def voc_colors(ids: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return the Pascal VOC colour of every label.

    The map deals the bits of the label in turn to red, green and blue, the lowest three to the
    top bit of each channel, the next three to the bit below it, and so on. So label 0 is black,
    1 is dark red, 2 dark green, and neighbouring labels never look alike.

    Args:
        ids: labels in 0..2**24-1, any shape.

    Returns:
        uint8 array of shape `ids.shape + (3,)`.
    """
    import numpy as np

    wide = np.asarray(ids, dtype=np.int64)[..., None]
    channels = np.zeros((*wide.shape[:-1], 3), dtype=np.int64)
    for group in range(8):
        channels |= ((wide >> (3 * group + np.arange(3))) & 1) << (7 - group)
    colors: NDArray[np.uint8] = channels.astype(np.uint8)
    return colors


def blend(image: NDArray[np.uint8], colors: NDArray[np.uint8], opacity: float) -> NDArray[np.uint8]:
    """Mix label colours into a photo: `(1 - opacity) * image + opacity * colors`.

    Args:
        image: uint8 (H, W, 3).
        colors: uint8 (H, W, 3).
        opacity: 0 shows the photo alone, 1 the labels alone.

    Returns:
        uint8 (H, W, 3), computed in fixed point with 8 fractional bits.
    """
    import numpy as np

    weight = np.uint16(round(256 * opacity))
    mixed = image.astype(np.uint16) * (np.uint16(256) - weight) + colors.astype(np.uint16) * weight
    blended: NDArray[np.uint8] = ((mixed + np.uint16(128)) >> np.uint16(8)).astype(np.uint8)
    return blended


def draw_borders(
    picture: NDArray[np.uint8], labels: NDArray[np.integer], color: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Return a copy of `picture` with the pixels on the border between two labels painted.

    Args:
        picture: uint8 (H, W, 3).
        labels: integers (H, W).
        color: RGB of the line, one pixel wide: the pixel right of or below a border.
    """
    import numpy as np

    border = np.zeros(labels.shape, dtype=np.bool_)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    painted: NDArray[np.uint8] = picture.copy()
    painted[border] = color
    return painted
