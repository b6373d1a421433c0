# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that say more than they hold: sizes, factors, archives, names, wrappers."""

from __future__ import annotations

import os
import struct
import threading
import tracemalloc
import zipfile
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pydense import checkpoints, models
from pydense.checkpoints import CheckpointError, _caffe

FCN8S = partial(models.FCN, 3, 8, fc_channels=8)
AT_ONCE = partial(models.FCN, 3, 8, True, fc_channels=8)
HUGE = 2**40


def caffe(model: torch.nn.Module) -> dict[str, Tensor]:
    return checkpoints.convert(model, to_format="caffe")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("upscore8.0", torch.ones(1).expand(HUGE, 1, 16, 16), "upscore8.0 must be a tensor"),
        ("scale_pool4.0", torch.full((1,), 0.01).expand(HUGE), "scale_pool4.0 must be a tensor"),
        ("scale_pool4.0", torch.full((2,), 0.01), r"scale_pool4.0 must be 0.01 in all 512"),
        ("scale_pool4.0", torch.zeros(512), r"scale_pool4.0 must be 0.01 in all 512"),
        ("upscore8.0", torch.zeros(3, 3, 16, 16, dtype=torch.complex64), "not the bilinear"),
        ("conv1_1.0", torch.zeros(1).expand(HUGE, 3, 3, 3), r"missing \(1\): conv1_1.weight"),
    ],
)
def test_tensors_expanded_from_few_numbers(key, value, text):
    model = AT_ONCE()
    with pytest.raises(CheckpointError, match=text):
        checkpoints.load(model, caffe(model) | {key: value})


@pytest.mark.parametrize(
    "factor",
    [
        "4",
        torch.ones(1, device="meta"),
        torch.ones(1, dtype=torch.complex64),
        torch.ones(1).to_sparse(),
        torch.ones(2),
    ],
    ids=["str", "meta", "complex", "sparse", "two"],
)
def test_factors_of_statistics(factor):
    model = models.DeepLabV2ResNet(3, 50, msc=False)
    state: dict[str, Any] = caffe(model) | {"bn_conv1.2": factor}
    with pytest.raises(CheckpointError, match=r"bn_conv1.2 must be one real number"):
        checkpoints.load(model, state)


def repacked(path: Any, compression: int, twice: bool = False) -> None:
    """The archive again, its parts compressed, or its directory naming one part for many."""
    with zipfile.ZipFile(path) as archive:
        parts = [(row.filename, archive.read(row)) for row in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts:
            archive.writestr(name, data)
        if twice:
            largest = max(archive.filelist, key=lambda row: row.file_size)
            archive.filelist += [largest] * 1000


@pytest.mark.parametrize("kind", ["compressed", "larger than the file"])
def test_archives_that_unpack_to_more(kind, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.zeros(2_000_000)}, path)
    assert checkpoints.read(path)[0]["weight"].numel() == 2_000_000
    deflated = kind == "compressed"
    repacked(path, zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED, not deflated)
    with pytest.raises(CheckpointError, match=kind):
        checkpoints.read(path)


def test_names_drive_no_terminal(tmp_path):
    model = models.DeepLabV2ResNet(3, 50, msc=False)
    state = caffe(model)
    name = "conv\x1b[31m"
    state |= {f"{name}.0": torch.zeros(1), f"{name}_res05.0": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(model, state)
    assert str(caught.value).isprintable() and "\\x1b[31m_res05.0 differs" in str(caught.value)
    path = tmp_path / "x.pth"
    path.write_bytes(b"\x80\x02c\x1b[31m\nname\n.")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path)
    assert str(caught.value).isprintable()


def test_tensors_beside_the_weights(tmp_path):
    state = {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}
    path = tmp_path / "x.pth"
    torch.save({"epoch": 3, "best_acc": torch.tensor(0.5), "state_dict": state}, path)
    assert list(checkpoints.read(path)[0]) == [*state]
    torch.save(state | {"model": {"name": "x"}}, path)
    assert list(checkpoints.read(path)[0]) == [*state, "model"]


def test_at_once_needs_its_factors():
    """Without them the file is of the net in stages, which has the same keys otherwise."""
    with pytest.raises(CheckpointError, match=r"missing \(2\): scale_pool4.0, scale_pool3.0"):
        checkpoints.load(AT_ONCE(), caffe(FCN8S()))
    assert checkpoints.load(AT_ONCE(), caffe(AT_ONCE())).complete
    # PyTorch's ports have the factors in their code.
    state = checkpoints.convert(FCN8S(), to_format="wkentaro")
    assert checkpoints.load(AT_ONCE(), state).complete


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_filters_of_16_bits(dtype):
    model = models.FCN(3, 32, fc_channels=8)
    state = checkpoints.convert(model, to_format="wkentaro")
    rounded = {k: v.to(dtype) for k, v in state.items()}
    assert checkpoints.load(model, rounded).complete
    rounded["upscore.weight"][0, 0, 3, 3] += 0.01
    with pytest.raises(CheckpointError, match="not the bilinear filter"):
        checkpoints.load(model, rounded)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "null byte"])
@pytest.mark.parametrize("suffix", [".pth", ".caffemodel"])
def test_no_regular_file(kind, suffix, tmp_path):
    """A pipe that nobody writes to would keep a plain open() waiting for ever."""
    path = tmp_path / f"x{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path = tmp_path / f"a\0b{suffix}"
    caught: list[Exception] = []

    def read() -> None:
        try:
            checkpoints.read(path)
        except Exception as error:
            caught.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(60)
    assert not reader.is_alive() and isinstance(caught[0], CheckpointError), caught
    assert ("not a regular file" in str(caught[0])) == (kind != "null byte")
    assert str(caught[0]).isprintable()


def test_what_stands_beside_the_weights_is_named(tmp_path):
    model = models.UNet(3, width=2)
    inner = {f"module.{k}": v for k, v in model.state_dict().items()}
    whole = {"epoch": 3, "ema": dict(inner), "model": {"state_dict": inner, "\x1b[31m": 1}}
    torch.save(whole, tmp_path / "x.pth")
    for source in (whole, tmp_path / "x.pth"):
        report = checkpoints.load(model, source)
        assert report.complete and report.about.beside == ("epoch", "ema", "\x1b[31m")
        line = "beside the weights (3): epoch, ema, \\x1b[31m"
        assert line in str(report).splitlines()
    plain = checkpoints.load(model, inner)
    assert plain.about.beside == () and "beside" not in str(plain)
    checkpoints.save(
        model, tmp_path / "x.safetensors", about=checkpoints.About("unet", beside=("a",))
    )
    assert checkpoints.read(tmp_path / "x.safetensors")[1] == checkpoints.About("unet")


def test_the_divisor_of_statistics_is_missed():
    model = models.DeepLabV2ResNet(3, 50, msc=False)
    state = caffe(model)
    del state["bn_conv1.2"]
    with pytest.raises(CheckpointError, match=r"missing \(1\): bn_conv1.2"):
        checkpoints.load(model, state)


def test_wrappers_that_hold_themselves(tmp_path):
    """Each mapping is searched a few times, whatever ways lead to it."""
    asked = []

    class Counted(dict[Any, Any]):
        def get(self, *arguments):
            asked.append(arguments[0])
            return super().get(*arguments)

        def __iter__(self):
            asked.append("all names")
            return super().__iter__()

    found = Counted({f"{i:06}": 0 for i in range(1000)})
    for key in checkpoints._files._WRAPPERS:
        found[key] = found
    with pytest.raises(CheckpointError, match="holds no weights by name"):
        checkpoints.load(models.UNet(3, width=2), found)
    assert 0 < len(asked) <= 10 * len(checkpoints._files._WRAPPERS)
    plain: dict[str, Any] = dict.fromkeys(map(str, range(1000)), 0)
    plain.update(dict.fromkeys(checkpoints._files._WRAPPERS, plain))
    torch.save(plain, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        checkpoints.read(tmp_path / "x.pth")


def test_wrappers_are_found_behind_ways_that_end():
    """A mapping that was too deep on one way is searched again on a shorter one."""
    inner = {"model": {"net": {"a.weight": torch.ones(1)}}}
    deep = {"state_dict": {"state_dict": {"state_dict": inner}}, "net": inner}
    assert [*checkpoints._files.unwrap(deep)[0]] == ["a.weight"]


@pytest.mark.parametrize(
    "key", [10**5000, (1, 2), None, torch.ones(2), b"a"], ids=lambda key: type(key).__name__
)
def test_names_beside_that_are_no_texts(key):
    model = models.UNet(3, width=2)
    weights = model.state_dict()
    report = checkpoints.load(model, {key: 1, "model": weights, "epoch": 3})
    assert report.about.beside == (f"<{type(key).__name__}>", "epoch")
    assert f"beside the weights (2): <{type(key).__name__}>, epoch" in str(report)
    with pytest.raises(CheckpointError, match="names that are no texts"):
        checkpoints.load(model, {**weights, key: 1})


def test_names_beside_are_not_without_end():
    model = models.UNet(3, width=2)
    many = {f"a{i}": 1 for i in range(3000)}
    report = checkpoints.load(model, {**many, "model": {**many, "net": model.state_dict()}})
    assert report.about.beside == tuple(f"a{i}" for i in range(1000))


def caffe_file(numbers: bytes, count: int) -> memoryview:
    """A net of one layer with one blob of so many numbers."""
    field, number = _caffe._field, _caffe._number
    blob = field(7, field(1, number(count))) + numbers
    return memoryview(field(100, field(1, b"a") + field(7, blob)))


def test_caffe_s_empty_fields():
    """Two bytes each, and nothing in memory."""
    empty, one = b"\x2a\x00", b"\x2d" + struct.pack("<f", 3)
    raw = caffe_file(empty * 100_000 + one, 1)
    tracemalloc.start()
    found = _caffe.parse(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["a.0"].tolist() == [3] and peak < 1_000_000


@pytest.mark.parametrize(
    "piece",
    [
        b"\x2d\0\0\0\0" + b"\x08\x01",
        b"\x2d\0\0\0\0" + b"\x41" + bytes(8),
        b"\x2a\x04\0\0\0\0",
    ],
    ids=["number, dimension", "float, double", "packed"],
)
def test_caffe_s_numbers_in_pieces(piece):
    with pytest.raises(CheckpointError, match="numbers in too many pieces"):
        _caffe.parse(caffe_file(piece * 200_000, 200_000))


@pytest.mark.parametrize("where", ["net", "layer", "blob", "shape"])
def test_caffe_s_fields_are_counted(where, monkeypatch):
    """However few bytes each has, all take time; a million is far more than any net has."""
    assert _caffe._MAX_FIELDS == 1_000_000
    monkeypatch.setattr(_caffe, "_MAX_FIELDS", 1000)
    field, many = _caffe._field, b"\x78\x00" * 1000
    raw = {
        "net": many,
        "layer": field(100, many),
        "blob": field(100, field(7, many)),
        "shape": field(100, field(7, field(7, many))),
    }[where]
    with pytest.raises(CheckpointError, match=r"more than 1000 fields|no blobs") as caught:
        _caffe.parse(memoryview(raw + b"\x78\x00"))
    assert "fields" in str(caught.value)


@pytest.mark.parametrize(("tag", "kind"), [(0x2D, "<f4"), (0x41, "<f8")])
def test_caffe_s_long_runs(tag, kind, monkeypatch):
    """Numbers one by one, as writers without packed fields make them, and their differences: each
    run of them is one step."""
    monkeypatch.setattr(_caffe, "_MAX_FIELDS", 100)
    count = 2_000_000
    rows = np.zeros(count, [("tag", "u1"), ("value", kind)])
    rows["tag"], rows["value"] = tag, np.arange(count)
    differences = rows.copy()
    differences["tag"] += 8
    raw = caffe_file(rows.tobytes() + differences.tobytes(), count)
    found = _caffe.parse(raw)["a.0"]
    assert torch.equal(found, torch.arange(count, dtype=found.dtype))
    assert found.dtype == {"<f4": torch.float32, "<f8": torch.float64}[kind]
