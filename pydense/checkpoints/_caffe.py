# SPDX-License-Identifier: Apache-2.0
"""Caffe's .caffemodel: the blobs of a NetParameter message, as ``layer.blob``.

The protobuf wire format is a row of fields, each a number, a kind and a value: a varint, 8 bytes,
4 bytes, or bytes with their count in front. Fields that do not matter here are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._bytes import Bytes, name, size
from ._errors import CheckpointError

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
# Of NetParameter: layers of today's and of the first form, with their fields of name and blobs.
_LAYERS = {100: (1, 7), 2: (4, 6)}
_DATA, _SHAPE, _DOUBLE_DATA = 5, 7, 8
_LEGACY = (1, 2, 3, 4)  # num, channels, height, width
# Of NVIDIA's Caffe and OpenCV's shrinkCaffeModel: the numbers as bytes, and their type.
_RAW_TYPE, _RAW = 10, 12
_RAW_TYPES = ("<f8", "<f4", "<f2")
_MAX_LAYERS, _MAX_BLOBS, _MAX_DIMENSIONS = 20_000, 64, 32
# A run of numbers counts as one field: a net has some ten for each blob.
_MAX_FIELDS, _MAX_PIECES = 1_000_000, 100_000
# Float32 and float64 numbers: of a packed field, and of fields of one number each.
_NUMBERS: dict[int, np.dtype[Any]] = {_DATA: np.dtype("<f4"), _DOUBLE_DATA: np.dtype("<f8")}
# One number each: of the differences, which no net needs.
_DIFFERENCES: dict[int, np.dtype[Any]] = {6: np.dtype("<f4"), 9: np.dtype("<f8")}
_FIRST_BLOCK, _BLOCK = 16, 65536


class _Budget:
    """How many fields a file may have yet: each takes time, however few bytes it has."""

    def __init__(self) -> None:
        self.left = _MAX_FIELDS

    def spend(self, part: Bytes) -> None:
        """Take one off."""
        self.left -= 1
        if self.left < 0:
            raise part.error(f"more than {_MAX_FIELDS} fields")


def parse(data: memoryview) -> dict[str, Tensor]:
    """The blobs of all layers that have any, float32 or float64 (float16 of NVIDIA's Caffe)."""
    found: dict[str, Tensor] = {}
    layers, budget = 0, _Budget()
    for field, kind, value in _fields(Bytes(data, 0, len(data), "Caffe model"), budget):
        if field not in _LAYERS or kind != _BYTES:
            continue
        layers += 1
        if layers > _MAX_LAYERS:
            raise CheckpointError(f"broken Caffe model: more than {_MAX_LAYERS} layers")
        layer, blobs = _layer(_part(value), budget, *_LAYERS[field])
        for index, blob in enumerate(blobs):
            key = f"{layer}.{index}"
            if key in found:
                raise CheckpointError(f"broken Caffe model: two layers are called {layer!r}")
            found[key] = blob
    if not found:
        raise CheckpointError("no Caffe model: it holds no blobs")
    return found


def _fields(part: Bytes, budget: _Budget) -> Iterator[tuple[int, int, Bytes | int]]:
    while part.left:
        budget.spend(part)
        tag = _varint(part)
        field, kind = tag >> 3, tag & 7
        if field == 0:
            raise part.error("field number 0")
        if kind == _VARINT:
            yield field, kind, _varint(part)
        elif kind == _BYTES:
            yield field, kind, part.part(_varint(part), part.what)
        elif kind in (_EIGHT, _FOUR):
            yield field, kind, part.part(8 if kind == _EIGHT else 4, part.what)
        else:
            raise part.error(f"wire type {kind}")


def _varint(part: Bytes) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = part.data[part.skip(1)]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1)
    raise part.error("a varint of more than 10 bytes")


def _part(value: Bytes | int) -> Bytes:
    assert isinstance(value, Bytes)
    return value


def _layer(
    part: Bytes, budget: _Budget, name_field: int, blob_field: int
) -> tuple[str, list[Tensor]]:
    layer = ""
    blobs: list[Tensor] = []
    for field, kind, value in _fields(part, budget):
        if kind != _BYTES:
            continue
        if field == name_field:
            inner = _part(value)
            layer = name(inner.take(inner.left), "Caffe model")
        elif field == blob_field:
            if len(blobs) == _MAX_BLOBS:
                raise part.error(f"more than {_MAX_BLOBS} blobs in a layer")
            blobs.append(_blob(_part(value), budget))
    return layer, blobs


def _blob(part: Bytes, budget: _Budget) -> Tensor:
    legacy: dict[int, int] = {}
    shape: list[int] | None = None
    chunks: dict[int, list[np.ndarray]] = {_DATA: [], _DOUBLE_DATA: []}
    raw: Bytes | None = None
    raw_type, pieces = 1, 0
    for field, kind, value in _fields(part, budget):
        if field in (*_LEGACY, _RAW_TYPE) and kind == _VARINT:
            assert isinstance(value, int)
            if field == _RAW_TYPE:
                raw_type = value
            else:
                legacy[field] = value
        elif field == _SHAPE and kind == _BYTES:
            shape = _shape(_part(value), budget)
        elif field == _RAW and kind == _BYTES:
            raw = _part(value)
        elif field in _NUMBERS and kind in (_BYTES, _FOUR, _EIGHT):
            inner, dtype = _part(value), _NUMBERS[field]
            if inner.left % dtype.itemsize or (kind != _BYTES and inner.left != dtype.itemsize):
                raise part.error(f"{inner.left} bytes of numbers of {dtype.itemsize} bytes")
            if not inner.left:
                continue
            pieces += 1
            if pieces > _MAX_PIECES:
                raise part.error("numbers in too many pieces")
            chunks[field].append(np.frombuffer(inner.take(inner.left), dtype))
            if kind != _BYTES:
                chunks[field] += _run(part, field << 3 | kind, dtype)
        elif field in _DIFFERENCES and kind == (_FOUR if field == 6 else _EIGHT):
            _run(part, field << 3 | kind, _DIFFERENCES[field])
    if raw is not None and raw.left:
        chunks[_DATA].append(_raw(raw, raw_type))
    # As Caffe: float64 if there are any.
    found = chunks[_DOUBLE_DATA] or chunks[_DATA]
    values = np.concatenate(found) if found else np.empty(0, np.float32)
    if shape is None:
        shape = [legacy.get(field, 1) for field in _LEGACY] if legacy else [len(values)]
    if size(shape, part.what) != len(values):
        raise part.error(f"a blob of shape {tuple(shape)} with {len(values)} numbers")
    return torch.from_numpy(values.reshape(shape))


def _run(part: Bytes, tag: int, dtype: np.dtype[Any]) -> list[np.ndarray]:
    """The numbers of the fields that follow, as long as each is one number with the same tag."""
    width, block = 1 + dtype.itemsize, _FIRST_BLOCK
    found: list[np.ndarray] = []
    # The next tag is seen before a block is made: there may be no run at all.
    while (count := min(part.left // width, block)) and part.data[part.at] == tag:
        block = min(4 * block, _BLOCK)
        end = part.at + count * width
        rows = np.frombuffer(part.data[part.at : end], np.uint8).reshape(count, width)
        others = np.flatnonzero(rows[:, 0] != tag)
        same = int(others[0]) if len(others) else count
        found.append(np.ascontiguousarray(rows[:same, 1:]).view(dtype)[:, 0])
        part.skip(same * width)
        if same < count:
            break
    return found


def _raw(part: Bytes, kind: int) -> np.ndarray:
    if kind >= len(_RAW_TYPES):
        raise part.error(f"raw numbers of type {kind}")
    dtype = np.dtype(_RAW_TYPES[kind])
    if part.left % dtype.itemsize:
        raise part.error(f"{part.left} bytes of numbers of {dtype.itemsize} bytes")
    return np.frombuffer(part.take(part.left), dtype)


def _shape(part: Bytes, budget: _Budget) -> list[int]:
    shape: list[int] = []
    for field, kind, value in _fields(part, budget):
        if field != 1:
            continue
        if kind == _VARINT:
            assert isinstance(value, int)
            shape.append(value)
        elif kind == _BYTES:
            inner = _part(value)
            while inner.left:
                shape.append(_varint(inner))
                if len(shape) > _MAX_DIMENSIONS:
                    break
        if len(shape) > _MAX_DIMENSIONS:
            raise part.error(f"more than {_MAX_DIMENSIONS} dimensions")
    return shape


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """A NetParameter with a layer for each name, its blobs by number, in float32."""
    layers: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        layer, _, number = key.rpartition(".")
        if not layer or not number.isdigit():
            raise CheckpointError(f"keys of a Caffe model must be like 'conv1.0', got {key!r}")
        layers.setdefault(layer, {})[int(number)] = value
    out = []
    for layer, rows in layers.items():
        if sorted(rows) != list(range(len(rows))):
            raise CheckpointError(f"blobs of layer {layer!r} must be 0, 1, ..., got {[*rows]}")
        body = [_field(1, layer.encode())]
        for index in range(len(rows)):
            blob = rows[index]
            shape = b"".join(_number(n) for n in blob.shape)
            data = blob.detach().cpu().contiguous().float().numpy().astype("<f4").tobytes()
            numbers = _field(5, data) if data else b""
            body.append(_field(7, numbers + _field(7, _field(1, shape))))
        out.append(_field(100, b"".join(body)))
    return b"".join(out)


def _number(value: int) -> bytes:
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return struct.pack(f"{len(out) + 1}B", *out, value)


def _field(field: int, value: bytes) -> bytes:
    return _number(field << 3 | _BYTES) + _number(len(value)) + value
