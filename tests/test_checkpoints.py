# SPDX-License-Identifier: Apache-2.0
"""Key formats: round trips, reports of what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _networks import fill, on_meta
from torch import Tensor, nn
from torch.nn import functional

from pydense import checkpoints, models
from pydense.checkpoints import CheckpointError

# Small members of every family, and the suffixes of files of their formats.
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "fcn8s": partial(models.FCN, 3, 8, fc_channels=8),
    "fcn16s": partial(models.FCN, 3, 16, fc_channels=8),
    "fcn32s": partial(models.FCN, 3, 32, fc_channels=8),
    "atonce": partial(models.FCN, 3, 8, True, fc_channels=8),
    "learned": partial(models.FCN, 3, 8, fc_channels=8, upsampling="learned"),
    "crfrnn": partial(models.crf_as_rnn_vgg16, 3, fc_channels=8),
    "deeplab": partial(models.DeepLabV2ResNet, 3, 50, msc=False),
    "aspp": partial(models.DeepLabV2VGG, 3, "aspp"),
    "largefov": partial(models.DeepLabV2VGG, 3, "large_fov"),
    "mobilenet": partial(models.lw_refinenet_mobilenet_v2, 3),
    "hrnet": partial(models.hrnet_w18_small_v1, 3),
    "psp": partial(models.PSPNet, 3, 50),
    "psp-caffe": partial(models.PSPNet, 3, 50, aux=False, stride_on="1x1", ceil_mode=True),
    "alexnet": partial(models.FCNAlexNet, 3, fc_channels=8),
    "ocr": partial(models.hrnet_ocr_w18, 3),
    "refinenet": partial(models.LightWeightRefineNet, 3, 50),
    "unet": partial(models.UNet, 3, width=4),
    "segnet": partial(models.SegNet, 3),
    "wide": partial(models.WiderResNet38, 7, width=0.05),
    "fcrn": partial(models.FCRN, 3, width=0.05, head_channels=8),
    "torchvision": partial(models.fcn_resnet50, 3),
}
PAIRS = [
    ("fcn8s", "wkentaro", ".pth"),
    ("fcn16s", "wkentaro", ".pth"),
    ("fcn32s", "wkentaro", ".safetensors"),
    ("learned", "wkentaro", ""),
    ("crfrnn", "sadeepj", ""),
    ("fcn8s", "caffe", ".caffemodel"),
    ("atonce", "caffe", ".caffemodel"),
    ("deeplab", "kazuto1011", ""),
    ("deeplab", "isht7", ""),
    ("deeplab", "caffe", ".caffemodel"),
    ("aspp", "hal42", ""),
    ("aspp", "caffe", ""),
    ("largefov", "rulixiang", ""),
    ("largefov", "caffe", ""),
    ("mobilenet", "drsleep", ".tar"),
    ("hrnet", "hrnet", ".pth"),
    ("psp", "semseg", ""),
    ("psp-caffe", "caffe", ""),
    ("alexnet", "caffe", ""),
    ("ocr", "hrnet", ""),
    ("refinenet", "drsleep", ""),
    ("unet", "milesial", ".pt"),
    ("segnet", "say4n", ""),
    ("wide", "mapillary", ".pth"),
    ("wide", "ademxapp", ".params"),
    ("fcrn", "mapillary", ""),
    ("fcrn", "ademxapp", ".params"),
    ("torchvision", "torchvision", ""),
]


@pytest.mark.parametrize(("family", "format", "suffix"), PAIRS)
def test_round_trip(family, format, suffix, tmp_path):
    model, other = (BUILDS[family]().eval() for _ in range(2))
    fill(model, seed=1)
    source: Any = checkpoints.convert(model, to_format=format)
    if suffix:
        checkpoints.save(model, tmp_path / f"file{suffix}", to_format=format)
        source = tmp_path / f"file{suffix}"
    report = checkpoints.load(other, source)
    assert format in (report.format, *report.equivalent) and report.complete
    own = model.state_dict()
    assert sorted(report.loaded + report.kept) == sorted(own)
    assert all(key.endswith("num_batches_tracked") for key in report.kept)
    for key, value in other.state_dict().items():
        assert torch.equal(value, own[key]), key
    if family in ("fcn16s", "fcn32s", "learned", "crfrnn", "atonce"):  # slow, and like fcn8s
        return
    x = torch.rand(1, 3, 33, 40, generator=torch.manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_say4n_means_transposed_convolutions():
    model = models.SegNet(3).eval()
    fill(model)
    state = checkpoints.convert(model, to_format="say4n")
    x = torch.rand(1, 64, 9, 8, dtype=torch.float64)
    weight, bias = (state[f"decoder_convtr_00.0.{end}"].double() for end in ("weight", "bias"))
    theirs = functional.conv_transpose2d(x, weight, bias, padding=1)
    assert (model.double().classifier(x) - theirs).abs().max() < 1e-12


def unet(**options: Any) -> models.UNet:
    return models.UNet(3, width=4, **options)


def test_prefixes_and_wrappers(tmp_path):
    model = unet()
    state = model.state_dict()
    wrapped: dict[str, Any] = {
        "epoch": 3,
        "optimizer": {"param_groups": []},
        "state_dict": {f"module.model.{k}": v for k, v in state.items()} | {"mask_values": [0, 1]},
    }
    torch.save(wrapped, tmp_path / "a.pth")
    report = checkpoints.load(unet(), tmp_path / "a.pth")
    assert report.complete and report.prefix == "module.model."
    assert report.dropped == [("mask_values", "values of the label pictures")]
    assert "mask_values (values of the label pictures)" in str(report)


def test_every_key_is_reported_and_nothing_changes():
    model = unet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    del state["inc.double_conv.0.weight"]
    state["down1.maxpool_conv.1.double_conv.0.weight"] = torch.zeros(2, 3, 1, 1)
    state["new\x1b[31m.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(model, state)
    text = str(caught.value)
    assert "missing (1): inc.double_conv.0.weight" in text
    assert "mis-shaped (1): down1.maxpool_conv.1.double_conv.0.weight (2, 3, 1, 1) for" in text
    assert "unexpected (1): new\\x1b[31m.weight" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.warns(UserWarning, match=r"missing \(1\)"):
        report = checkpoints.load(model, state, strict=False)
    assert not report.complete and len(report.loaded) == len(before) - 2
    assert report.unexpected == ["new\x1b[31m.weight"]
    assert torch.equal(model.outc.conv.bias, before["outc.conv.bias"] + 1)


def test_another_number_of_classes():
    state = unet().state_dict()
    other = models.UNet(5, width=4)
    fresh = other.outc.conv.weight.clone()
    with pytest.raises(CheckpointError, match=r"mis-shaped \(2\): outc.conv.weight"):
        checkpoints.load(other, state)
    report = checkpoints.load(other, state, reinit_classifier=True)
    assert report.reinitialized == ["outc.conv.weight", "outc.conv.bias"] and report.complete
    assert torch.equal(other.outc.conv.weight, fresh)
    # Another width is no other classifier.
    with pytest.raises(CheckpointError, match="mis-shaped"):
        checkpoints.load(models.UNet(3, width=8), state, reinit_classifier=True)


def test_number_of_classes_in_names():
    model = models.FCRN(3, width=0.05, head_channels=8)
    state = checkpoints.convert(model, to_format="ademxapp")
    other = models.FCRN(5, width=0.05, head_channels=8)
    with pytest.raises(CheckpointError, match="mis-shaped"):
        checkpoints.load(other, state)
    report = checkpoints.load(other, state, reinit_classifier=True)
    assert report.reinitialized == ["linear.weight", "linear.bias"]


def test_fixed_filters_are_verified():
    model = BUILDS["fcn8s"]()
    state = checkpoints.convert(model, to_format="wkentaro")
    report = checkpoints.load(model, state)
    assert report.format == "wkentaro" and report.equivalent == ()
    assert report.preprocessing == "caffe-fcn"
    assert [key for key, _ in report.dropped] == [
        "upscore2.weight",
        "upscore_pool4.weight",
        "upscore8.weight",
    ]
    state["upscore8.weight"][0, 0, 3, 3] += 0.01
    with pytest.raises(CheckpointError, match=r"upscore8.weight .* not the bilinear filter"):
        checkpoints.load(model, state)
    # That of another net is no filter of this one.
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): upscore16.weight"):
        state = checkpoints.convert(model, to_format="wkentaro")
        checkpoints.load(model, state | {"upscore16.weight": torch.zeros(3, 3, 32, 32)})
    caffe = checkpoints.convert(BUILDS["atonce"](), to_format="caffe")
    with pytest.raises(CheckpointError, match=r"unexpected \(2\): scale_pool4.0, scale_pool3.0"):
        checkpoints.load(model, caffe)
    caffe["scale_pool3.0"] *= 2
    with pytest.raises(CheckpointError, match=r"scale_pool3.0 must be 0.0001"):
        checkpoints.load(BUILDS["atonce"](), caffe)


def test_caffe_statistics_and_copies():
    model = BUILDS["deeplab"]().eval()
    fill(model)
    state = checkpoints.convert(model, to_format="caffe")
    for name in ("bn_conv1.0", "bn_conv1.1"):
        state[name] = state[name] * 4
    state["bn_conv1.2"] = torch.full((1, 1, 1, 1), 4.0)
    state["scale_conv1.0"] = state["scale_conv1.0"].reshape(1, 1, 1, -1)  # as old Caffe has it
    state["conv1_res05.0"] = state["conv1.0"].clone()
    other = BUILDS["deeplab"]()
    report = checkpoints.load(other, state)
    assert report.dropped == [("conv1_res05.0", "the same as conv1.0")]
    assert torch.equal(other.backbone.bn1.running_var, model.backbone.bn1.running_var)
    assert torch.equal(other.backbone.bn1.weight, model.backbone.bn1.weight)
    state["conv1_res05.0"][0] += 1
    with pytest.raises(CheckpointError, match=r"conv1_res05.0 differs from conv1.0"):
        checkpoints.load(other, state)


def test_releases_of_hrnet():
    model = BUILDS["hrnet"]()
    state = checkpoints.convert(model, to_format="hrnet") | {"loss.criterion.weight": torch.ones(3)}
    report = checkpoints.load(BUILDS["hrnet"](), state)
    assert report.prefix == "model." and report.complete
    assert report.dropped == [("loss.criterion.weight", "weights of the training loss")]
    assert report.format == "hrnet" and report.equivalent == ()


def test_beginning_from_classifiers():
    model = on_meta(models.HRNetClassifier)
    state = {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}
    net = models.hrnet_w18(3)
    with pytest.raises(CheckpointError, match="unexpected"):
        checkpoints.load(net, state)
    report = checkpoints.load(net, state, format="hrnet-imagenet")
    assert report.complete and {key.split(".")[0] for key in report.kept} == {"last_layer"}
    assert {key.split(".")[0] for key, _ in report.dropped} == {
        *("incre_modules", "downsamp_modules", "final_layer", "classifier")
    }
    fcn = models.FCN(3, 32, fc_channels=16)
    state = checkpoints.convert(fcn, to_format="torchvision-classifier")
    state["classifier.0.weight"] = state["classifier.0.weight"].reshape(16, -1)
    state["classifier.3.weight"] = state["classifier.3.weight"].reshape(16, 16)
    state["classifier.6.weight"] = torch.zeros(1000, 16)
    other = models.FCN(3, 32, fc_channels=16)
    report = checkpoints.load(other, state, format="torchvision-classifier")
    assert torch.equal(other.fc6.weight, fcn.fc6.weight) and len(report.kept) == 2


class Runs:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("modern", [True, False])
def test_pickled_code_is_never_run(modern, tmp_path):
    sign = tmp_path / "was_run"
    state = {"weight": torch.zeros(1), "extra": Runs(sign)}
    path = tmp_path / "evil.pth"
    torch.save(state, path, _use_new_zipfile_serialization=modern)
    with pytest.raises(CheckpointError, match="more than tensors") as caught:
        checkpoints.load(unet(), path)
    assert "weights_only=False" not in str(caught.value)
    path.write_bytes(pickle.dumps({"weight": Runs(sign)}))
    with pytest.raises(CheckpointError):
        checkpoints.load(unet(), path)
    assert not sign.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".caffemodel", ".params"])
def test_truncated_files(suffix, tmp_path):
    path = tmp_path / f"file{suffix}"
    state = {"a.0": torch.rand(5, 7), "b.0": torch.rand(40)}
    checkpoints.write(path, state)
    whole = path.read_bytes()
    assert {k: v.tolist() for k, v in checkpoints.read(path)[0].items()} == {
        k: v.tolist() for k, v in state.items()
    }
    for end in {0, 1, 7, 9, 20, 40, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="file"):
            checkpoints.read(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "neither"),
        (b"hello world, this is no checkpoint", "neither"),
        (b"\x80\x02}q\x00.", "broken PyTorch file"),
    ],
)
def test_other_files(content, text, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        checkpoints.read(path)


def test_bad_arguments(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoints.load(unet(), tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"not a regular|Is a directory"):
        checkpoints.load(unet(), tmp_path)
    with pytest.raises(CheckpointError, match="format must be one of milesial, pydense"):
        checkpoints.load(unet(), unet().state_dict(), format="caffe")
    with pytest.raises(CheckpointError, match="no key of the checkpoint"):
        checkpoints.load(unet(), {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no weights by name"):
        checkpoints.load(unet(), {"x": 3})
    with pytest.raises(CheckpointError, match="no place for"):
        checkpoints.convert(on_meta(models.deeplab_v2_vgg16), to_format="rulixiang")
    with pytest.raises(CheckpointError, match="path must end in"):
        checkpoints.save(unet(), tmp_path / "x.bin")
    complex_ = {k: v.to(torch.complex64) for k, v in unet().state_dict().items()}
    with pytest.raises(CheckpointError, match="real numbers"):
        checkpoints.load(unet(), complex_)


def test_any_module_has_its_own_keys():
    layer, other = nn.Linear(2, 3), nn.Linear(2, 3)
    report = checkpoints.load(other, {f"module.{k}": v for k, v in layer.state_dict().items()})
    assert report.format == "pydense" and torch.equal(other.weight, layer.weight)
    assert checkpoints.formats(layer) == ["pydense"]


def test_half_precision_and_about(tmp_path):
    path = tmp_path / "net.safetensors"
    model = unet()
    about = checkpoints.About("unet", {"num_classes": 3, "width": 4}, "imagenet", "camvid")
    checkpoints.save(model.half(), path, about=about)
    other = unet()
    report = checkpoints.load(other, path)
    assert report.about == about and other.outc.conv.weight.dtype == torch.float32
    assert torch.equal(other.outc.conv.weight, model.outc.conv.weight.float())


def test_preprocessing():
    picture = torch.randint(0, 256, (4, 5, 3), generator=torch.manual_seed(0), dtype=torch.uint8)
    x = picture.double().permute(2, 0, 1)
    rows: dict[str, Tensor] = {
        "imagenet": (x / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
        "unit": x / 255,
        "caffe-deeplab": x.flip(0) - torch.tensor([104.008, 116.669, 122.675]).view(3, 1, 1),
        "caffe-vgg": x.flip(0) - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1),
        "digits": x - 116,
    }
    for name, expected in rows.items():
        found = checkpoints.PREPROCESSING[name](picture)
        assert found.shape == (3, 4, 5) and found.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-4


def test_preprocessing_of_every_format():
    """All are known but two, which say why not."""
    from pydense.checkpoints import _match

    rows = [(family.models[0], f) for family in _match._FAMILIES for f in family.formats]
    unknown = {(model, f.name) for model, f in rows if f.preprocessing is None}
    assert unknown == {("DeepLabV2VGG", "hal42"), ("FCNAlexNet", "caffe")}
    for _, format in rows:
        assert format.preprocessing is None or format.preprocessing in checkpoints.PREPROCESSING
        assert format.preprocessing or format.source
