# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the dense CRF functions: TypeError or ValueError before any work.

What is checked here is what Python can see without reading a tensor: types, shapes, plain numbers.
Values of tensors are checked by the operators, so that nothing here stops ``torch.compile`` or
``torch.export``. Texts have the form ``op: name must ..., got ...``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._forward_ad import refuse_tangent

MAX_DIMS = 32  # of a lattice
MAX_LABELS = 65536
MAX_ITERATIONS = 2**31 - 1

NORMALIZATIONS = ("symmetric", "before", "after", None)
BACKENDS = ("lattice", "exact")
PRECISIONS = ("accurate", "fast")  # of the exact backend

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What N, C and the axes are called in messages, by the number of dimensions.
_SHAPES = {3: "(N, C, P)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32 (16-bit input is cast, and the result cast back)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choice(op: str, name: str, value: object, options: Sequence[object]) -> None:
    """Check that ``value`` is one of a few words."""
    if not (value is None or isinstance(value, str)) or value not in options:
        words = ", ".join(repr(option) for option in options)
        raise ValueError(f"{op}: {name} must be one of {words}, got {value!r}")


def backend(op: str, name: object, precision: object) -> None:
    """Check the name of a backend and what it is asked for."""
    choice(op, "backend", name, BACKENDS)
    choice(op, "precision", precision, PRECISIONS)
    if precision == "fast" and name != "exact":
        raise ValueError(f"{op}: precision must be 'accurate' with backend={name!r}, got 'fast'")


def flag(op: str, name: str, value: object) -> None:
    """Check for a bool: a 0, a 1 or a string in its place is more often a slip than meant."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {kind(value)}")


def integer(op: str, name: str, value: Any, minimum: int, maximum: int) -> int:
    """An int in [minimum, maximum]."""
    if not isinstance(value, int):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{op}: {name} must be an integer, got {kind(value)}") from None
    if not minimum <= value <= maximum:
        raise ValueError(f"{op}: {name} must be in [{minimum}, {maximum}], got {value}")
    return int(value)


def floating(
    op: str,
    name: str,
    value: object,
    ranks: Sequence[int] = (3, 4, 5),
    devices: Sequence[str] = ("cpu",),
) -> Tensor:
    """A floating-point tensor on one of these devices, of one of these ranks, with channels."""
    tensor = any_tensor(op, name, value)
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name} must be of dtype float32, float64, float16 or bfloat16, "
            f"got {tensor.dtype}"
        )
    if tensor.dim() not in ranks or tensor.shape[1] < 1:
        shapes = ", ".join(_SHAPES[rank] for rank in ranks)
        raise ValueError(
            f"{op}: {name} must have a shape out of {shapes} with C >= 1, got {shape(tensor)}"
        )
    return on_device(op, name, tensor, devices)


def real(op: str, name: str, value: object, devices: Sequence[str] = ("cpu",)) -> Tensor:
    """A tensor of real numbers of any dtype on one of these devices."""
    tensor = any_tensor(op, name, value)
    if tensor.is_complex():
        raise TypeError(f"{op}: {name} must hold real numbers, got {tensor.dtype}")
    return on_device(op, name, tensor, devices)


def any_tensor(op: str, name: str, value: object) -> Tensor:
    """Check for a tensor, one without a tangent."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {kind(value)}")
    refuse_tangent(op, name, value)
    return value


DEVICES = ("cpu", "cuda")  # of what has kernels for both
_DEVICES = {"cpu": "the CPU", "cuda": "a GPU (cuda)"}


def on_device(op: str, name: str, tensor: Tensor, devices: Sequence[str]) -> Tensor:
    """Check where a tensor is."""
    if tensor.device.type not in devices:
        places = " or ".join(_DEVICES[device] for device in devices)
        raise NotImplementedError(
            f"{op}: {name} must be on {places}: the kernels for other devices are not there yet, "
            f"got {tensor.device}"
        )
    return tensor


def like_unary(op: str, name: str, tensor: Tensor, unary_name: str, unary: Tensor) -> None:
    """Check a shape (N or 1, any number of channels, *spatial) against ``unary``'s."""
    fits = tensor.dim() == unary.dim() and tensor.shape[1] >= 1
    if fits and tensor.shape[0] != 1:
        fits = tensor.shape[0] == unary.shape[0]
    if not (fits and tensor.shape[2:] == unary.shape[2:]):
        spatial = ", ".join(str(n) for n in unary.shape[2:])
        raise ValueError(
            f"{op}: {name} must have shape (N or 1, channels, {spatial}) with N = "
            f"{unary.shape[0]} for a {unary_name} of shape {shape(unary)}, got {shape(tensor)}"
        )


def kernel(op: str, name: str, value: object, keys: Sequence[str]) -> Mapping[str, Any]:
    """A mapping with exactly these keys."""
    wanted = " and ".join([", ".join(keys[:-1]), keys[-1]])
    if not isinstance(value, Mapping):
        raise TypeError(f"{op}: {name} must be a dict with {wanted}, got {kind(value)}")
    if len(value) != len(keys) or not all(key in value for key in keys):
        raise ValueError(f"{op}: {name} must be a dict with {wanted}, got the keys {[*value]}")
    return value


def sequence(op: str, name: str, value: object, what: str) -> Sequence[Any]:
    """A list or tuple."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a sequence of {what}, got {kind(value)}")
    return value


def any_scales(op: str, name: str, value: Any) -> float | tuple[float, ...]:
    """A positive finite number, or several in a row."""
    numbers = _numbers(op, name, value)
    row = [numbers] if isinstance(numbers, float) else numbers
    if not row or not all(isinstance(number, float) for number in row):
        raise ValueError(f"{op}: {name} must be a number or numbers in a row, got {value!r}")
    if not all(0 < number < math.inf for number in row):  # no isfinite: a SymFloat has none
        raise ValueError(f"{op}: {name} must be positive and finite, got {value!r}")
    return numbers if isinstance(numbers, float) else tuple(row)


def scales(op: str, name: str, value: Any, count: int) -> tuple[float, ...]:
    """``count`` positive finite numbers; one number stands for all of them."""
    numbers = any_scales(op, name, value)
    row = (numbers,) * count if isinstance(numbers, float) else numbers
    if len(row) != count:
        raise ValueError(f"{op}: {name} must be a number or {count} numbers, got {value!r}")
    return row


def any_compatibility(op: str, name: str, value: Any) -> Tensor:
    """A compatibility for labels not known yet, in torch's default dtype."""
    dtype = torch.get_default_dtype()
    if isinstance(value, Tensor):
        tensor = real(op, name, value, DEVICES).detach().to(dtype, copy=True)
    else:
        tensor = _tensor(op, name, value, dtype)
    if tensor.dim() > 2 or len(set(tensor.shape)) > 1 or tensor.numel() == 0:
        raise ValueError(
            f"{op}: {name} must be a number or have shape (L,) or (L, L), got shape {shape(tensor)}"
        )
    return tensor


def compatibility(op: str, name: str, value: Any, labels: int, like: Tensor) -> Tensor:
    """The label compatibility as a (), (L,) or (L, L) tensor of the dtype of ``like``."""
    if isinstance(value, Tensor):
        tensor = real(op, name, value, (like.device.type,)).to(like.dtype)
    else:
        tensor = _tensor(op, name, value, like.dtype, like.device)
    if tuple(tensor.shape) not in ((), (labels,), (labels, labels)):
        raise ValueError(
            f"{op}: {name} must be a number or have shape ({labels},) or ({labels}, {labels}) for "
            f"{labels} labels, got shape {shape(tensor)}"
        )
    return tensor


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape as it is printed in messages."""
    return tuple(tensor.shape)


def kind(value: object) -> str:
    """What a value is, in messages."""
    if value is None:
        return "None"
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _numbers(op: str, name: str, value: Any) -> Any:
    """Numbers, sequences and NumPy arrays as float or (nested) lists of float."""
    if isinstance(value, (list, tuple)):
        return [_numbers(op, name, item) for item in value]
    if isinstance(value, Real):
        return float(value)
    if hasattr(value, "tolist") and not isinstance(value, Tensor):
        return _numbers(op, name, value.tolist())
    raise TypeError(f"{op}: {name} must hold real numbers, got {kind(value)}")


def _tensor(
    op: str, name: str, value: Any, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    numbers = _numbers(op, name, value)
    _require_finite(op, name, numbers)
    try:
        return torch.tensor(numbers, dtype=dtype, device=device)
    except (ValueError, TypeError):
        raise ValueError(f"{op}: {name} must have rows of one length, got {value!r}") from None


def _require_finite(op: str, name: str, numbers: Any) -> None:
    if isinstance(numbers, float):
        if not -math.inf < numbers < math.inf:
            raise ValueError(f"{op}: {name} must be finite, got {numbers}")
        return
    for item in numbers:
        _require_finite(op, name, item)
