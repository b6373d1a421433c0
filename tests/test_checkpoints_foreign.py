# SPDX-License-Identifier: Apache-2.0
"""Files that Caffe, OpenCV, MXNet and Google's protobuf wrote, not this package."""

from __future__ import annotations

import importlib.util
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _mutated import mutated
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense import checkpoints
from pydense.checkpoints import CheckpointError, _caffe

FILES = Path(__file__).resolve().parent / "data" / "checkpoints"
# See the README there: blob number i holds 0, 1/4, 2/4, ... less i.
BLOBS = {
    "conv1.0": (3, 2, 3, 3),
    "conv1.1": (3,),
    "bn_conv1.0": (3,),
    "bn_conv1.1": (3,),
    "bn_conv1.2": (1,),
    "scale_conv1.0": (3,),
    "scale_conv1.1": (3,),
    "fc6.0": (2, 12),
    "fc6.1": (2,),
}


def expected(kind: type = np.float32) -> dict[str, np.ndarray]:
    return {
        key: (np.arange(np.prod(shape)) / 4 - index).reshape(shape).astype(kind)
        for index, (key, shape) in enumerate(BLOBS.items())
    }


@pytest.mark.parametrize("name", ["caffe_1.0", "opencv_4.8_float16"])
def test_files_of_caffe(name):
    found = checkpoints.read(FILES / f"{name}.caffemodel")[0]
    # OpenCV halves convolutions and fully connected layers, which hold their bytes raw.
    half = ("conv1.0", "conv1.1", "fc6.0", "fc6.1") if "float16" in name else ()
    assert list(found) == list(BLOBS)
    for key, values in expected().items():
        assert found[key].dtype == (torch.float16 if key in half else torch.float32)
        assert (found[key].float().numpy() == values).all(), key


def test_file_of_caffe_before_2015():
    """Layers in the old field, blobs of four dimensions."""
    found = checkpoints.read(FILES / "caffe_1.0_v1_layers.caffemodel")[0]
    assert list(found) == ["conv1.0", "conv1.1", "fc6.0", "fc6.1"]
    for key, value in found.items():
        assert value.dim() == 4 and (value.numpy().ravel() == expected()[key].ravel()).all()
    layer = torch.nn.Conv2d(2, 3, 3)
    state = {"weight": found["conv1.0"], "bias": found["conv1.1"]}
    assert found["conv1.1"].shape == (1, 1, 1, 3)
    assert checkpoints.load(layer, state).complete
    assert layer.bias.tolist() == [-1, -0.75, -0.5]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("0.9.5", ("float64", "float16", "uint8", "int32")),
        ("0.11.0", ("float64", "float16", "uint8", "int32")),
        ("1.9.1", ("float64", "float16", "uint8", "int32", "int8", "int64")),
        ("1.9.1_np", ("float64",)),
    ],
)
def test_files_of_mxnet(name, kinds):
    """The four forms of an array; the last may have no dimension and no numbers."""
    found = checkpoints.read(FILES / f"mxnet_{name}.params")[0]
    weight, var = found.pop("arg:conv1a_weight"), found.pop("aux:bn_moving_var")
    assert torch.equal(weight, torch.arange(24).reshape(2, 3, 2, 2) / 4 - 3)
    assert var.tolist() == [1.5, -2, 3.25]
    if "np" in name:
        assert found.pop("arg:scalar") == 2.5 and found.pop("arg:empty").shape == (0, 3)
    assert list(found) == [f"arg:{kind}" for kind in kinds]
    for kind in kinds:
        value = found[f"arg:{kind}"]
        assert value.dtype == getattr(torch, kind) and value.tolist() == [0, 1, 2, 3, 4]


def test_no_file_survives_a_cut():
    for path in sorted(FILES.iterdir()):
        if path.suffix in (".caffemodel", ".params"):
            whole = path.read_bytes()
            read = checkpoints._files._parse
            for end in range(0, len(whole) - 1, 7):
                try:
                    found = read(path.suffix, memoryview(whole[:end]))[0]
                except CheckpointError:
                    continue
                # A Caffe file cut between two layers is a whole one.
                assert path.suffix == ".caffemodel"
                assert set(found) < set(read(path.suffix, memoryview(whole))[0])


# ---- Google's encoder ----

FLOAT, DOUBLE, INT32, INT64, STRING, MESSAGE, BYTES, ENUM = 2, 1, 5, 3, 9, 11, 12, 14


def messages(packed: bool) -> Any:
    """Caffe's messages, as far as weights are concerned, made of descriptors."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="net.proto", package="c", syntax="proto2")

    def add(name: str, *fields: tuple[str, int, int, bool, str]) -> None:
        message = file.message_type.add(name=name)
        for title, number, kind, repeated, of in fields:
            row = message.field.add(
                name=title, number=number, type=kind, label=3 if repeated else 1
            )
            if of:
                row.type_name = f".c.{of}"
            if repeated and kind in (FLOAT, DOUBLE, INT64):
                row.options.packed = packed

    add("BlobShape", ("dim", 1, INT64, True, ""))
    legacy = [(n, i + 1, INT32, False, "") for i, n in enumerate(("num", "channels"))]
    legacy += [(n, i + 3, INT32, False, "") for i, n in enumerate(("height", "width"))]
    add(
        "BlobProto",
        *legacy,
        ("data", 5, FLOAT, True, ""),
        ("diff", 6, FLOAT, True, ""),
        ("shape", 7, MESSAGE, False, "BlobShape"),
        ("double_data", 8, DOUBLE, True, ""),
        ("double_diff", 9, DOUBLE, True, ""),
        ("raw_data_type", 10, INT32, False, ""),
        ("raw_data", 12, BYTES, False, ""),
    )
    add(
        "LayerParameter",
        ("name", 1, STRING, False, ""),
        ("type", 2, STRING, False, ""),
        ("bottom", 3, STRING, True, ""),
        ("loss_weight", 5, FLOAT, True, ""),
        ("blobs", 7, MESSAGE, True, "BlobProto"),
    )
    add(
        "V1LayerParameter",
        ("bottom", 2, STRING, True, ""),
        ("name", 4, STRING, False, ""),
        ("type", 5, INT32, False, ""),
        ("blobs", 6, MESSAGE, True, "BlobProto"),
        ("blobs_lr", 7, FLOAT, True, ""),
    )
    add(
        "NetParameter",
        ("name", 1, STRING, False, ""),
        ("layers", 2, MESSAGE, True, "V1LayerParameter"),
        ("input_dim", 4, INT32, True, ""),
        ("layer", 100, MESSAGE, True, "LayerParameter"),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("c.NetParameter"))


needs_protobuf = pytest.mark.skipif(
    importlib.util.find_spec("google") is None
    or importlib.util.find_spec("google.protobuf") is None,
    reason="protobuf is not installed",
)

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
FORMS = [*itertools.product((True, False), ("layer", "layers"), ("shape", "legacy"))]


@needs_protobuf
@pytest.mark.parametrize(("packed", "layers", "dims"), FORMS)
@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(SHAPES, st.sampled_from(["data", "double_data"])), max_size=5),
    seed=st.integers(0, 99),
)
def test_messages_of_google(packed, layers, dims, rows, seed):
    rng = np.random.default_rng(seed)
    net = messages(packed)(name="net", input_dim=[1, 3, 300, 70_000])
    wanted = {}
    for index, (shape, field) in enumerate(rows):
        layer = getattr(net, layers).add(name=f"läyer{index}", bottom=["a", "b"])
        if layers == "layer":
            layer.loss_weight.extend([0.5, 2.0])
        else:
            layer.type = 4
            layer.blobs_lr.extend([1.0, 2.0])
        dtype = np.float32 if field == "data" else np.float64
        values = rng.standard_normal(shape).astype(dtype)
        blob = layer.blobs.add()
        blob.diff.extend([1.0] * values.size)
        getattr(blob, field).extend(values.ravel().tolist())
        if dims == "shape":
            blob.shape.dim.extend(shape)
        else:
            four = (1,) * (4 - len(shape)) + tuple(shape)
            blob.num, blob.channels, blob.height, blob.width = four
            values = values.reshape(four)
        wanted[f"läyer{index}.0"] = values
    raw = memoryview(net.SerializeToString())
    if not wanted:
        with pytest.raises(CheckpointError, match="no blobs"):
            _caffe.parse(raw)
        return
    found = _caffe.parse(raw)
    assert list(found) == list(wanted)
    for key, values in wanted.items():
        # proto2 has no type where there is no number.
        same_type = not values.size or found[key].numpy().dtype == values.dtype
        assert same_type and found[key].shape == values.shape, key
        assert (found[key].numpy() == values).all(), key


@needs_protobuf
def test_a_million_numbers_that_are_not_packed():
    net = messages(False)()
    blob = net.layer.add(name="a").blobs.add()
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    blob.data.extend(values.tolist())
    found = _caffe.parse(memoryview(net.SerializeToString()))["a.0"]
    assert (found.numpy() == values).all()


@needs_protobuf
def test_packed_and_other_numbers_in_one_blob():
    """A reader of protobuf has to take both, in their order."""
    blobs = [messages(packed)().layer.add().blobs.add() for packed in (False, True, False)]
    raw = b""
    for index, blob in enumerate(blobs):
        blob.data.extend([3.0 * index, 3.0 * index + 1, 3.0 * index + 2])
        raw += blob.SerializeToString()
    layer = _caffe._field(100, _caffe._field(1, b"a") + _caffe._field(7, raw))
    assert _caffe.parse(memoryview(layer))["a.0"].tolist() == [*range(9)]


@needs_protobuf
@pytest.mark.parametrize(
    ("kind", "dtype"), [(0, np.float64), (1, np.float32), (2, np.float16), (3, None), (99, None)]
)
def test_raw_numbers(kind, dtype):
    """NVIDIA's Caffe."""
    net = messages(True)()
    blob = net.layer.add(name="a").blobs.add(raw_data_type=kind)
    blob.shape.dim.extend([2, 3])
    blob.raw_data = np.arange(6, dtype=dtype or np.float32).tobytes()
    raw = memoryview(net.SerializeToString())
    if dtype is None:
        with pytest.raises(CheckpointError, match=f"raw numbers of type {kind}"):
            _caffe.parse(raw)
        return
    found = _caffe.parse(raw)["a.0"].numpy()
    assert found.dtype == dtype and found.tolist() == [[0, 1, 2], [3, 4, 5]]
    blob.raw_data = b"\0" * 7
    with pytest.raises(CheckpointError, match="7 bytes of numbers"):
        _caffe.parse(memoryview(net.SerializeToString()))


@needs_protobuf
def test_google_reads_what_is_written():
    state = {
        "conv1.0": torch.arange(24.0).reshape(2, 3, 2, 2),
        "conv1.1": torch.tensor([1.5, -2.0]),
        "größer/x.0": torch.zeros(300),
        "none.0": torch.zeros(0, 3),
    }
    net = messages(True)()
    raw = _caffe.serialize(state)
    assert net.ParseFromString(raw) == len(raw)
    found = {
        f"{layer.name}.{index}": np.array(blob.data, np.float32).reshape([*blob.shape.dim])
        for layer in net.layer
        for index, blob in enumerate(layer.blobs)
    }
    assert list(found) == list(state)
    assert all((found[key] == value.numpy()).all() for key, value in state.items())
    assert all(found[key].shape == value.shape for key, value in state.items())
    assert net.SerializeToString() == raw  # byte for byte


def test_mutated_files(tmp_path):
    """5,000 broken copies of real files, read as files: weights or a CheckpointError."""
    rng = random.Random(1)
    torch.save({"state_dict": {"a.weight": torch.ones(3, 4)}, "epoch": 3}, tmp_path / "whole.pth")
    sources = [*sorted(FILES.glob("*.caffemodel")), *sorted(FILES.glob("*.params"))]
    sources = [*sources, *sources, tmp_path / "whole.pth"]
    whole = [(path.suffix, path.read_bytes()) for path in sources]
    refused = 0
    for number in range(5000):
        suffix, data = whole[number % len(whole)]
        path = tmp_path / f"x{suffix}"
        path.write_bytes(mutated(data, rng))
        try:
            found = checkpoints.read(path)[0]
        except CheckpointError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000
        else:
            tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
            assert sum(value.numel() for value in tensors) <= 4 * len(data)
    assert 2500 < refused < 5000
