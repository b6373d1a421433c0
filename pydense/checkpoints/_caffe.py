# SPDX-License-Identifier: Apache-2.0
"""Caffe's .caffemodel: the blobs of a NetParameter message, as ``layer.blob``.

The protobuf wire format is a row of fields, each a number, a kind and a value: a varint, 8 bytes,
4 bytes, or bytes with their count in front. Fields that do not matter here are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

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
_MAX_LAYERS, _MAX_BLOBS, _MAX_DIMENSIONS = 20_000, 64, 32
_MAX_SINGLE = 100_000  # numbers of a blob that stand alone, one field each


def parse(data: memoryview) -> dict[str, Tensor]:
    """The blobs of all layers that have any, float32 or float64."""
    found: dict[str, Tensor] = {}
    layers = 0
    for field, kind, value in _fields(Bytes(data, 0, len(data), "Caffe model")):
        if field not in _LAYERS or kind != _BYTES:
            continue
        layers += 1
        if layers > _MAX_LAYERS:
            raise CheckpointError(f"broken Caffe model: more than {_MAX_LAYERS} layers")
        layer, blobs = _layer(_part(value), *_LAYERS[field])
        for index, blob in enumerate(blobs):
            key = f"{layer}.{index}"
            if key in found:
                raise CheckpointError(f"broken Caffe model: two layers are called {layer!r}")
            found[key] = blob
    if not found:
        raise CheckpointError("no Caffe model: it holds no blobs")
    return found


def _fields(part: Bytes) -> Iterator[tuple[int, int, Bytes | int]]:
    while part.left:
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


def _layer(part: Bytes, name_field: int, blob_field: int) -> tuple[str, list[Tensor]]:
    layer = ""
    blobs: list[Tensor] = []
    for field, kind, value in _fields(part):
        if kind != _BYTES:
            continue
        if field == name_field:
            inner = _part(value)
            layer = name(inner.take(inner.left), "Caffe model")
        elif field == blob_field:
            if len(blobs) == _MAX_BLOBS:
                raise part.error(f"more than {_MAX_BLOBS} blobs in a layer")
            blobs.append(_blob(_part(value)))
    return layer, blobs


def _blob(part: Bytes) -> Tensor:
    legacy: dict[int, int] = {}
    shape: list[int] | None = None
    chunks: list[np.ndarray] = []
    single: list[float] = []
    for field, kind, value in _fields(part):
        if field in _LEGACY and kind == _VARINT:
            assert isinstance(value, int)
            legacy[field] = value
        elif field == _SHAPE and kind == _BYTES:
            shape = _shape(_part(value))
        elif field in (_DATA, _DOUBLE_DATA) and kind in (_BYTES, _FOUR, _EIGHT):
            inner = _part(value)
            width = 4 if field == _DATA else 8
            if inner.left % width or (kind != _BYTES and inner.left != width):
                raise part.error(f"{inner.left} bytes of numbers of {width} bytes")
            if kind != _BYTES:
                if len(single) == _MAX_SINGLE:
                    raise part.error("numbers that are not packed")
                single.append(inner.number("f" if width == 4 else "d"))
                continue
            dtype = np.dtype("<f4" if width == 4 else "<f8")
            chunks.append(np.frombuffer(inner.take(inner.left), dtype))
    if single:
        chunks.append(np.array(single, np.float32))
    if shape is None:
        shape = [legacy.get(field, 1) for field in _LEGACY] if legacy else None
    values = np.concatenate(chunks) if chunks else np.empty(0, np.float32)
    if shape is None:
        shape = [len(values)]
    if size(shape, part.what) != len(values):
        raise part.error(f"a blob of shape {tuple(shape)} with {len(values)} numbers")
    return torch.from_numpy(values.reshape(shape))


def _shape(part: Bytes) -> list[int]:
    shape: list[int] = []
    for field, kind, value in _fields(part):
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
            body.append(_field(7, _field(7, _field(1, shape)) + _field(5, data)))
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
