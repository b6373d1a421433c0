# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803
# The argument names are pydensecrf's and part of the interface (N803).
"""Drop-in for ``pydensecrf.utils``: unary energies from labels or softmax, features of grids.

Pixels are in C order (last axis fastest) everywhere. The feature functions put the coordinates in
array order, so (y, x) for an image, where ``DenseCRF2D`` uses (x, y): see ``pydense.densecrf``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pydense.densecrf import _features, _validate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "compute_unary",
    "create_pairwise_bilateral",
    "create_pairwise_gaussian",
    "softmax_to_unary",
    "unary_from_labels",
    "unary_from_softmax",
]


def unary_from_labels(
    labels: ArrayLike, n_labels: int, gt_prob: float, zero_unsure: bool = True
) -> NDArray[np.float32]:
    """Energies of an annotation that is right with probability ``gt_prob``.

    The annotated label costs -log(gt_prob); the others share the rest, so each costs
    -log((1 - gt_prob) / (n_labels - 1)).

    Args:
        labels: Label map of any shape, integers. With ``zero_unsure`` 0 stands for "unknown"
            (uniform) and labels are 1..n_labels, otherwise labels are 0..n_labels - 1.
        n_labels: Number of labels, the unknown one not counted.
        gt_prob: Within (0, 1).
        zero_unsure: Whether 0 means unknown.

    Returns:
        (n_labels, N) float32.

    Raises:
        ValueError: A label outside the range (the original wraps negative ones), ``gt_prob``
            outside (0, 1), ``n_labels`` below 1.
        TypeError: ``labels`` or ``n_labels`` are not integers.
    """
    op = "unary_from_labels"
    count = _validate.integer(op, "n_labels", n_labels, 1)
    probability = _number(op, "gt_prob", gt_prob)
    if not 0 < probability < 1:
        raise ValueError(f"{op}: gt_prob must be in (0, 1), got {gt_prob!r}")
    array = _validate.numbers(op, "labels", labels)
    if array.dtype.kind == "f":
        raise TypeError(f"{op}: labels must be integers, got dtype {array.dtype}")
    first, last = (0, count) if zero_unsure else (0, count - 1)
    if array.size and not first <= int(array.min()) <= int(array.max()) <= last:
        raise ValueError(
            f"{op}: labels must be in [{first}, {last}] for {count} labels with zero_unsure="
            f"{bool(zero_unsure)}, got [{int(array.min())}, {int(array.max())}]"
        )
    flat = array.ravel().astype(np.int64)
    # A single label takes all the probability there is: no other label's energy to compute.
    other = -math.log((1.0 - probability) / (count - 1)) if count > 1 else 0.0
    energy = np.full((count, flat.size), other, dtype=np.float32)
    points = np.arange(flat.size)
    if not zero_unsure:
        energy[flat, points] = -math.log(probability)
        return energy
    known = flat > 0
    energy[flat[known] - 1, points[known]] = -math.log(probability)
    energy[:, ~known] = math.log(count)
    return energy


def unary_from_softmax(
    sm: ArrayLike, scale: float | None = None, clip: float | None = 1e-5
) -> NDArray[np.float32]:
    """Energies -log p of class probabilities.

    Args:
        sm: (L, ...) probabilities, classes first; the other axes are flattened.
        scale: Trust in the probabilities, within (0, 1]: they become
            ``scale * sm + (1 - scale) / L``. None for full trust.
        clip: Probabilities below are raised to it (and those above 1 lowered to 1), so that no
            energy is infinite. None leaves them alone: zeros become +inf, which forbids the label.

    Returns:
        (L, N) float32.

    Raises:
        ValueError: ``scale`` outside (0, 1], ``clip`` outside [0, 1], ``sm`` without axes, NaN in
            it, or negative where nothing clips it.
        TypeError: An argument is no real number.
    """
    op = "unary_from_softmax"
    array = _validate.numbers(op, "sm", sm)
    if array.ndim < 1 or array.shape[0] < 1:
        raise ValueError(f"{op}: sm must have shape (classes, ...), got {array.shape}")
    if array.dtype == np.float16:
        array = array.astype(np.float32)  # 1e-5 is below its normal range
    if scale is not None:
        trust = _number(op, "scale", scale)
        if not 0 < trust <= 1:
            raise ValueError(f"{op}: scale must be in (0, 1], got {scale!r}")
        array = trust * array.astype(np.float64) + (1 - trust) / array.shape[0]
    if clip is not None:
        floor = _number(op, "clip", clip)
        if not 0 <= floor <= 1:
            raise ValueError(f"{op}: clip must be in [0, 1], got {clip!r}")
        array = np.clip(array, floor, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        energy: NDArray[Any] = np.negative(np.log(array))
    if np.isnan(energy).any():
        raise ValueError(f"{op}: sm must hold probabilities, got NaN or negative numbers")
    return _validate.float32(energy.reshape(array.shape[0], -1))


def compute_unary(labels: ArrayLike, M: int, GT_PROB: float = 0.5) -> NDArray[np.float32]:
    """Deprecated: ``unary_from_labels(labels, M, GT_PROB)``."""
    _deprecated("compute_unary", "unary_from_labels")
    return unary_from_labels(labels, M, GT_PROB)


def softmax_to_unary(sm: ArrayLike, GT_PROB: float = 1) -> NDArray[np.float32]:
    """Deprecated: ``unary_from_softmax(sm, scale, clip=None)``, scale None for a GT_PROB of 1."""
    _deprecated("softmax_to_unary", "unary_from_softmax")
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def create_pairwise_gaussian(sdims: ArrayLike, shape: Sequence[int]) -> NDArray[np.float32]:
    """Features of a smoothness kernel on a grid: ``coordinate[i] / sdims[i]``.

    Args:
        sdims: Standard deviation per axis of ``shape``, in pixels, or one number for all.
        shape: The grid, any number of axes, in array order: (h, w) for an image.

    Returns:
        (len(shape), N) float32 for ``DenseCRF.addPairwiseEnergy``.

    Raises:
        ValueError: Not one positive finite sigma per axis; an empty shape or an axis below 1.
        TypeError: An argument is no number.
    """
    op = "create_pairwise_gaussian"
    grid = tuple(_validate.integer(op, "shape", size, 1) for size in shape)
    if not grid:
        raise ValueError(f"{op}: shape must have at least one axis, got ()")
    spatial = _validate.sigmas(op, "sdims", sdims, len(grid))
    features = np.empty((len(grid), math.prod(grid)), np.float32)
    _features.write_positions(features, grid, range(len(grid)), spatial)
    return features


def create_pairwise_bilateral(
    sdims: ArrayLike, schan: ArrayLike, img: ArrayLike, chdim: int = -1
) -> NDArray[np.float32]:
    """Features of an appearance kernel: scaled coordinates, then scaled channels.

    Args:
        sdims: Standard deviation per grid axis, in pixels, or one number for all.
        schan: Standard deviation per channel, in the image's own units, or one number for all.
        img: The image, any number of axes, any real dtype.
        chdim: Which axis of ``img`` holds the channels: 2 for (h, w, 3). -1, the default, means
            that there is none.

    Returns:
        (axes + channels, N) float32 for ``DenseCRF.addPairwiseEnergy``.

    Raises:
        ValueError: Sigmas that are not positive, finite and one per axis or channel; an empty
            image; NaN or inf in it; no such ``chdim``.
        TypeError: An argument is no number.
    """
    op = "create_pairwise_bilateral"
    image = _validate.numbers(op, "img", img)
    axis = _validate.integer(op, "chdim", chdim, -image.ndim)
    if axis >= image.ndim:
        raise ValueError(f"{op}: chdim must be an axis of img or -1, got {axis} for {image.shape}")
    channels = image[np.newaxis] if axis == -1 else np.moveaxis(image, axis, 0)
    grid = channels.shape[1:]
    if not grid or not channels.size:
        raise ValueError(f"{op}: img must hold at least one pixel, got shape {image.shape}")
    if image.dtype.kind == "f" and not _validate.all_finite(image):
        raise ValueError(f"{op}: img must be finite, got NaN or inf in it")
    spatial = _validate.sigmas(op, "sdims", sdims, len(grid))
    colour = _validate.sigmas(op, "schan", schan, len(channels))
    features = np.empty((len(grid) + len(channels), math.prod(grid)), np.float32)
    _features.write_positions(features[: len(grid)], grid, range(len(grid)), spatial)
    _features.write_channels(features[len(grid) :], channels, colour)
    return features


def _number(op: str, name: str, value: ArrayLike) -> float:
    array = _validate.numbers(op, name, value)
    if array.ndim:
        raise TypeError(f"{op}: {name} must be a number, got shape {array.shape}")
    return float(array)


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated, use {new}", DeprecationWarning, stacklevel=3)
