# SPDX-License-Identifier: Apache-2.0
"""Parameters of operators that are convolutions: checks, and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _crf_arguments as check
from . import _upsample_arguments as arguments


def tensors(op: str, name: str, value: object, most: int) -> list[Tensor]:
    """A sequence of 1 to ``most`` tensors.

    Raises:
        TypeError: Something else than a sequence, or than tensors.
        ValueError: None of them, or too many.
    """
    row = check.sequence(op, name, value, "tensors")
    if not 1 <= len(row) <= most:
        raise ValueError(f"{op}: {name} must be 1 to {most} tensors, got {len(row)}")
    return [check.any_tensor(op, f"{name}[{i}]", item) for i, item in enumerate(row)]


def parameter(
    op: str, name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...] | None = None
) -> None:
    """A tensor of the dtype and device of ``x``, of this shape where it is given.

    Raises:
        TypeError: Another dtype.
        ValueError: Another shape or device.
    """
    if tensor.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must be of dtype {x.dtype} as x, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {check.shape(tensor)}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} as x, got {tensor.device}")


def padding_of(
    op: str, padding: Any, reach: Sequence[int], strides: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding above and on the left, and below and on the right, from what users say.

    Args:
        op: Of the messages.
        padding: A number, two, ``"same"`` or ``"valid"``.
        reach: How much larger than one pixel the dilated kernel is, (y, x).
        strides: (y, x).
    """
    if isinstance(padding, str):
        check.choice(op, "padding", padding, ("same", "valid"))
        if padding == "valid":
            return (0, 0), (0, 0)
        if strides != (1, 1):
            raise ValueError(f"{op}: padding must be numbers where stride is not 1, got 'same'")
        y, x = reach
        return (y // 2, x // 2), (y - y // 2, x - x // 2)
    both = arguments.pair(op, "padding", padding, 0)
    return both, both


def as_convolution(x: Tensor, *rows: Sequence[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """``x`` and sequences of parameters in autocast's dtype, as torch casts for convolutions."""
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return x, [list(row) for row in rows]
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), [[cast(t) for t in row] for row in rows]


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """For backward: of tensors whose dtypes forward has chosen, nothing is cast again.

    Args:
        kind: The type of their device.
    """
    # On meta there is none to switch off.
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
