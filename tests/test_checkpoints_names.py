# SPDX-License-Identifier: Apache-2.0
"""Key formats: names and counts as published."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from _networks import on_meta
from torch import nn

from benchmarks._torchvision import segmentation_models
from pydense import checkpoints, models

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BOTH = ("weight", "bias")


def keys(name: str, format: str, **options: Any) -> list[str]:
    return list(checkpoints.convert(on_meta(models.get_model, name, **options), to_format=format))


def with_ends(names: list[str], ends: tuple[str, ...]) -> set[str]:
    return {f"{name}.{end}" for name in names for end in ends}


# What section by section the public models were counted to have.
COUNTS = [
    ("fcn32s_vgg16", "wkentaro", 33),
    ("fcn16s_vgg16", "wkentaro", 36),
    ("fcn8s_vgg16", "wkentaro", 39),
    ("fcn8s_atonce_vgg16", "caffe", 41),
    ("deeplab_v2_resnet101", "kazuto1011", 632),
    ("deeplab_v2_resnet101", "isht7", 632),
    ("deeplab_largefov_vgg16", "rulixiang", 32),
    ("deeplab_v2_vgg16", "hal42", 50),
    ("refinenet50", "drsleep", 406),
    ("refinenet101", "drsleep", 712),
    ("refinenet152", "drsleep", 1018),
    ("lw_refinenet50", "drsleep", 346),
    ("lw_refinenet101", "drsleep", 652),
    ("lw_refinenet152", "drsleep", 958),
    ("lw_refinenet_mobilenet_v2", "drsleep", 339),
    ("hrnet_w48", "hrnet", 1839),
    ("hrnet_ocr_w48", "hrnet", 1890),
    ("pspnet_resnet50", "semseg", 370),
    ("pspnet_resnet101", "semseg", 676),
    ("unet", "milesial", 118),
    ("unet_bilinear", "milesial", 110),
    ("segnet", "say4n", 209 - 32),  # 32 are those of an unused vgg16
    ("fcrn_a1", "mapillary", 232),
]


@pytest.mark.parametrize(("name", "format", "count"), COUNTS)
def test_counts(name, format, count):
    model = on_meta(models.get_model, name, **({"num_classes": 21} if "refine" in name else {}))
    assert len(checkpoints.convert(model, to_format=format)) == count


def test_counts_of_classifiers():
    classifier = on_meta(models.HRNetClassifier)
    assert len(checkpoints.convert(classifier, to_format="hrnet")) == 1956
    wide = on_meta(models.wider_resnet38_a1)
    assert len(checkpoints.convert(wide, to_format="mapillary")) == 230
    # 37 norms of 4 arrays, 43 convolutions, the classifier.
    assert len(checkpoints.convert(wide, to_format="ademxapp")) == 37 * 4 + 43 + 2


def test_names_of_kazuto1011():
    rows = [("layer1.conv1", ("",))]
    blocks = {2: 3, 3: 4, 4: 23, 5: 3}
    for layer, count in blocks.items():
        for block in range(1, count + 1):
            parts = ["reduce", "conv3x3", "increase"] + ["shortcut"] * (block == 1)
            rows += [(f"layer{layer}.block{block}", tuple(f".{p}" for p in parts))]
    units = [f"base.{at}{part}" for at, parts in rows for part in parts]
    expected = with_ends([f"{u}.conv" for u in units], ("weight",))
    expected |= with_ends([f"{u}.bn" for u in units], NORM)
    expected |= with_ends([f"base.aspp.c{i}" for i in range(4)], BOTH)
    assert set(keys("deeplab_v2_resnet101", "kazuto1011")) == expected
    plain = {key.removeprefix("base.") for key in expected}
    assert set(keys("deeplab_v2_resnet101_single_scale", "kazuto1011")) == plain


def test_names_of_deeplab_in_caffe():
    names = ["conv1"]
    for stage, blocks in (
        (2, ["a", "b", "c"]),
        (3, ["a", "b1", "b2", "b3"]),
        (4, ["a", *(f"b{i}" for i in range(1, 23))]),
        (5, ["a", "b", "c"]),
    ):
        for block in blocks:
            branches = ["2a", "2b", "2c"] + ["1"] * (block == "a")
            names += [f"res{stage}{block}_branch{branch}" for branch in branches]
    expected = with_ends(names, ("0",))
    norms = [name.removeprefix("res") if name != "conv1" else "_conv1" for name in names]
    expected |= with_ends([f"bn{name}" for name in norms], ("0", "1", "2"))
    expected |= with_ends([f"scale{name}" for name in norms], ("0", "1"))
    expected |= with_ends([f"fc1_voc12_c{i}" for i in range(4)], ("0", "1"))
    assert set(keys("deeplab_v2_resnet101", "caffe")) == expected


def test_names_of_isht7():
    found = set(keys("deeplab_v2_resnet101", "isht7"))
    for key in (
        *("Scale.conv1.weight", "Scale.bn1.running_var", "Scale.layer3.22.conv3.weight"),
        *("Scale.layer1.0.downsample.1.bias", "Scale.layer5.conv2d_list.3.bias"),
    ):
        assert key in found
    tops = {key.split(".")[1] for key in found}
    assert tops == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "layer5"}


def test_names_of_vgg16_ports():
    row = [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]
    expected = [f"block_{i}.conv{j + 1}" for i, n in row for j in range(n)]
    expected += ["conv6", "conv7", "conv8"]
    assert set(keys("deeplab_largefov_vgg16", "rulixiang")) == with_ends(expected, BOTH)
    expected = [
        f"VGGFeature.layer{i}.conv_relu_{j + 1}.conv{i}_{j + 1}" for i, n in row for j in range(n)
    ]
    for b in range(1, 5):
        at = f"VGGASPP.aspp_branch{b}"
        expected += [f"{at}.aspp_layer{k}_{b}.fc{k}_{b}" for k in (6, 7)] + [f"{at}.fc8_pascal_{b}"]
    assert set(keys("deeplab_v2_vgg16", "hal42")) == with_ends(expected, BOTH)


def test_names_of_semseg():
    found = set(keys("pspnet_resnet50", "semseg"))
    assert {key.split(".")[0] for key in found} == {"module"}
    stem = {key.split(".")[2] for key in found if key.startswith("module.layer0.")}
    assert stem == {"0", "1", "3", "4", "6", "7"}
    assert "module.ppm.features.3.1.weight" in found and "module.aux.4.bias" in found


def test_names_of_ademxapp():
    names = ["arg:conv1a_weight", "arg:linear1000_weight", "arg:linear1000_bias"]
    norms = ["bn7"]
    for level, blocks, convolutions in (
        *((2, 3, 2), (3, 3, 2), (4, 6, 2), (5, 3, 2), (6, 1, 3), (7, 1, 3)),
    ):
        for block in range(blocks):
            at = f"{level}" + (f"b{block}" if block else "a")
            for branch in ("2a", "2b1", "2b2")[:convolutions]:
                names.append(f"arg:res{at}_branch{branch}_weight")
                norms.append(f"bn{at}_branch{branch}")
            if block == 0:
                names.append(f"arg:res{at}_branch1_weight")
    for norm in norms:
        names += [f"arg:{norm}_gamma", f"arg:{norm}_beta"]
        names += [f"aux:{norm}_moving_mean", f"aux:{norm}_moving_var"]
    wide = on_meta(models.wider_resnet38_a1)
    assert set(checkpoints.convert(wide, to_format="ademxapp")) == set(names)
    found = set(keys("fcrn_a1", "ademxapp", num_classes=19))
    assert {"arg:conv6a_bias", "arg:linear19_weight"} <= found


def test_names_are_those_of_timm():
    """Names and shapes of hrnet_w18 of timm 1.0.31, for where it is not installed."""
    ours = checkpoints.convert(on_meta(models.HRNetClassifier), to_format="hrnet")
    lines = [f"{name} {tuple(value.shape)}\n" for name, value in sorted(ours.items())]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest == "574cf3f9ad19066c67a4a155107ce07ed8111141de2a5769a8e14007c4bcc3ba"


def test_names_of_timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    segmentation_models()  # an operator that some builds of torchvision lack
    timm = importlib.import_module("timm")
    theirs = on_meta(timm.create_model, "hrnet_w18", pretrained=False).state_dict()
    ours = checkpoints.convert(on_meta(models.HRNetClassifier), to_format="hrnet")
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


def test_models_have_the_names_of_torchvision():
    package = segmentation_models()
    if package is None:
        pytest.skip("torchvision is not installed")
    for name, build in (
        ("deeplab_v3_resnet50", package.deeplabv3_resnet50),
        ("fcn_resnet50", package.fcn_resnet50),
    ):
        options = {"weights": None, "weights_backbone": None, "num_classes": 21, "aux_loss": True}
        theirs = on_meta(build, **options).state_dict()
        model = on_meta(models.get_model, name, num_classes=21)
        ours = checkpoints.convert(model, to_format="torchvision")
        assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}


SCORED: dict[str, Callable[[int], nn.Module]] = {
    "fcn": partial(models.FCN, stride=8, fc_channels=8),
    "learned": partial(models.FCN, stride=8, fc_channels=8, upsampling="learned"),
    "alexnet": models.FCNAlexNet,
    "crfrnn": models.crf_as_rnn_vgg16,
    "deeplab": models.deeplab_v2_resnet101,
    "aspp": models.deeplab_v2_vgg16,
    "largefov": models.deeplab_largefov_vgg16,
    "refinenet": partial(models.RefineNet, depth=50),
    "mobilenet": models.lw_refinenet_mobilenet_v2,
    "hrnet": models.hrnet_w18_small_v1,
    "ocr": models.hrnet_ocr_w18,
    "psp": partial(models.PSPNet, depth=50),
    "unet": models.UNet,
    "segnet": models.SegNet,
    "wide": models.WiderResNet38,
    "fcrn": models.FCRN,
    "deeplab v3": models.deeplab_v3_resnet50,
}


@pytest.mark.parametrize("name", SCORED)
def test_classifiers_are_the_layers_sized_by_the_classes(name):
    """What ``reinit_classifier`` excuses, and nothing else."""
    from pydense.checkpoints import _match, _rules

    few, many = (on_meta(SCORED[name], n).state_dict() for n in (7, 9))
    sized = {key for key, value in few.items() if value.shape != many[key].shape}
    patterns = _match.classifier_of(on_meta(SCORED[name], 7))
    assert sized and {key for key in few if _rules.fits(patterns, key)} == sized


@pytest.mark.parametrize(
    ("build", "format", "option"),
    [
        (partial(models.DeepLabV2ResNet, 3, 50), "kazuto1011", "align_corners"),
        (partial(models.DeepLabV2VGG, 3, "large_fov"), "rulixiang", "ceil_mode"),
        (partial(models.SegNet, 3), "say4n", "ceil_mode"),
    ],
)
def test_options_that_no_key_shows(build, format, option):
    """Where the published networks have another value than the models, the report says so."""
    model = build()
    state = checkpoints.convert(model, to_format=format)
    report = checkpoints.plan(model, state, format=format)[0]
    assert report.complete
    note = f"note: networks of {format} have {option}=False, this model has not"
    assert note in str(report).splitlines()
    as_published = build(**{option: False})
    assert not checkpoints.plan(as_published, state, format=format)[0].notes
    assert not checkpoints.plan(model, model.state_dict(), format="pydense")[0].notes
