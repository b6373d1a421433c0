# SPDX-License-Identifier: Apache-2.0
"""`pydense predict`: what it makes of the network itself, its CRF, its weights, its options."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from _cli import run_error, run_ok, scene
from _models import small_resnet
from _networks import on_meta
from PIL import Image
from torch import Tensor, nn

from pydense import checkpoints, models
from pydense.checkpoints import PREPROCESSING, About
from pydense.cli._errors import CommandError
from pydense.cli._labelmaps import read_truth
from pydense.cli._legends import LEGENDS
from pydense.cli._predict_run import _preprocessing
from pydense.models import _registry, average_logits, deeplab_v2
from pydense.nn import DenseCRF


class Small(deeplab_v2._DeepLabV2):
    """A DeepLab v2 of one convolution."""

    def __init__(
        self, num_classes: int = 3, *, crf: Any = None, features_only: bool = False
    ) -> None:
        super().__init__(num_classes, features_only)
        self._set_up(False, True, crf)
        self.score = nn.Conv2d(3, num_classes, 3, 2, 1)
        self._finish(False)

    def forward_scale(self, x: Tensor) -> Tensor:
        """Logits of stride 2."""
        scores: Tensor = self.score(x)
        return scores


def small(num_classes: int = 3, **options: Any) -> Small:
    return Small(num_classes, **options)


def small_crf(num_classes: int = 3, **options: Any) -> Small:
    return Small(num_classes, crf=deeplab_v2.CRF_VGG, **options)


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A picture, and the small networks under their names."""
    for build in (small, small_crf):
        monkeypatch.setitem(_registry._MODELS, build.__name__, build)
    path = tmp_path / "photo.png"
    Image.fromarray(scene()).save(path)
    return path


@pytest.mark.parametrize("name", ["small", "small_crf"])
@pytest.mark.parametrize("more", [(), ("--crf",)])
def test_crf_of_the_network(name, more, photo, tmp_path):
    """A network with a CRF is run with it, and ``--crf`` puts no other one behind it."""
    torch.manual_seed(0)
    model = models.get_model(name).eval()
    checkpoints.save(model, tmp_path / "w.safetensors", about=About(name, {}, "imagenet"))
    out = tmp_path / "o.png"
    run_ok("predict", photo, "--checkpoint", tmp_path / "w.safetensors", "-o", out, *more)
    pixels = torch.from_numpy(np.asarray(Image.open(photo)).copy())[None]
    logits = average_logits(model, PREPROCESSING["imagenet"](pixels).contiguous())
    plain = logits.argmax(1)[0].numpy()
    expected = plain
    if name == "small_crf" or more:
        crf = model.crf or DenseCRF(iterations=5)
        with torch.no_grad():
            expected = crf(logits, pixels.permute(0, 3, 1, 2)).argmax(1)[0].numpy()
        assert (expected != plain).any()
    assert (np.asarray(Image.open(out)) == expected).all()


def test_no_second_crf_behind_crf_as_rnn(photo, tmp_path):
    """It is refused before the weights are compared: a file of one tensor does."""
    torch.save({"x": torch.zeros(1)}, tmp_path / "w.pth")
    call = ("predict", photo, "--checkpoint", tmp_path / "w.pth", "-o", tmp_path / "o.png")
    call = (*call, "--model", "crf_as_rnn_vgg16")
    message = run_error(*call, "--crf", code=2)
    assert message == "--crf: crf_as_rnn_vgg16 ends in a CRF of its own, which is always run"
    assert "no key of the checkpoint" in run_error(*call)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_checkpoints_that_are_no_files(kind, photo, tmp_path):
    path = tmp_path / "w.pth"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    call = ("predict", photo, "--checkpoint", path, "-o", tmp_path / "o.png", "--model", "unet")
    assert run_error(*call).endswith("w.pth: not a regular file")


def test_where_preprocessing_comes_from(photo, tmp_path):
    """The source of a format's preprocessing is printed; without one the command asks, and why."""
    torch.manual_seed(0)
    model = models.SegNet(3, ceil_mode=False).eval()
    state = checkpoints.convert(model, to_format="say4n")
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "w.pth")
    Image.fromarray(scene(40, 70)).save(photo)
    out = tmp_path / "o.png"
    call = ("predict", photo, "--checkpoint", tmp_path / "w.pth", "-o", out, "--model", "segnet")
    result = run_ok(*call, "--classes", 3, "--option", "ceil_mode=false")
    assert "keys of say4n; input unit\n" in result.out
    assert "  input as in say4n/pytorch-segnet: src/dataset.py, which scales" in result.out
    assert "  beside the weights (1): epoch\n" in result.out
    pixels = torch.from_numpy(np.asarray(Image.open(photo)).copy())[None]
    expected = model.predict(PREPROCESSING["unit"](pixels).contiguous())[0].numpy()
    assert (np.asarray(Image.open(out)) == expected).all()
    hal42 = checkpoints.plan(on_meta(models.deeplab_v2_vgg16, 3), hal42_keys())[0]
    assert hal42.preprocessing is None
    with pytest.raises(CommandError, match=r"give --preprocess, .* \(HAL-42/AlchemyCat: its VOC"):
        _preprocessing(None, About(), hal42, None)


def hal42_keys() -> dict[str, Tensor]:
    model = on_meta(models.deeplab_v2_vgg16, 3)
    state = checkpoints.convert(model, to_format="hal42")
    return {key: torch.zeros(1).new_empty(value.shape) for key, value in state.items()}


def test_networks_without_head_are_refused(photo, tmp_path):
    """Formats that begin a training leave the scores random: such labels would mean nothing."""
    model = models.fcn_resnet50(3)
    state = {k[9:]: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    path = tmp_path / "backbone.pth"
    torch.save(state, path)
    call = ("predict", photo, "--checkpoint", path, "-o", tmp_path / "o.png")
    call = (*call, "--model", "fcn_resnet50", "--classes", 3, "--format", "torchvision-backbone")
    assert "they have no weights for classifier.0.weight" in run_error(*call)
    assert not (tmp_path / "o.png").exists()


def test_the_whole_report_is_shown(photo, tmp_path):
    model = models.UNet(3)
    state = model.state_dict() | {"mask_values": torch.zeros(3)}
    torch.save(state, tmp_path / "w.pth")
    result = run_ok(
        *("predict", photo, "--checkpoint", tmp_path / "w.pth", "-o", tmp_path / "o.png"),
        *("--model", "unet", "--classes", 3, "--format", "milesial"),
    )
    assert "  dropped (1): mask_values (values of the label pictures)\n" in result.out


@pytest.mark.parametrize(
    ("about", "text"),
    [
        (About("unet", {"width": float("nan")}), "cannot be built"),
        (About("small_crf", {"crf": 3}), "cannot be built"),
        (About("fcn8s_vgg16", {"fc_channels": -1}), "cannot be built"),
        (About("refinenet50", {"channels": []}), "cannot be built"),
        (About("unet", {"features_only": True}), "option features_only label nothing"),
        (About("\x1b[31m", {}), "\\x1b[31m"),
    ],
)
def test_options_that_lie(about, text, photo, tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoints.write(path, {"weight": torch.zeros(1)}, about)
    call = ("predict", photo, "--checkpoint", path, "-o", tmp_path / "o.png")
    message = run_error(*call, code=2 if "x1b" in text else 1)
    assert text in message and message.isprintable()
    if about.model == "unet":
        assert "is of unet" in run_error(*call, "--model", "segnet", code=2)


def test_indices_of_ade20k(photo, tmp_path):
    """Its maps count from 1, and 0 is no truth: what is written is read as the same labels."""
    torch.manual_seed(1)
    model = models.get_model("small", num_classes=150).eval()
    about = About("small", {"num_classes": 150}, "imagenet", "ade20k")
    checkpoints.save(model, tmp_path / "w.safetensors", about=about)
    out = tmp_path / "o.png"
    call = ("predict", photo, "--checkpoint", tmp_path / "w.safetensors", "-o")
    run_ok(*call, out, "--legend", tmp_path / "legend.png")
    pixels = torch.from_numpy(np.asarray(Image.open(photo)).copy())[None]
    labels = model.predict(PREPROCESSING["imagenet"](pixels).contiguous())[0].numpy()
    picture = Image.open(out)
    assert (np.asarray(picture) == labels + 1).all()
    colors = np.array(LEGENDS["ade20k"].colors)
    assert (np.asarray(picture.convert("RGB")) == colors[labels]).all()
    again = run_ok(*call, tmp_path / "again.png", "--truth", out)
    assert "mIoU 100.00" in again.out and "pixel accuracy 100.00" in again.out


def test_void_colours_of_cityscapes(tmp_path):
    void = (
        *("000000", "510051", "faaaa0", "e6968c", "b4a5b4"),
        *("966464", "96785a", "00005a", "00006e", "6f4a00"),
    )
    row = np.array([[tuple(bytes.fromhex(c)) for c in [*void, "804080"]]], np.uint8)
    Image.fromarray(row).save(tmp_path / "x.png")
    found = read_truth(tmp_path / "x.png", (1, 11), LEGENDS["cityscapes"], 19, 100)
    assert found.tolist() == [[-1] * 10 + [0]]
    assert len({*LEGENDS["cityscapes"].void_colors}) == 10


@pytest.mark.parametrize("option", ["-o", "--overlay"])
@pytest.mark.parametrize("name", ["labels.bmp", "labels.npy"])
def test_a_file_of_another_kind_is_no_folder(option, name, photo, tmp_path):
    out = ("-o", tmp_path / "o.png") if option != "-o" else ()
    call = ("predict", photo, "--checkpoint", tmp_path / "none", *out, option, tmp_path / name)
    assert f"or be a folder, got {name}" in run_error(*call, code=2)
    assert not (tmp_path / name).exists()
    call = ("predict", photo, "--checkpoint", tmp_path / "none", "-o", tmp_path / "o.jpg")
    assert "--output must end in .png or be a folder" in run_error(*call, code=2)


def test_options_of_the_constructor(photo, tmp_path):
    """Options that no key shows are given by hand, as a file's own are; they win over these."""
    torch.manual_seed(2)
    model = models.UNet(3, width=4).eval()
    about = About("unet", {"width": 8, "num_classes": 3}, "imagenet")
    checkpoints.save(model, tmp_path / "w.safetensors", about=about)
    out = tmp_path / "o.png"
    call = ("predict", photo, "--checkpoint", tmp_path / "w.safetensors", "-o", out)
    assert "does not fit unet" in run_error(*call)
    run_ok(*call, "--option", "width=4", "--option", "reference=True")
    pixels = torch.from_numpy(np.asarray(Image.open(photo)).copy())[None]
    expected = model.predict(PREPROCESSING["imagenet"](pixels).contiguous())[0].numpy()
    assert (np.asarray(Image.open(out)) == expected).all()
    for text, why, code in (
        ("width", "must be NAME=VALUE", 2),
        ("=3", "must be NAME=VALUE", 2),
        ('width={"a":1}', "must be a number, a word", 2),
        ("width=many", "cannot be built", 1),
        ("features_only=true", "label nothing", 1),
        ("no_such=[1,2]", "cannot be built", 1),
    ):
        assert why in run_error(*call, "--option", text, code=code)


def test_options_of_the_checkpoint_s_network(photo, tmp_path, monkeypatch):
    """Caffe's PSPNet has no auxiliary output: the message names the options to give."""
    with small_resnet() as depth:
        build = partial(models.PSPNet, depth=depth)
        monkeypatch.setitem(_registry._MODELS, "pspnet_small", build)
        torch.manual_seed(0)
        model = models.get_model("pspnet_small", num_classes=3, aux=False, ceil_mode=True).eval()
        weights, out = tmp_path / "w.caffemodel", tmp_path / "o.png"
        checkpoints.save(model, weights, to_format="caffe")
        call = ("predict", photo, "--checkpoint", weights, "-o", out, "--model", "pspnet_small")
        call = (*call, "--classes", 3)
        message = run_error(*call)
        assert "missing (" in message and "aux.0.weight" in message
        assert message.endswith("give --option aux=false --option ceil_mode=true")
        result = run_ok(*call, "--option", "aux=false")
        assert "  give --option ceil_mode=true\n" in result.out
        result = run_ok(*call, "--option", "aux=false", "--option", "ceil_mode=true")
        assert "give" not in result.out and "input caffe-vgg" in result.out
    pixels = torch.from_numpy(np.asarray(Image.open(photo)).copy())[None]
    expected = model.predict(PREPROCESSING["caffe-vgg"](pixels).contiguous())[0].numpy()
    assert (np.asarray(Image.open(out)) == expected).all()
