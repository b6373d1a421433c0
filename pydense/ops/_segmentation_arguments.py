# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the segmentation heads: TypeError or ValueError before any work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _crf_arguments as check

# Of an ignored label. The largest int64 stands for labels that int64 does not hold.
MAX_INDEX = 2**63 - 2
DEVICES = ("cpu", "cuda")
REDUCTIONS = ("none", "sum", "mean", "mean_all")
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def logits(op: str, value: object) -> Tensor:
    """A floating-point tensor (N, C, h, w) with at least one class and one pixel."""
    tensor = check.floating(op, "logits", value, (4,), DEVICES)
    if tensor.shape[2] < 1 or tensor.shape[3] < 1:
        raise ValueError(
            f"{op}: logits must have at least one pixel, got shape {check.shape(tensor)}"
        )
    return tensor


def size(op: str, value: Any) -> tuple[int, int]:
    """Height and width: two positive integers, or one for both."""
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{op}: size must be an integer or (height, width), got {value!r}")
    return _length(op, value, pair[0]), _length(op, value, pair[1])


def whole_number(op: str, name: str, value: Any) -> int:
    """An integer of any type, also a symbolic one; a bool is none."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {check.kind(value)}") from None


def _length(op: str, value: Any, length: Any) -> int:
    try:
        length = whole_number(op, "size", length)
    except TypeError:
        raise TypeError(
            f"{op}: size must be an integer or (height, width), got {value!r}"
        ) from None
    if length < 1:
        raise ValueError(f"{op}: size must be positive, got {value!r}")
    return length  # type: ignore[no-any-return]


def target(op: str, value: object, scores: Tensor) -> Tensor:
    """Labels (N, H, W) of an integer type that the kernels read."""
    tensor = check.real(op, "target", value, DEVICES)
    if tensor.dtype in _WIDER:
        unsigned = tensor.dtype == torch.uint64
        tensor = tensor.to(_WIDER[tensor.dtype])
        if unsigned:  # what does not fit is negative now: let it be no label instead
            tensor = tensor.where(tensor >= 0, torch.iinfo(torch.int64).max)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{op}: target must be of an integer dtype, got {tensor.dtype}")
    if tensor.dim() != 3 or tensor.shape[0] != scores.shape[0]:
        raise ValueError(
            f"{op}: target must have shape (N, H, W) with N = {scores.shape[0]} for logits of "
            f"shape {check.shape(scores)}, got {check.shape(tensor)}"
        )
    if tensor.shape[1] < 1 or tensor.shape[2] < 1:
        raise ValueError(
            f"{op}: target must have at least one pixel, got shape {check.shape(tensor)}"
        )
    return tensor


def differs(labels: Tensor, label: int) -> Tensor:
    """``labels != label`` by value: torch wraps a number that the dtype does not hold."""
    held = torch.iinfo(labels.dtype)
    if held.min <= label <= held.max:
        return labels != label
    return torch.ones_like(labels, dtype=torch.bool)


def constant(op: str, name: str, value: object, shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of this shape, in the dtype of the computation, that needs no gradient."""
    tensor = check.real(op, name, value, DEVICES)
    same_device(op, name, tensor, like)
    if tensor.dim() != len(shape) or any(
        tensor.shape[axis] != length for axis, length in enumerate(shape)
    ):
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {check.shape(tensor)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{op}: {name} must not require grad: its gradient is not implemented"
        )
    return tensor.to(check.compute_dtype(like.dtype))


def same_device(op: str, name: str, tensor: Tensor, scores: Tensor) -> None:
    """Check that a tensor is where the logits are."""
    if tensor.device != scores.device:
        raise ValueError(
            f"{op}: {name} must be on {scores.device} as the logits, got {tensor.device}"
        )


def probability(op: str, name: str, value: Any) -> float:
    """A number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {check.kind(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")
    return float(value)
