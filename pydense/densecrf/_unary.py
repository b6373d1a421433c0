# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803
# The argument names are pydensecrf's and part of the interface (N803).
"""Unary energies as objects, for ``DenseCRF.setUnary``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pydense.densecrf import _validate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Unary:
    """Base class of unary energies: an (L, N) table of costs, lower is likelier.

    Unlike pydensecrf, which moves the object's content into the first model it is given to, one
    object can serve any number of models.
    """

    _energy: NDArray[np.float32]

    def __init__(self) -> None:
        raise TypeError("Unary: must be made as ConstUnary or LogisticUnary, got Unary()")


class ConstUnary(Unary):
    """A fixed table of energies, usually -log p.

    Args:
        u: (L, N) real numbers, copied. +inf forbids a label at a point.

    Raises:
        ValueError: ``u`` is not two-dimensional. Values are checked by ``setUnary``.
        TypeError: ``u`` does not hold real numbers.
    """

    def __init__(self, u: ArrayLike) -> None:
        self._energy = _matrix("ConstUnary", "u", u).copy()


class LogisticUnary(Unary):
    """A linear (logistic regression) energy, ``u = L @ f``.

    Args:
        L: (labels, D) weights.
        f: (D, N) features of the points.

    Raises:
        ValueError: The shapes do not fit each other or an entry is NaN or infinite.
        TypeError: An argument does not hold real numbers.
    """

    def __init__(self, L: ArrayLike, f: ArrayLike) -> None:
        self._energy = logistic_energy("LogisticUnary", "L", L, f)


def logistic_energy(op: str, name: str, weights: ArrayLike, f: ArrayLike) -> NDArray[np.float32]:
    """``weights @ f`` in float32, both checked; ``name`` is what the caller calls the weights."""
    left = _matrix(op, name, weights)
    right = _matrix(op, "f", f)
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"{op}: {name} (labels, D) and f (D, points) must agree in D, "
            f"got {left.shape} and {right.shape}"
        )
    for label, array in ((name, left), ("f", right)):
        if not _validate.all_finite(array):
            raise ValueError(f"{op}: {label} must be finite, got NaN or inf in it")
    with np.errstate(over="ignore", invalid="ignore"):  # setUnary looks at the result
        energy: NDArray[np.float32] = left @ right
    return energy


def _matrix(op: str, name: str, value: ArrayLike) -> NDArray[np.float32]:
    array = _validate.numbers(op, name, value)
    if array.ndim != 2:
        raise ValueError(f"{op}: {name} must be two-dimensional, got shape {array.shape}")
    return _validate.float32(array)
