# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the drop-in: every function returns clean float32 data or raises.

TypeError is for things that are no numbers at all, ValueError for numbers that cannot be used.
Texts have the form ``op: name must ..., got ...``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pydense.densecrf._enums import KernelType, NormalizationType

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float32]
    Normalization = Literal["none", "before", "after", "symmetric"]

# Messages are compat * (row sum of K) and a row sum is at most the number of points: with this
# bound no sum over labels and kernels comes near the largest float32, so no inf - inf can appear in
# a softmax.
MAX_COMPAT = 1e20

_NORMALIZATION_NAMES: dict[NormalizationType, Normalization] = {
    NormalizationType.NO_NORMALIZATION: "none",
    NormalizationType.NORMALIZE_BEFORE: "before",
    NormalizationType.NORMALIZE_AFTER: "after",
    NormalizationType.NORMALIZE_SYMMETRIC: "symmetric",
}


# The core counts iterations in 32 bits and labels up to this many.
MAX_ITERATIONS = 2**31 - 1
MAX_LABELS = 65536


def integer(op: str, name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """An int of at least ``minimum``; floats and strings are TypeErrors, as for any index."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {_kind(value)}") from None
    if number < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {number}")
    if maximum is not None and number > maximum:
        raise ValueError(f"{op}: {name} must be at most {maximum}, got {number}")
    return number


def numbers(op: str, name: str, value: ArrayLike) -> NDArray[Any]:
    """``value`` as a real-valued array of any dtype and strides (no copy where none is needed)."""
    array = np.asarray(value)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{op}: {name} must hold real numbers, got {_kind(value)} ({array.dtype})")
    return array


def float32(array: NDArray[Any]) -> FloatArray:
    """``array`` in float32; what does not fit becomes infinite without a warning."""
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(np.float32, copy=False)


def all_finite(array: NDArray[Any]) -> bool:
    """Whether no element is NaN or infinite, in one read of the array in the usual case."""
    # A finite sum proves it. Only a sum that overflowed needs the element-wise look.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.add.reduce(array, axis=None)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


def sigmas(op: str, name: str, value: ArrayLike, count: int) -> FloatArray:
    """``count`` positive finite standard deviations; a scalar stands for all of them.

    A value above the float32 range becomes inf, which makes its feature 0 everywhere: the limit of
    a huge sigma.
    """
    array = numbers(op, name, value).astype(np.float64)
    if array.ndim == 0:
        array = np.full(count, array)
    if array.shape != (count,):
        raise ValueError(
            f"{op}: {name} must be a number or {count} numbers, got an array of shape {array.shape}"
        )
    small = float32(array)
    if not (np.isfinite(array).all() and (small > 0).all()):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value!r}")
    return small


def compatibility(op: str, value: ArrayLike, nlabels: int) -> FloatArray:
    """The label compatibility as (), (L,) or symmetric (L, L) float32."""
    array = numbers(op, "compat", value)
    if array.shape not in ((), (nlabels,), (nlabels, nlabels)):
        raise ValueError(
            f"{op}: compat must be a number or have shape ({nlabels},) or ({nlabels}, {nlabels}) "
            f"for {nlabels} labels, got shape {array.shape}"
        )
    wide = array.astype(np.float64)
    if not (np.abs(wide) <= MAX_COMPAT).all():  # False for NaN as well
        raise ValueError(
            f"{op}: compat must be finite (at most {MAX_COMPAT:g} in size), "
            f"got {_first(wide, ~(np.abs(wide) <= MAX_COMPAT))}"
        )
    if wide.ndim == 2:
        wide = 0.5 * (wide + wide.T)  # as the original: only the symmetric part is an energy
    return float32(wide)


def unary(op: str, name: str, value: ArrayLike, nlabels: int, nvar: int) -> FloatArray:
    """A (nlabels, nvar) float32 energy; +inf forbids a label, but some label must stay possible."""
    array = numbers(op, name, value)
    if array.shape != (nlabels, nvar):
        raise ValueError(
            f"{op}: {name} must have shape (nlabels, nvar) = ({nlabels}, {nvar}), got {array.shape}"
            + _unary_hint(array.shape, nlabels, nvar)
        )
    energy = float32(array)
    if not all_finite(energy):
        lowest = energy.min(axis=0)  # NaN propagates; +inf only where every label has it
        if not np.isfinite(lowest).all():
            point = int(np.flatnonzero(~np.isfinite(lowest))[0])
            raise ValueError(
                f"{op}: {name} must hold no NaN, no -inf and a finite energy for some label "
                f"of every point, got {energy[:, point].tolist()} at point {point}"
            )
    return energy


def features(op: str, value: ArrayLike, nvar: int) -> FloatArray:
    """Finite float32 features of shape (d, nvar), d >= 1."""
    array = numbers(op, "features", value)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] != nvar:
        hint = "; transpose it" if array.ndim == 2 and array.shape[0] == nvar else ""
        raise ValueError(
            f"{op}: features must have shape (d, nvar) = (d, {nvar}), got {array.shape}{hint}"
        )
    small = float32(array)
    if not all_finite(small):
        bad = _first(array, ~np.isfinite(small))
        raise ValueError(f"{op}: features must be finite float32 numbers, got {bad}")
    return small


def marginals(op: str, value: ArrayLike, nlabels: int, nvar: int) -> NDArray[Any]:
    """A (nlabels, nvar) array of probabilities (not copied, not required to sum to 1)."""
    array = numbers(op, "Q", value)
    if array.shape != (nlabels, nvar):
        raise ValueError(
            f"{op}: Q must have shape (nlabels, nvar) = ({nlabels}, {nvar}), got {array.shape}"
        )
    # One read instead of a minimum and a maximum: entries in [0, 1] have a sum of squares of at
    # most L * N, and that bound (10 % for rounding) is all that the update needs to stay finite.
    with np.errstate(over="ignore", invalid="ignore"):
        flat = array.ravel(order="K")
        squares = float(np.einsum("i,i->", flat, flat))
    if not squares <= 1.1 * array.size:
        raise ValueError(f"{op}: Q must hold probabilities, got numbers outside [0, 1] or NaN")
    return array


def image(op: str, name: str, value: ArrayLike, height: int, width: int) -> NDArray[Any]:
    """An image of shape (height, width, C) as a channels-first view (C, height, width)."""
    array = numbers(op, name, value)
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    if array.ndim != 3 or array.shape[:2] != (height, width) or array.shape[2] < 1:
        hint = ""
        if array.ndim == 3 and array.shape[:2] == (width, height):
            hint = "; DenseCRF2D takes (w, h, nlabels), width first"
        raise ValueError(
            f"{op}: {name} must have shape (h, w) or (h, w, channels) with h = {height}, "
            f"w = {width}, got {np.shape(value)}{hint}"
        )
    if array.dtype.kind == "f" and not all_finite(array):
        raise ValueError(f"{op}: {name} must be finite, got NaN or inf in it")
    return np.moveaxis(array, 2, 0)


def normalization(op: str, value: object) -> Normalization:
    """The core's name of a NormalizationType or of its integer value."""
    number = integer(op, "normalization", value, 0)
    if number not in _NORMALIZATION_NAMES:
        raise ValueError(
            f"{op}: normalization must be one of {_members(NormalizationType)}, got {number}"
        )
    return _NORMALIZATION_NAMES[NormalizationType(number)]


def kernel(op: str, value: object) -> None:
    """Check a KernelType or its integer value."""
    number = integer(op, "kernel", value, 0)
    if number >= len(KernelType):
        raise ValueError(f"{op}: kernel must be one of {_members(KernelType)}, got {number}")


def _unary_hint(shape: Sequence[int], nlabels: int, nvar: int) -> str:
    """What probably went wrong, for the three mistakes people make."""
    if tuple(shape) == (nvar, nlabels):
        return "; transpose it"
    if len(shape) > 2 and shape[0] == nlabels and int(np.prod(shape[1:])) == nvar:
        return "; flatten the pixels with u.reshape(nlabels, -1)"
    if len(shape) > 2 and shape[-1] == nlabels and int(np.prod(shape[:-1])) == nvar:
        return "; put labels first with np.moveaxis(u, -1, 0).reshape(nlabels, -1)"
    return " (nvar is w * h, pixels in row order; DenseCRF2D takes width first)"


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _first(array: NDArray[Any], mask: NDArray[np.bool_]) -> object:
    return array[mask].flat[0]


def _members(enum: type[NormalizationType] | type[KernelType]) -> str:
    return ", ".join(f"{member.name} ({member.value})" for member in enum)
