# SPDX-License-Identifier: Apache-2.0
"""RefineNet and its light-weight form: counts, plain-torch definitions, twins, sizes, graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from _models import check_graph, small_resnet
from _networks import check_dtypes, check_errors, check_size, check_twins, fill
from _ops import one_thread as one_thread
from _ops import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import batch_norm, conv2d, interpolate, max_pool2d, relu6

from pydense.models import (
    LightWeightRefineNet,
    LightWeightRefineNetMobileNet,
    RefineNet,
    get_model,
)

NARROW = (24, 16)


def build(kind=RefineNet, **options):
    with small_resnet() as depth:
        return kind(5, depth, channels=NARROW, **options)


@pytest.fixture(scope="module")
def full():
    return fill(build(), "clf_conv")


@pytest.fixture(scope="module")
def light():
    return fill(build(LightWeightRefineNet), "clf_conv")


@pytest.fixture(scope="module")
def mobile():
    return fill(LightWeightRefineNetMobileNet(5, channels=16), "segm")


def test_names():
    """Of the published checkpoints."""
    with torch.device("meta"):
        full, light = get_model("refinenet101").state_dict(), get_model("lw_refinenet50")
        mobile = get_model("lw_refinenet_mobilenet_v2").state_dict()
    own = [k for k in full if not k.startswith(("conv1", "bn1", "layer"))]
    expected = []
    for stage in (1, 2, 3, 4):
        expected.append(f"p_ims1d2_outl{stage}_dimred.weight")
        for i in (1, 2):
            unit = f"adapt_stage{stage}_b.0.{i}_conv"
            expected += [f"{unit}{end}" for end in (".weight", ".bias")]
            expected.append(f"{unit}_relu_varout_dimred.weight")
        if stage > 1:
            expected.append(f"adapt_stage{stage}_b2_joint_varout_dimred.weight")
        expected += [f"mflow_conv_g{stage}_pool.0.{i}_outvar_dimred.weight" for i in (1, 2, 3, 4)]
        for i in (1, 2, 3):
            unit = f"mflow_conv_g{stage}_b.0.{i}_conv"
            expected += [f"{unit}{end}" for end in (".weight", ".bias")]
            expected.append(f"{unit}_relu_varout_dimred.weight")
        if stage < 4:
            expected.append(f"mflow_conv_g{stage}_b3_joint_varout_dimred.weight")
    assert sorted(own) == sorted([*expected, "clf_conv.weight", "clf_conv.bias"])
    assert full["layer3.22.conv2.weight"].shape == (256, 256, 3, 3)
    assert full["p_ims1d2_outl1_dimred.weight"].shape == (512, 2048, 3, 3)
    assert "layer1.0.downsample.1.running_mean" in full
    assert set(light.state_dict()) - set(full) == set()
    sides = [k for k in full if "_b.0." in k]
    assert set(k for k in full if not k.startswith("layer")) - set(light.state_dict()) == set(sides)
    for key, shape in {
        "layer1.0.weight": (32, 3, 3, 3),
        "layer2.0.output.0.0.weight": (32, 32, 1, 1),
        "layer3.1.output.1.0.weight": (144, 1, 3, 3),
        "layer8.0.output.2.1.running_var": (320,),
        "conv8.weight": (256, 320, 1, 1),
        "conv3.weight": (256, 24, 1, 1),
        "crp4.0.4_outvar_dimred.weight": (256, 256, 1, 1),
        "conv_adapt2.weight": (256, 256, 1, 1),
        "segm.bias": (21,),
    }.items():
        assert mobile[key].shape == shape, key


def convolve(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    bias = state.get(f"{name}.bias")
    return conv2d(
        x, weight, bias, stride, weight.shape[2] // 2, groups=x.shape[1] // weight.shape[1]
    )


def normed(state, name, x):
    keys = ("running_mean", "running_var", "weight", "bias")
    return batch_norm(x, *(state[f"{name}.{key}"] for key in keys))


def resnet(state, x):
    """With the stride on the 3x3 convolution."""
    x = max_pool2d(
        normed(state, "bn1", conv2d(x, state["conv1.weight"], None, 2, 3)).relu(), 3, 2, 1
    )
    maps = []
    for layer in (1, 2, 3, 4):
        for i in itertools.takewhile(
            lambda i, layer=layer: f"layer{layer}.{i}.conv1.weight" in state, itertools.count()
        ):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            y = normed(state, f"{name}.bn1", convolve(state, f"{name}.conv1", x)).relu()
            y = normed(state, f"{name}.bn2", convolve(state, f"{name}.conv2", y, stride)).relu()
            y = normed(state, f"{name}.bn3", convolve(state, f"{name}.conv3", y))
            if i == 0:
                x = convolve(state, f"{name}.downsample.0", x, stride)
                x = normed(state, f"{name}.downsample.1", x)
            x = (x + y).relu()
        maps.append(x)
    return maps


def chain(state, name, x, variant):
    total = top = x
    for i in (1, 2, 3, 4):
        key = f"{name}.0.{i}_outvar_dimred"
        if variant == "pool_conv":
            top = convolve(state, key, max_pool2d(top, 5, 1, 2))
        else:
            top = max_pool2d(convolve(state, key, top), 5, 1, 2)
        total = total + top
    return total


def units(state, name, x, count):
    for i in range(1, count + 1):
        y = convolve(state, f"{name}.0.{i}_conv", x.relu()).relu()
        x = x + convolve(state, f"{name}.0.{i}_conv_relu_varout_dimred", y)
    return x


def refinenet(state, x, light=False, variant="pool_conv", **upsampling):
    """By the paper and its PyTorch port."""
    upsampling = upsampling or {"mode": "bilinear", "align_corners": True}
    maps = resnet(state, x)
    before = None
    for k in (1, 2, 3, 4):
        y = convolve(state, f"p_ims1d2_outl{k}_dimred", maps[4 - k])
        y = y if light else units(state, f"adapt_stage{k}_b", y, 2)
        if before is not None:
            y = convolve(state, f"adapt_stage{k}_b2_joint_varout_dimred", y)
            y = y + interpolate(before, y.shape[2:], **upsampling)
        y = chain(state, f"mflow_conv_g{k}_pool", y.relu(), variant)
        y = y if light else units(state, f"mflow_conv_g{k}_b", y, 3)
        before = convolve(state, f"mflow_conv_g{k}_b3_joint_varout_dimred", y) if k < 4 else y
    return convolve(state, "clf_conv", before)


@pytest.mark.parametrize(
    ("options", "definition"),
    [
        ({}, {}),
        ({"variant": "conv_pool"}, {"variant": "conv_pool"}),
        ({"align_corners": False}, {"mode": "bilinear", "align_corners": False}),
        ({"upsampling": "bicubic"}, {"mode": "bicubic", "antialias": True}),
    ],
)
@pytest.mark.parametrize("kind", [RefineNet, LightWeightRefineNet])
def test_definition(kind, options, definition, full, light):
    """And each switch makes a difference."""
    source = full if kind is RefineNet else light
    model = build(kind, **options).eval()
    model.load_state_dict(source.state_dict())
    x = random(1, 3, 75, 90)
    with torch.no_grad():
        found, usual = model.forward_low(x), source.forward_low(x)
        expected = refinenet(model.state_dict(), x, kind is LightWeightRefineNet, **definition)
    scale = float(expected.std())
    assert 0.1 < scale < 100
    assert (found - expected).abs().max() < 1e-4 * scale
    if options:
        assert (found - usual).abs().max() > 1e-3 * scale


def test_bicubic_is_matlabs():
    """Away from edges: Keys' kernel with a = -1/2 at half-pixel centres."""
    model = build(upsampling="bicubic")
    coarse = random(1, 4, 9, 9, dtype=torch.float64)
    got = model._add(torch.full((1, 4, 18, 18), 100.0, dtype=torch.float64), coarse) - 100

    def keys(t):
        t = abs(t)
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2

    for y, x in ((8, 8), (7, 10)):
        rows, columns = ([(n + 0.5) / 2 - 0.5 - i for i in range(9)] for n in (y, x))
        weights = [
            torch.tensor([keys(t) if abs(t) < 2 else 0.0 for t in axis], dtype=torch.float64)
            for axis in (rows, columns)
        ]
        expected = torch.einsum("i,ncij,j->nc", weights[0], coarse, weights[1])
        assert torch.allclose(got[:, :, y, x], expected, rtol=1e-9, atol=1e-9)


def mobilenet(state, x, strides=((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))):
    def layer(name, y, stride=1):
        return normed(state, f"{name}.1", convolve(state, f"{name}.0", y, stride))

    x = relu6(layer("layer1", x, 2))
    maps = {}
    for number, (blocks, stride) in enumerate(strides, 2):
        for i in range(blocks):
            name = f"layer{number}.{i}.output"
            y = relu6(layer(f"{name}.0", x))
            y = relu6(layer(f"{name}.1", y, 1 if i else stride))
            y = layer(f"{name}.2", y)
            x = x + y if i else y  # the first of a layer changes the channels
        maps[number] = x
    return maps


def test_definition_on_mobilenet(mobile):
    state = mobile.state_dict()
    x = random(1, 3, 75, 90)
    with torch.no_grad():
        maps = {i: convolve(state, f"conv{i}", y) for i, y in mobilenet(state, x).items() if i > 2}
        total = maps[8] + maps[7]
        for path, own in ((4, (6, 5)), (3, (4,)), (2, (3,))):
            y = chain(state, f"crp{path}", relu6(total), "pool_conv")
            y = convolve(state, f"conv_adapt{path}", y)
            size = maps[own[0]].shape[2:]
            total = interpolate(y, size, mode="bilinear", align_corners=True)
            total = total + sum(maps[i] for i in own)
        expected = convolve(state, "segm", chain(state, "crp1", relu6(total), "pool_conv"))
        found = mobile.forward_low(x)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["full", "light", "mobile"])
def test_dtypes_and_layouts(name, request):
    check_dtypes(request.getfixturevalue(name))


def test_twins(light, mobile):
    check_twins(light)
    check_twins(mobile)


def test_twins_of_the_full_one(full):
    check_twins(full)


@settings(max_examples=8, deadline=None)
@given(height=st.integers(33, 200), width=st.integers(33, 200))
def test_sizes(mobile, height, width):
    check_size(mobile, (height, width), 4)


def test_sizes_of_larger_ones(full, light):
    for size in ((33, 40), (64, 64), (97, 45)):
        check_size(full, size, 4)
        check_size(light, size, 4)


@pytest.mark.parametrize("name", ["full", "light", "mobile"])
def test_graphs(name, request):
    check_graph(request.getfixturevalue(name))


def test_dropout_and_frozen_statistics(full):
    """In training alone."""
    x = random(2, 3, 33, 40)
    model = build()
    model.load_state_dict(full.state_dict())
    mean = model.bn1.running_mean.clone()
    model.train()
    assert model.do.training and model.do.p == 0.5 and not model.bn1.training
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.bn1.running_mean, mean)
    still = build(dropout=0.0)
    still.load_state_dict(full.state_dict())
    with torch.no_grad():
        assert torch.equal(still.train()(x), full(x))


def test_stride_on(full):
    """The published ResNets have it on the 3x3 convolution."""
    other = build(stride_on="1x1").eval()
    other.load_state_dict(full.state_dict())
    assert other.layer2[0].conv1.stride == (2, 2) and full.layer2[0].conv2.stride == (2, 2)
    x = random(1, 3, 45, 50)
    with torch.no_grad():
        assert (other(x) - full(x)).abs().max() > 0.01


def test_features_only(full):
    model = build(features_only=True).eval()
    assert "clf_conv.weight" not in model.state_dict()
    own = {k: v for k, v in full.state_dict().items() if not k.startswith("clf_conv")}
    model.load_state_dict(own)
    maps = model(random(1, 3, 75, 90))
    sizes = [(19, 23), (10, 12), (5, 6), (3, 3)]
    assert [tuple(y.shape) for y in maps.values()] == [(1, 16, *size) for size in sizes]
    assert model.out_channels == 16


def test_errors():
    wrong = {"variant": "pool", "upsampling": "nearest", "align_corners": 1, "depth": 18}
    wrong |= {"output_align_corners": None, "frozen_norm": 0, "num_classes": 0, "reference": "yes"}
    check_errors(RefineNet, wrong, num_classes=2)
    check_errors(LightWeightRefineNet, wrong, num_classes=2)
    wrong = {"variant": "pool", "align_corners": 1, "output_align_corners": 1, "frozen_norm": 0}
    check_errors(LightWeightRefineNetMobileNet, wrong, num_classes=2)
