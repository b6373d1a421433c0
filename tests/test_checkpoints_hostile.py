# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that say more than they hold: sizes, factors, archives, names, wrappers."""

from __future__ import annotations

import os
import threading
import zipfile
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pydense import checkpoints, models
from pydense.checkpoints import CheckpointError

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
