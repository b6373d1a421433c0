# SPDX-License-Identifier: Apache-2.0
"""MXNet's .params: a list of arrays and their names (``arg:...``, ``aux:...``)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ._bytes import Bytes, name, size
from ._errors import CheckpointError

_LIST = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DTYPES = ("<f4", "<f8", "<f2", "<u1", "<i4", "<i1", "<i8")
_MAX_DIMENSIONS = 32


def parse(data: memoryview) -> dict[str, Tensor]:
    """The arrays by name; without names by their number."""
    part = Bytes(data, 0, len(data), "MXNet file")
    if part.left < 8 or part.number("Q") != _LIST:
        raise CheckpointError("no MXNet file: it does not begin with the number 0x112")
    part.number("Q")
    count = part.number("Q")
    if count > part.left // 4:  # of each at least its first number
        raise part.error(f"{count} arrays in {part.left} bytes")
    arrays = [_array(part) for _ in range(count)]
    named = part.number("Q")
    if named not in (0, count):
        raise part.error(f"{named} names of {count} arrays")
    keys = [name(part.take(part.number("Q")), "MXNet file") for _ in range(named)]
    if not named:
        keys = [str(index) for index in range(count)]
    if len(set(keys)) != count:
        raise part.error("two arrays have the same name")
    if part.left:
        raise part.error(f"{part.left} bytes behind the end")
    return {key: array for key, array in zip(keys, arrays, strict=True) if array is not None}


def _array(part: Bytes) -> Tensor | None:
    """The next array, None where it is declared but empty."""
    first = part.number("I")
    if first in (_V2, _V3):
        storage = part.number("i")
        if storage != 0:
            raise part.error(f"storage type {storage}: sparse arrays are not read")
    # The oldest form begins with the number of dimensions, 4 bytes each.
    newer = first in (_V1, _V2, _V3)
    dimensions = part.number("i") if newer else first
    if first == _V3 and dimensions == -1:
        return None
    if not 0 <= dimensions <= _MAX_DIMENSIONS:
        raise part.error(f"{dimensions} dimensions")
    shape = [part.number("q" if newer else "I") for _ in range(dimensions)]
    if not shape and first != _V3:
        return None
    numbers = size(shape, part.what)
    part.take(8)  # the device it was on
    kind = part.number("i")
    if not 0 <= kind < len(_DTYPES):
        raise part.error(f"type {kind}")
    dtype = np.dtype(_DTYPES[kind])
    raw = part.take(numbers * dtype.itemsize)
    return torch.from_numpy(np.frombuffer(raw, dtype).copy().reshape(shape))


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """The list in the form that MXNet 1 writes."""
    kinds = {np.dtype(kind): index for index, kind in enumerate(_DTYPES)}
    out = [struct.pack("<QQQ", _LIST, 0, len(tensors))]
    for key, value in tensors.items():
        if value.dim() == 0:
            raise CheckpointError(f"{key}: MXNet files hold no numbers without dimension")
        wide = value.float() if value.dtype == torch.bfloat16 else value
        array = wide.detach().cpu().contiguous().numpy()
        if array.dtype not in kinds:
            raise CheckpointError(f"{key}: MXNet files hold no {value.dtype}")
        out.append(struct.pack(f"<IiI{array.ndim}q", _V2, 0, array.ndim, *array.shape))
        out.append(struct.pack("<iii", 1, 0, kinds[array.dtype]))
        out.append(array.tobytes())
    out.append(struct.pack("<Q", len(tensors)))
    for key in tensors:
        raw = key.encode()
        out.append(struct.pack("<Q", len(raw)) + raw)
    return b"".join(out)
