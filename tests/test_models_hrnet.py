# SPDX-License-Identifier: Apache-2.0
"""HRNet, OCR and the classifier: counts, plain-torch definitions, timm, twins, sizes, graphs."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from _models import check_graph, check_loss
from _networks import (
    check_classifiers,
    check_dtypes,
    check_errors,
    check_size,
    check_twins,
    count,
    fill,
)
from _ops import one_thread as one_thread
from _ops import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import batch_norm, conv2d, interpolate

from benchmarks._torchvision import segmentation_models
from pydense.models import HRNet, HRNetClassifier, HRNetOCR, HRNetWidth, get_model
from pydense.models._hrnet import HighResolutionModule

SMALL = HRNetWidth(6, (1, 8), (1, 1, 1), 1)


@pytest.fixture(scope="module")
def small():
    return fill(HRNet(5, SMALL), "last_layer.3")


@pytest.fixture(scope="module")
def small_ocr():
    model = HRNetOCR(5, SMALL, channels=16, key_channels=8)
    return fill(model, "cls_head", "aux_head.3")


@pytest.mark.parametrize(
    ("width", "parameters"),
    [
        ("w18_small_v1", 13_187_464),
        ("w18_small_v2", 15_597_464),
        ("w18", 21_299_004),
        ("w32", 41_232_680),
        ("w40", 57_557_160),
        ("w48", 77_469_864),
    ],
)
def test_counts_of_classifiers(width, parameters):
    assert count(HRNetClassifier, width) == parameters


def test_flags_of_the_published():
    """The two kinds differ in what changes results."""
    with torch.device("meta"):
        plain, ocr = get_model("hrnet_w48"), get_model("hrnet_ocr_w48")
    assert (plain.align_corners, ocr.align_corners) == (False, True)
    assert (plain.bn1.momentum, ocr.bn1.momentum) == (0.01, 0.1)
    assert ocr.output_weights == (0.4, 1.0)
    for model in (plain, ocr):
        modules = [m for m in model.modules() if isinstance(m, HighResolutionModule)]
        assert len(modules) == 8
        assert {(m.mode, m.align_corners) for m in modules} == {("bilinear", model.align_corners)}


def test_equals_timm():
    """Names, and the bits of a random network."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    segmentation_models()  # makes torchvision importable beside a torch of another build
    import timm

    own = fill(HRNetClassifier("w18"), "classifier")
    theirs = timm.create_model("hrnet_w18", pretrained=False).eval()
    assert list(theirs.state_dict()) == list(own.state_dict())
    theirs.load_state_dict(own.state_dict())
    x = random(2, 3, 96, 64, seed=2)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 0.1
        assert torch.allclose(own(x), expected, rtol=1e-5, atol=1e-5)
        # timm's own fails at sizes that are no multiples of 32.
        assert own(x[:, :, :50, :37]).shape == (2, 1000)


@pytest.mark.parametrize(
    ("align_corners", "mode"), [(False, "bilinear"), (True, "bilinear"), (False, "nearest")]
)
def test_exchange(align_corners, mode):
    """A module by its definition: what comes from finer and from coarser branches."""
    module = HighResolutionModule((3, 4, 5), 1, align_corners, mode)
    module = fill(module).double()
    maps = [random(1, c, *size, dtype=torch.float64) for c, size in ((3, (9, 13)), (4, (5, 7)))]
    maps.append(random(1, 5, 3, 4, dtype=torch.float64))
    state = module.state_dict()

    def conv(x, name, stride=1, norm=None):
        weight = state[f"{name}.weight"]
        out = conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        last = norm or f"{name.rpartition('.')[0]}.1"
        keys = ("running_mean", "running_var", "weight", "bias")
        return batch_norm(out, *(state[f"{last}.{key}"] for key in keys))

    own = []
    for i, x in enumerate(maps):
        name = f"branches.{i}.0"
        y = conv(x, f"{name}.conv1", norm=f"{name}.bn1").relu()
        own.append((conv(y, f"{name}.conv2", norm=f"{name}.bn2") + x).relu())
    for i, found in enumerate(module(maps)):
        total = own[i]
        for j in range(3):
            y = own[j]
            if j > i:
                corners = align_corners if mode == "bilinear" else None
                y = conv(y, f"fuse_layers.{i}.{j}.0")
                y = interpolate(y, own[i].shape[2:], mode=mode, align_corners=corners)
            for k in range(i - j):
                y = conv(y, f"fuse_layers.{i}.{j}.{k}.0", stride=2)
                y = y.relu() if k < i - j - 1 else y
            total = total + y if j != i else total
        assert torch.allclose(found, total.relu(), rtol=1e-10, atol=1e-10)


def head(maps, model, name, align_corners):
    size = maps[0].shape[2:]
    maps = [interpolate(y, size, mode="bilinear", align_corners=align_corners) for y in maps]
    first, norm, _, last = model.get_submodule(name)
    wide = torch.cat(maps, 1)
    y = conv2d(wide, first.weight, first.bias)
    y = batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
    return wide, conv2d(y, last.weight, last.bias)


@pytest.mark.parametrize("align_corners", [False, True])
def test_segmentation_head(align_corners):
    model = fill(HRNet(5, SMALL, align_corners=align_corners), "last_layer.3").double()
    x = random(1, 3, 45, 50, dtype=torch.float64)
    _, expected = head(list(model.features(x).values()), model, "last_layer", align_corners)
    assert torch.allclose(model.forward_low(x), expected, rtol=1e-9, atol=1e-9)


def test_object_contextual_representations(small_ocr):
    """The two heads by the paper's formulas."""
    model = HRNetOCR(5, SMALL, channels=16, key_channels=8)
    model.load_state_dict(small_ocr.state_dict())
    model = model.double().eval()
    x = random(2, 3, 45, 50, dtype=torch.float64)
    wide, auxiliary = head(list(model.features(x).values()), model, "aux_head", True)
    pixels = model.conv3x3_ocr(wide)
    share = auxiliary.flatten(2).softmax(-1)
    regions = torch.einsum("nkp,ncp->nck", share, pixels.flatten(2))[..., None]
    block = model.ocr_distri_head.object_context_block
    query, key, value = block.f_pixel(pixels), block.f_object(regions), block.f_down(regions)
    weights = torch.einsum("ndyx,ndkz->nkyx", query, key) / 8**0.5
    context = block.f_up(torch.einsum("nkyx,ndkz->ndyx", weights.softmax(1), value))
    joined = model.ocr_distri_head.conv_bn_dropout(torch.cat([context, pixels], 1))
    outputs = model.forward_outputs(x)
    assert torch.allclose(outputs[0], auxiliary, rtol=1e-9, atol=1e-9)
    assert torch.allclose(outputs[1], model.cls_head(joined), rtol=1e-9, atol=1e-9)
    # The main output alone is what the others give.
    assert torch.equal(model.forward_low(x), outputs[1])


def test_names_of_the_head():
    """As in the published checkpoints."""
    with torch.device("meta"):
        state = HRNetOCR(19, "w48").state_dict()
    block = "ocr_distri_head.object_context_block"
    for name, shape in {
        "aux_head.0.weight": (720, 720, 1, 1),
        "aux_head.3.bias": (19,),
        "conv3x3_ocr.0.bias": (512,),
        "conv3x3_ocr.1.running_var": (512,),
        f"{block}.f_pixel.1.0.weight": (256,),
        f"{block}.f_object.2.weight": (256, 256, 1, 1),
        f"{block}.f_down.1.0.running_mean": (256,),
        f"{block}.f_up.0.weight": (512, 256, 1, 1),
        "ocr_distri_head.conv_bn_dropout.0.weight": (512, 1024, 1, 1),
        "ocr_distri_head.conv_bn_dropout.1.0.bias": (512,),
        "cls_head.weight": (19, 512, 1, 1),
        "transition2.2.0.0.weight": (192, 96, 3, 3),
        "stage4.2.fuse_layers.3.0.1.0.weight": (48, 48, 3, 3),
    }.items():
        assert state[name].shape == shape, name


def test_loss(small, small_ocr):
    check_loss(small)
    check_loss(small_ocr)


def test_dtypes_and_layouts(small, small_ocr):
    check_dtypes(small)
    check_dtypes(small_ocr)


def test_initial_weights():
    """As published: tiny, but those of the OCR head."""
    torch.manual_seed(0)
    plain, ocr = HRNet(19, "w18_small_v1"), HRNetOCR(19, "w18_small_v1")
    for layer in (
        plain.conv2,
        plain.last_layer[0],
        plain.stage4[0].fuse_layers[0][3][0],
        ocr.conv2,
    ):
        assert 0.0009 < layer.weight.std() < 0.0011
    assert ocr.aux_head[0].weight.std() > 0.01 and ocr.cls_head.weight.std() > 0.01


def test_twins(small, small_ocr):
    check_twins(small)
    check_twins(small_ocr)
    nearest = fill(HRNetClassifier(SMALL, num_classes=4))
    check_classifiers(nearest, HRNetClassifier(SMALL, num_classes=4, reference=True))


@settings(max_examples=8, deadline=None)
@given(height=st.integers(33, 200), width=st.integers(33, 200))
def test_sizes(small, small_ocr, height, width):
    check_size(small, (height, width), 4)
    check_size(small_ocr, (height, width), 4)


@pytest.mark.parametrize("name", ["hrnet_w18_small_v1", "hrnet_ocr_w18"])
def test_sizes_of_the_published(name):
    last = ("cls_head", "aux_head.3") if "ocr" in name else ("last_layer.3",)
    model = fill(get_model(name, num_classes=3), *last)
    for size in ((33, 40), (64, 64), (97, 45)):
        check_size(model, size, 4)


def test_graphs(small):
    check_graph(small)


def test_graphs_of_the_classifier():
    check_graph(fill(HRNetClassifier(SMALL, num_classes=4)))


def test_graphs_of_ocr(small_ocr):
    check_graph(small_ocr)


def test_features_only(small):
    model = HRNet(5, SMALL, features_only=True)
    assert not any(name.startswith("last_layer") for name in model.state_dict())
    own = {k: v for k, v in small.state_dict().items() if not k.startswith("last_layer")}
    model.load_state_dict(own)
    maps = model.eval()(random(1, 3, 45, 50))
    assert [tuple(y.shape) for y in maps.values()] == [
        (1, 6, 12, 13),
        (1, 12, 6, 7),
        (1, 24, 3, 4),
        (1, 48, 2, 2),
    ]
    assert list(maps) == ["0", "1", "2", "3"] and model.out_channels == [6, 12, 24, 48]


def test_flags_change_results(small):
    """Each of the switches is one."""
    x = random(1, 3, 45, 50)
    for options in ({"align_corners": True}, {"fuse_mode": "nearest"}):
        other = HRNet(5, SMALL, **options).eval()
        other.load_state_dict(small.state_dict())
        assert (other(x) - small(x)).abs().max() > 0.01
    assert HRNet(5, SMALL, final_kernel_size=3).last_layer[3].weight.shape == (5, 90, 3, 3)


def test_errors():
    wrong = {"width": "w19", "align_corners": 1, "fuse_mode": "bicubic", "final_kernel_size": 2}
    check_errors(HRNet, wrong, num_classes=2)
    check_errors(HRNetOCR, {"width": None, "reference": 0}, num_classes=2)
    check_errors(HRNetClassifier, {"num_classes": 0, "width": "w"})
    with pytest.raises(ValueError, match="align_corners must be False for fuse_mode 'nearest'"):
        HRNet(2, SMALL, align_corners=True, fuse_mode="nearest")
