# SPDX-License-Identifier: Apache-2.0
"""Wider ResNet-38 and FCRN: counts, a definition by the authors' tables, twins, sizes, graphs."""

from __future__ import annotations

import pytest
import torch
from _models import check_graph
from _networks import (
    check_classifiers,
    check_dtypes,
    check_errors,
    check_size,
    check_twins,
    count,
    fill,
    summary,
)
from _ops import one_thread as one_thread
from _ops import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import batch_norm, conv2d, leaky_relu, max_pool2d, pad

from pydense.models import (
    FCRN,
    WiderResNet38,
    fcrn_a1,
    get_model,
    wider_resnet38_a,
    wider_resnet38_a1,
    wider_resnet38_a2,
)

SMALL = {"blocks": (1, 1, 2, 2, 1, 1), "width": 1 / 32}
HEAD = {"head_channels": 8}


@pytest.fixture(scope="module")
def small():
    return fill(FCRN(5, **SMALL, **HEAD), "linear")


@pytest.mark.parametrize("build", [wider_resnet38_a, wider_resnet38_a1, wider_resnet38_a2])
def test_counts_of_classifiers(build):
    assert count(build) == 109_167_912


@pytest.mark.parametrize(
    ("classes", "parameters"), [(21, 124_042_581), (19, 124_033_363), (150, 124_637_142)]
)
def test_counts(classes, parameters):
    for name in ("fcrn_a1", "fcrn_a2"):
        found = summary(name, (225, 257), num_classes=classes)
        assert found == (parameters, 232, (1, classes, 29, 33))


def test_names():
    """Of inplace_abn's checkpoints, without those of batch normalisation's counters."""
    with torch.device("meta"):
        state = wider_resnet38_a().state_dict()
    assert len(state) == 230
    block = "mod5.block1"
    parts = {key[len(block) + 1 :].rpartition(".")[0] for key in state if key.startswith(block)}
    assert parts == {"bn1", "convs.conv1", "convs.bn2", "convs.conv2", "proj_conv"}
    parts = {key.rpartition(".")[0] for key in state if key.startswith("mod7.")}
    assert parts == {
        f"mod7.block1.{part}"
        for part in (
            *("bn1", "convs.conv1", "convs.bn2", "convs.conv2", "convs.bn3"),
            *("convs.conv3", "proj_conv"),
        )
    }
    for key, shape in {
        "mod1.conv1.weight": (64, 3, 3, 3),
        "mod4.block6.convs.conv2.weight": (512, 512, 3, 3),
        "mod6.block1.convs.conv1.weight": (512, 1024, 1, 1),
        "mod7.block1.proj_conv.weight": (4096, 2048, 1, 1),
        "bn_out.running_var": (4096,),
        "classifier.fc.bias": (1000,),
    }.items():
        assert state[key].shape == shape, key


# Of the first convolution, the others and the pool in front: stride or dilation by level, as the
# authors' symbols have them for an output stride; None where there is no pool.
A1_8 = {
    2: (2, 1, 1, None),
    3: (2, 1, 1, None),
    4: (2, 1, 1, None),
    5: (1, 1, 2, None),
    6: (1, 2, 4, None),
    7: (1, 4, 4, None),
}
A2_8 = {
    2: (1, 1, 1, (2, 1)),
    3: (1, 1, 1, (2, 1)),
    4: (2, 1, 1, None),
    5: (1, 2, 2, None),
    6: (1, 4, 4, None),
    7: (1, 4, 4, None),
}
A_16 = {
    2: (1, 1, 1, (2, 1)),
    3: (1, 1, 1, (2, 1)),
    4: (1, 1, 1, (2, 1)),
    5: (1, 1, 1, (2, 1)),
    6: (1, 2, 2, (1, 1)),
    7: (1, 2, 2, None),
}
A_8 = {
    **{level: A_16[level] for level in (2, 3, 4)},
    5: (1, 2, 2, (1, 1)),
    6: (1, 4, 4, (1, 2)),
    7: (1, 4, 4, None),
}


def trunk(state, x, table, eps=1.001e-5, slope=0.0, pool_padding=1, ceil_mode=False):
    def active(name, y):
        keys = ("running_mean", "running_var", "weight", "bias")
        y = batch_norm(y, *(state[f"{name}.{key}"] for key in keys), eps=eps)
        return leaky_relu(y, slope)

    def convolve(name, y, stride=1, dilation=1):
        weight = state[f"{name}.weight"]
        dilation = dilation if weight.shape[2] == 3 else 1
        return conv2d(y, weight, None, stride, dilation * (weight.shape[2] // 2), dilation)

    x = convolve("mod1.conv1", x)
    for level, (stride, first, others, pool) in table.items():
        if pool == (2, 1):
            x = max_pool2d(x, 3, 2, pool_padding, ceil_mode=ceil_mode)
        elif pool is not None:
            d = pool[1]
            x = max_pool2d(pad(x, (d, d, d, d), value=-torch.inf), 3, 1, dilation=d)
        for i in range(SMALL["blocks"][level - 2]):
            name = f"mod{level}.block{i + 1}"
            y = z = active(f"{name}.bn1", x)
            for k in (1, 2, 3):
                if f"{name}.convs.conv{k}.weight" not in state:
                    continue
                y = active(f"{name}.convs.bn{k}", y) if k > 1 else y
                head = k == 1 and i == 0
                y = convolve(
                    f"{name}.convs.conv{k}", y, stride if head else 1, first if head else others
                )
            if i == 0:
                x = convolve(f"{name}.proj_conv", z, stride)
            x = x + y
    return active("bn_out", x)


@pytest.mark.parametrize(
    ("variant", "options", "table", "more"),
    [
        ("A1", {}, A1_8, {}),
        ("A1", {"norm_eps": 0.1}, A1_8, {"eps": 0.1}),
        ("A1", {"negative_slope": 0.01}, A1_8, {"slope": 0.01}),
        ("A2", {"first_dilation": "own"}, A2_8, {}),
        ("A", {"output_stride": 16}, A_16, {}),
        ("A", {}, A_8, {}),
        (
            "A",
            {"output_stride": 16, "pool_padding": 0, "ceil_mode": True},
            A_16,
            {"pool_padding": 0, "ceil_mode": True},
        ),
    ],
)
def test_definition(variant, options, table, more, small):
    model = FCRN(5, variant, **options, **SMALL, **HEAD).eval()
    model.load_state_dict(small.state_dict())
    x = random(1, 3, 90, 75)
    state = model.state_dict()
    with torch.no_grad():
        y = trunk(state, x, table, **more)
        y = conv2d(y, state["conv6a.weight"], state["conv6a.bias"], 1, 12, 12).relu()
        expected = conv2d(y, state["linear.weight"], state["linear.bias"], 1, 12, 12)
        found = model.forward_low(x)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_classifier():
    """And the strides of the undilated form."""
    x = random(2, 3, 70, 64)
    tables = {
        "A1": {level: (1 if level == 7 else 2, 1, 1, None) for level in range(2, 8)},
        "A": {level: (1, 1, 1, None if level == 7 else (2, 1)) for level in range(2, 8)},
    }
    for variant, table in tables.items():
        model = fill(WiderResNet38(7, variant, **SMALL))
        with torch.no_grad():
            y = trunk(model.state_dict(), x, table).mean((2, 3))
            expected = model.classifier(y)
            assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)
        check_classifiers(model, WiderResNet38(7, variant, **SMALL, reference=True))
    check_graph(model)


def test_first_dilation_and_dropout(small):
    """A1 begins a dilated level with the dilation before; dropout is where the authors have it."""
    assert small.mod5.block1.convs.conv1.dilation == (1, 1)
    assert small.mod5.block1.convs.conv2.dilation == (2, 2)
    own = FCRN(5, first_dilation="own", **SMALL, **HEAD).eval()
    own.load_state_dict(small.state_dict())
    x = random(1, 3, 64, 64)
    assert (own(x) - small(x)).abs().max() > 0.01
    assert [small.get_submodule(f"mod{i}.block1.convs.dropout").p for i in (6, 7)] == [0.3, 0.5]
    names = [type(m).__name__ for m in small.mod7.block1.convs]
    assert names[-2:] == ["Dropout", "Conv2d"] and "Dropout" not in str(small.mod5)
    channel = FCRN(5, dropout_kind="channel", **SMALL, **HEAD).mod6.block1.convs.dropout
    assert type(channel).__name__ == "Dropout2d" and channel.p == 0.3


def test_dtypes_and_layouts(small):
    check_dtypes(small)


def test_twins(small):
    check_twins(small)


@settings(max_examples=8, deadline=None)
@given(height=st.integers(33, 200), width=st.integers(33, 200))
def test_sizes(small, height, width):
    check_size(small, (height, width), 8)


@pytest.mark.parametrize("variant", ["A", "A2"])
def test_sizes_of_the_others(variant):
    model = fill(FCRN(3, variant, **SMALL, **HEAD), "linear")
    for size in ((33, 40), (64, 64), (97, 45)):
        check_size(model, size, 8)


def test_graphs(small):
    check_graph(small)


def test_features_only(small):
    model = FCRN(5, **SMALL, features_only=True).eval()
    assert not any(name.startswith(("conv6a", "linear")) for name in model.state_dict())
    heads = ("conv6a", "linear")
    own = {k: v for k, v in small.state_dict().items() if not k.startswith(heads)}
    model.load_state_dict(own)
    maps = model(random(1, 3, 70, 64))
    assert {k: tuple(y.shape[1:]) for k, y in maps.items()} == {
        "mod3": (8, 18, 16),
        "mod4": (16, 9, 8),
        "mod5": (32, 9, 8),
        "mod6": (64, 9, 8),
        "mod7": (128, 9, 8),
    }
    assert model.out_channels == [8, 16, 32, 64, 128]


def test_published_options():
    with torch.device("meta"):
        first, second = fcrn_a1(), get_model("fcrn_a2")
        classifier = wider_resnet38_a2()
    assert first.bn_out.eps == 1.001e-5 and second.bn_out.eps == classifier.bn_out.eps == 1e-5
    assert (first.num_classes, second.num_classes) == (21, 19)
    assert second.mod5.block1.convs.conv1.dilation == (2, 2)
    assert classifier.mod5.block1.convs.conv1.stride == (2, 2)
    kinds = [type(m.mod7.block1.convs.dropout).__name__ for m in (first, second, classifier)]
    assert kinds == ["Dropout", "Dropout2d", "Dropout2d"]


def test_errors():
    wrong = {"variant": "B", "output_stride": 4, "first_dilation": "none", "pool_padding": 2}
    wrong |= {"ceil_mode": 1, "blocks": (1, 2), "dropout_kind": "none", "norm_momentum": -1}
    check_errors(FCRN, wrong, num_classes=2)
    check_errors(FCRN, {"align_corners": 1, "frozen_norm": 1}, num_classes=2)
    check_errors(WiderResNet38, {**wrong, "num_classes": 0, "reference": 1})
