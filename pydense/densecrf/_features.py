# SPDX-License-Identifier: Apache-2.0
"""Feature vectors of pixels: planar float32 (d, N), written in place.

All divisions are float32 by float32, as in the original: which simplex of the lattice a pixel falls
in depends on the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_positions(
    out: NDArray[np.float32],
    shape: Sequence[int],
    axes: Sequence[int],
    sigmas: NDArray[np.float32],
) -> None:
    """Write ``coordinate[axes[i]] / sigmas[i]`` of every pixel into row i.

    Args:
        out: (len(axes), N) C-contiguous, N the product of ``shape``.
        shape: Grid, slowest axis first.
        axes: Which coordinate goes into which row.
        sigmas: (len(axes),) positive.
    """
    for row, axis, sigma in zip(out, axes, sigmas, strict=True):
        steps = _divide(np.arange(shape[axis], dtype=np.float32), sigma)
        lying = [1] * len(shape)
        lying[axis] = shape[axis]
        row.reshape(shape)[...] = steps.reshape(lying)


def write_channels(
    out: NDArray[np.float32], channels: NDArray[Any], sigmas: NDArray[np.float32]
) -> None:
    """Write ``channels[c] / sigmas[c]`` into row c.

    Args:
        out: (C, N) C-contiguous.
        channels: (C, ...) with N elements behind the first axis; any real dtype, any strides.
        sigmas: (C,) positive.
    """
    for row, channel, sigma in zip(out, channels, sigmas, strict=True):
        _divide(channel, sigma, row.reshape(channel.shape))


def _divide(
    values: NDArray[Any], sigma: np.float32, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    # The explicit dtype keeps NumPy 1.x from choosing float16 for uint8 / scalar. Tiny sigmas
    # overflow to inf here; the lattice rejects those features with the others that are out of its
    # range.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        quotient: NDArray[np.float32] = np.divide(
            values, sigma, out=out, dtype=np.float32, casting="same_kind"
        )
    return quotient
