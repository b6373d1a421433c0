# SPDX-License-Identifier: Apache-2.0
"""Safetensors: the length of a JSON header, the header, the bytes of all tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._bytes import Bytes, size
from ._errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS, _MAX_NAME = 32, 4096
_METADATA = "__metadata__"


def parse(data: memoryview) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and the texts of the header's ``__metadata__``."""
    part = Bytes(data, 0, len(data), "safetensors file")
    length = part.number("Q")
    if length > min(_MAX_HEADER, part.left):
        raise part.error(f"a header of {length} bytes")
    try:
        header = json.loads(bytes(part.take(length)).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError("broken safetensors file: its header is no JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError("broken safetensors file: its header is no object")
    about = header.pop(_METADATA, {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise CheckpointError(f"broken safetensors file: {_METADATA} must hold texts")
    rows = sorted(((_entry(key, entry), key) for key, entry in header.items()), key=_begin)
    found, reached = {}, 0
    for (dtype, shape, begin, end), key in rows:
        wanted = size(shape, "safetensors file") * dtype.itemsize
        if begin != reached or end - begin != wanted or end > part.left:
            raise CheckpointError(
                f"broken safetensors file: {key!r} of {wanted} bytes is said to be at {begin} to "
                f"{end} of {part.left}"
            )
        reached = end
        raw = bytearray(data[part.at + begin : part.at + end])
        found[key] = (
            torch.frombuffer(raw, dtype=dtype).reshape(shape)
            if raw
            else torch.empty(shape, dtype=dtype)
        )
    if reached != part.left:
        raise CheckpointError(f"broken safetensors file: {part.left - reached} bytes of no tensor")
    return {key: found[key] for key in header}, about


def _begin(row: tuple[tuple[torch.dtype, list[int], int, int], str]) -> tuple[int, int]:
    return row[0][2], row[0][3]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError("broken safetensors file: a name stands twice in its header")
    return found


def _entry(key: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    if isinstance(entry, dict):
        dtype, shape, place = (entry.get(n) for n in ("dtype", "shape", "data_offsets"))
        if isinstance(dtype, str) and dtype in _DTYPES and _sizes(shape) and _sizes(place):
            assert isinstance(shape, list) and isinstance(place, list)
            if len(place) == 2 and len(shape) <= _MAX_DIMENSIONS and len(key) <= _MAX_NAME:
                return _DTYPES[dtype], shape, place[0], place[1]
    raise CheckpointError(f"broken safetensors file: the entry of {key[:99]!r}")


def _sizes(row: Any) -> bool:
    return isinstance(row, list) and all(type(n) is int and 0 <= n < 2**62 for n in row)


def serialize(tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> bytes:
    """The file; tensors in the order of their keys."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {_METADATA: dict(about)} if about else {}
    body, at = [], 0
    for key, value in tensors.items():
        if value.dtype not in names or key == _METADATA:
            raise CheckpointError(f"{key}: safetensors files hold no {value.dtype}")
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        header[key] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + len(raw)],
        }
        body.append(raw)
        at += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(body)
