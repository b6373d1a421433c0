# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the upsampling functions; sizes may be symbolic."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

import torch
from torch import Tensor

from . import _crf_arguments as check

MAX_SIZE = 2**31 - 65
MAX_INPUTS = 16
_MAX_OFFSET = 10**12


def picture(op: str, name: str, value: object, devices: Sequence[str] = ("cpu", "cuda")) -> Tensor:
    """A floating-point tensor (N, C, H, W) with C, H and W at least 1."""
    tensor = check.floating(op, name, value, (4,), devices)
    if tensor.shape[2] < 1 or tensor.shape[3] < 1:
        raise ValueError(f"{op}: {name} must have H and W >= 1, got {check.shape(tensor)}")
    return tensor


def pictures(op: str, value: object) -> list[Tensor]:
    """Up to 16 of them, alike in dtype, device, batch and channels."""
    row = check.sequence(op, "inputs", value, "tensors")
    if not 1 <= len(row) <= MAX_INPUTS:
        raise ValueError(f"{op}: inputs must be 1 to {MAX_INPUTS} tensors, got {len(row)}")
    tensors = [picture(op, f"inputs[{index}]", item) for index, item in enumerate(row)]
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: inputs[{index}] must be of dtype {first.dtype} as the first, "
                f"got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: inputs[{index}] must be on {first.device} as the first, got {tensor.device}"
            )
        if tensor.shape[0] != first.shape[0] or tensor.shape[1] != first.shape[1]:
            raise ValueError(
                f"{op}: inputs[{index}] must have shape ({first.shape[0]}, {first.shape[1]}, H, W) "
                f"as the first, got {check.shape(tensor)}"
            )
    return tensors


def size(op: str, name: str, value: Any) -> tuple[int, int]:
    """(height, width) from one number or two, each at least 1."""
    row = [
        operator.index(n) if isinstance(n, Integral) and not isinstance(n, int) else n
        for n in _two(op, name, value)
    ]
    for number in row:
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must hold integers, got {value!r}")
        if number < 1:  # an upper bound would become a constraint of exported programs
            raise ValueError(f"{op}: {name} must be at least 1, got {value!r}")
    return row[0], row[1]


def pair(op: str, name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Two integers from one or two."""
    y, x = _two(op, name, value)
    return check.integer(op, name, y, minimum, MAX_SIZE), check.integer(
        op, name, x, minimum, MAX_SIZE
    )


def scale_factors(op: str, value: Any) -> tuple[float, float]:
    """Two positive finite numbers from one or two."""
    row = _two(op, "scale_factor", value)
    for number in row:
        if isinstance(number, bool) or not isinstance(number, (Real, torch.SymFloat)):
            raise TypeError(f"{op}: scale_factor must hold real numbers, got {value!r}")
        if not 0 < float(number) <= MAX_SIZE:
            raise ValueError(
                f"{op}: scale_factor must be positive and at most {MAX_SIZE}, got {value!r}"
            )
    return float(row[0]), float(row[1])


def crop_shifts(
    op: str, strides: tuple[int, int], kernel_size: Any, padding: Any, offset: Any
) -> tuple[float, float]:
    """The sums offset + padding - (kernel_size - 1) / 2 of both axes, rounded once."""
    kernels = pair(op, "kernel_size", kernel_size, 1)
    paddings = pair(op, "padding", padding, 0)
    offsets = [exact(op, "offset", value) for value in _two(op, "offset", offset)]
    for kernel, stride in zip(kernels, strides, strict=True):
        if kernel not in (2 * stride, 2 * stride - 1):
            raise ValueError(
                f"{op}: kernel_size must be 2 * stride or 2 * stride - 1, with which the bilinear "
                f"filter interpolates, got {kernel} for stride {stride}; use conv_transpose2d"
            )
    y, x = (
        float(o + p - Fraction(k - 1, 2))
        for o, p, k in zip(offsets, paddings, kernels, strict=True)
    )
    return y, x


def exact(op: str, name: str, value: Any) -> Fraction:
    """A real number as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must hold real numbers, got {check.kind(value)}")
    if isinstance(value, Integral):
        value = operator.index(value)
    elif not isinstance(value, Rational):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    fraction = Fraction(value)
    if abs(fraction) > _MAX_OFFSET:
        raise ValueError(f"{op}: {name} must be within {_MAX_OFFSET}, got {value}")
    return fraction


def _two(op: str, name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"{op}: {name} must be a number or (y, x), got {value!r}")
        return value
    return value, value
