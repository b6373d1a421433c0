# SPDX-License-Identifier: Apache-2.0
"""The parsers of Caffe, MXNet and safetensors files: every form, and bytes that lie."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from _mutated import mutated
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense.checkpoints import CheckpointError, _caffe, _mxnet, _safetensors, read, write

STATE = {
    "conv1.0": torch.arange(24.0).reshape(2, 3, 2, 2),
    "conv1.1": torch.tensor([1.5, -2.0]),
    "a long/name.0": torch.zeros(200),
    "empty.0": torch.zeros(0, 3),
}
PARSERS: dict[str, Callable[[memoryview], Any]] = {
    "caffe": _caffe.parse,
    "mxnet": _mxnet.parse,
    "safetensors": lambda data: _safetensors.parse(data)[0],
}
FILES = {
    "caffe": _caffe.serialize(STATE),
    "mxnet": _mxnet.serialize(STATE),
    "safetensors": _safetensors.serialize(STATE, {"about": "x"}),
}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return list(found) == list(expected) and all(
        found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items()
    )


@pytest.mark.parametrize("kind", PARSERS)
def test_what_is_written_is_read(kind):
    assert same(PARSERS[kind](memoryview(FILES[kind])), STATE)


@pytest.mark.parametrize("kind", PARSERS)
def test_mutated_bytes(kind):
    """5,000 broken files of each kind: a result or a CheckpointError, in little memory."""
    rng = random.Random(0)
    parse, refused = PARSERS[kind], 0
    tracemalloc.start()
    for _ in range(5000):
        try:
            found = parse(memoryview(mutated(FILES[kind], rng)))
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 5000
        else:
            assert all(value.numel() <= 4 * len(FILES[kind]) for value in found.values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 1000 and peak < 5_000_000


@pytest.mark.parametrize("suffix", [".caffemodel", ".params", ".safetensors", ".pth"])
@settings(max_examples=150)
@given(data=st.binary(max_size=300))
def test_any_bytes(suffix, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    try:
        read(path)
    except CheckpointError:
        return
    assert suffix != ".pth"


def varint(value: int) -> bytes:
    return _caffe._number(value)


field = _caffe._field


def test_caffe_of_the_first_form():
    """Layers in field 2, four legacy dimensions, numbers one by one, doubles, unknown fields."""
    legacy = b"".join(
        varint(n << 3) + varint(v) for n, v in ((1, 1), (2, 1), (3, 2), (4, 2))
    ) + b"".join(varint(5 << 3 | 5) + struct.pack("<f", x) for x in (1, 2, 3, 4))
    double = field(7, varint(1 << 3) + varint(3)) + field(8, struct.pack("<3d", 1, 2, 3))
    diff = field(5, struct.pack("<f", 9)) + field(6, struct.pack("<f", 8))
    layer = field(4, b"old") + varint(5 << 3) + varint(4)
    layer += field(6, legacy) + field(6, double) + field(6, diff)
    found = _caffe.parse(memoryview(field(1, b"net") + field(2, layer)))
    assert list(found) == ["old.0", "old.1", "old.2"]
    assert found["old.0"].tolist() == [[[[1, 2], [3, 4]]]]
    assert found["old.1"].dtype == torch.float64 and found["old.1"].tolist() == [1, 2, 3]
    assert found["old.2"].tolist() == [9]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "no blobs"),
        (varint(100 << 3 | 2) + varint(2**40), "bytes expected"),
        (b"\xff" * 11, "varint"),
        (varint(3), "field number 0"),
        (varint(1 << 3 | 3), "wire type 3"),
        (field(100, field(1, b"\xff\xfe") + field(7, b"")), "UTF-8"),
        (field(100, field(7, field(5, b"abc"))), "3 bytes"),
        (field(100, field(7, field(7, field(1, varint(2**62) * 3)))), "shape"),
        (field(100, field(7, field(7, field(1, varint(2) * 40)))), "dimensions"),
        (field(100, field(1, b"a") + field(7, b"")) * 2, "two layers"),
        (field(100, field(1, b"a") + field(7, b"") * 65), "more than 64 blobs"),
        (field(100, field(1, b"a" * 2000) + field(7, b"")), "name of 2000 bytes"),
    ],
)
def test_caffe_that_lies(raw, text):
    with pytest.raises(CheckpointError, match=text):
        _caffe.parse(memoryview(raw))


def old_mxnet(shape: bytes, data: bytes, names: bytes = b"") -> bytes:
    head = struct.pack("<QQQ", 0x112, 0, 1)
    return head + shape + struct.pack("<iii", 2, 0, 0) + data + (names or struct.pack("<Q", 0))


def test_mxnet_of_all_forms():
    data = struct.pack("<6f", *range(6))
    forms = (
        struct.pack("<III", 2, 2, 3),
        struct.pack("<IIqq", _mxnet._V1, 2, 2, 3),
        struct.pack("<IiIqq", _mxnet._V2, 0, 2, 2, 3),
        struct.pack("<IiIqq", _mxnet._V3, 0, 2, 2, 3),
    )
    names = struct.pack("<QQ", 1, 5) + b"arg:a"
    for shape in forms:
        assert _mxnet.parse(memoryview(old_mxnet(shape, data)))["0"].tolist() == [
            [0, 1, 2],
            [3, 4, 5],
        ]
        assert list(_mxnet.parse(memoryview(old_mxnet(shape, data, names)))) == ["arg:a"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x12\x01", "0x112"),
        (struct.pack("<QQQ", 0x112, 0, 2**60), "arrays in"),
        (old_mxnet(struct.pack("<I", 4000), b""), "4000 dimensions"),
        (old_mxnet(struct.pack("<IIq", _mxnet._V1, 1, -5), b""), "shape"),
        (old_mxnet(struct.pack("<IIqq", _mxnet._V1, 2, 2**39, 2**39), b""), "shape"),
        (old_mxnet(struct.pack("<IIq", _mxnet._V1, 1, 2**33), b""), "bytes expected"),
        (old_mxnet(struct.pack("<IiIq", _mxnet._V2, 1, 1, 1), b""), "sparse"),
        (old_mxnet(struct.pack("<II", 1, 1), b"1234") + b"x", "behind the end"),
        (old_mxnet(struct.pack("<II", 1, 1), b"1234", struct.pack("<Q", 7)), "names of"),
    ],
)
def test_mxnet_that_lies(raw, text):
    with pytest.raises(CheckpointError, match=text):
        _mxnet.parse(memoryview(raw))


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\xff" * 9, "header of"),
        (safetensors(b"[" * 100_000), "no JSON"),
        (safetensors([1]), "no object"),
        (safetensors(b'{"a":{},"a":{}}'), "twice"),
        (safetensors({"a": ONE | {"dtype": "X9"}}), "entry of 'a'"),
        (safetensors({"a": ONE | {"shape": [-1]}}), "entry of 'a'"),
        (safetensors({"a": ONE | {"shape": [True]}}), "entry of 'a'"),
        (safetensors({"a": ONE | {"shape": [2**61, 4]}}, b"1234"), "shape"),
        (safetensors({"a": ONE}, b"123"), "said to be at"),
        (safetensors({"a": ONE | {"data_offsets": [4, 0]}}, b"1234"), "said to be at"),
        (safetensors({"a": ONE, "b": ONE}, b"1234"), "said to be at"),
        (safetensors({"a": ONE}, b"12345"), "no tensor"),
        (safetensors({"__metadata__": {"a": 1}}), "texts"),
    ],
)
def test_safetensors_that_lies(raw, text):
    with pytest.raises(CheckpointError, match=text):
        _safetensors.parse(memoryview(raw))


@pytest.mark.parametrize(
    "text",
    ['"x"', "[]", "{", '{"options": 3}', '{"model": 3}', '{"options": {"a": {"b": 1}}}'],
)
def test_metadata_that_lies(text, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(_safetensors.serialize({"a": torch.zeros(1)}, {"pydense": text}))
    with pytest.raises(CheckpointError, match=r"metadata|options"):
        read(path)


def test_safetensors_of_all_types(tmp_path):
    state = {
        str(dtype): torch.arange(5).to(dtype).reshape(5, 1)
        for dtype in _safetensors._DTYPES.values()
    } | {"number": torch.tensor(3.0), "view": torch.arange(12.0).reshape(3, 4).T}
    write(tmp_path / "x.safetensors", state)
    assert same(read(tmp_path / "x.safetensors")[0], state)
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    begin, end = header["view"]["data_offsets"]
    values = np.frombuffer(raw, "<f4", 12, len(raw) - (end - begin)).reshape(4, 3)
    assert (values == state["view"].numpy()).all()


@pytest.mark.parametrize(
    ("suffix", "state"),
    [
        (".caffemodel", {"weight": torch.zeros(1)}),
        (".caffemodel", {"a.1": torch.zeros(1)}),
        (".params", {"a": torch.tensor(1.0)}),
        (".params", {"a": torch.zeros(1, dtype=torch.bool)}),
        (".safetensors", {"a": torch.zeros(1, dtype=torch.complex64)}),
    ],
)
def test_what_cannot_be_written(suffix, state, tmp_path):
    with pytest.raises(CheckpointError):
        write(tmp_path / f"x{suffix}", state)
    assert not list(tmp_path.iterdir())
