# SPDX-License-Identifier: Apache-2.0
"""PSPNet and SegNet in Caffe: their nets, evaluated layer by layer from converted blobs."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from _models import small_resnet
from _networks import fill
from torch import Tensor
from torch.nn import functional

from pydense import checkpoints, models
from pydense.checkpoints import CheckpointError

relu = functional.relu
STAGES = (2, 2, 3, 3, 3)


def caffe(model: torch.nn.Module, format: str = "caffe") -> dict[str, Tensor]:
    return {k: v.double() for k, v in checkpoints.convert(model, to_format=format).items()}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def segnet(x: Tensor, net: dict[str, Tensor]) -> Tensor:
    """The layers of segnet_inference.prototxt."""

    def conv(name: str, x: Tensor) -> Tensor:
        x = functional.conv2d(x, net[f"{name}.0"], net[f"{name}.1"], padding=1)
        return relu(x * net[f"{name}_bn.0"] + net[f"{name}_bn.1"])

    masks = []
    for i, count in enumerate(STAGES, 1):
        for j in range(1, count + 1):
            x = conv(f"conv{i}_{j}", x)
        size = x.shape
        x, where = functional.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        masks.append((where, size))
    for i, count in reversed([*enumerate(STAGES, 1)]):
        where, size = masks.pop()
        x = functional.max_unpool2d(x, where, 2, 2, output_size=list(size))
        for j in range(count, 1 if i == 1 else 0, -1):
            x = conv(f"conv{i}_{j}_D", x)
    return functional.conv2d(x, net["conv1_1_D.0"], net["conv1_1_D.1"], padding=1)


def segnet_basic(x: Tensor, net: dict[str, Tensor]) -> Tensor:
    """The layers of segnet_basic_inference.prototxt."""

    def conv(name: str, x: Tensor) -> Tensor:
        x = functional.conv2d(x, net[f"{name}.0"], net[f"{name}.1"], padding=3)
        return x * net[f"{name}_bn.0"] + net[f"{name}_bn.1"]

    x, masks = functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0), []
    for i in range(1, 5):
        x = relu(conv(f"conv{i}", x))
        size = x.shape
        x, where = functional.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        masks.append((where, size))
    for i in range(4, 0, -1):
        where, size = masks.pop()
        x = functional.max_unpool2d(x, where, 2, 2, output_size=list(size))
        x = conv(f"conv_decode{i}", x)
    return functional.conv2d(x, net["conv_classifier.0"], net["conv_classifier.1"])


@pytest.mark.parametrize(
    ("variant", "format", "evaluate", "count"),
    [("vgg16", "caffe", segnet, 102), ("basic", "caffe-basic", segnet_basic, 34)],
)
def test_segnet(variant, format, evaluate, count):
    model = fill(models.SegNet(3, variant))
    state = caffe(model, format)
    assert len(state) == count
    assert state["conv1_bn.0" if variant == "basic" else "conv1_1_bn.0"].shape == (1, 64, 1, 1)
    x = torch.randn(1, 3, 37, 50, generator=torch.manual_seed(1))
    with torch.no_grad():
        expected = evaluate(x.double(), state)
        assert close(model(x).double(), expected)
        other = fill(models.SegNet(3, variant), seed=5)  # other statistics, which must not stay
        report = checkpoints.load(other, state)
        assert report.format == format and report.complete and report.preprocessing == "bgr255"
        assert close(other(x).double(), expected)
    # Folded once, the numbers stay.
    again = checkpoints.convert(other, to_format=format)
    assert all(torch.allclose(again[k].double(), v, rtol=1e-5, atol=1e-7) for k, v in state.items())
    wrong = models.SegNet(3, "vgg16" if variant == "basic" else "basic")
    with pytest.raises(CheckpointError):
        checkpoints.load(wrong, state)


@pytest.mark.parametrize(("variant", "only"), [("vgg16", "caffe"), ("basic", "caffe-basic")])
@pytest.mark.parametrize("format", ["caffe", "caffe-basic", "say4n"])
def test_formats_of_segnet_s_variants(variant, only, format, tmp_path):
    """The names of one net do not fit the other, though the rules would give some."""
    model = models.SegNet(3, variant)
    if format == only or (variant == "vgg16" and format == "say4n"):
        assert format in checkpoints.formats(model)
        assert checkpoints.convert(model, to_format=format)
        return
    assert format not in checkpoints.formats(model) and format in checkpoints.formats("SegNet")
    other = "basic" if variant == "vgg16" else "vgg16"
    text = f"format {format} is of SegNet with variant='{other}', this one has '{variant}'"
    state = {f"encoder_conv_{i}0.{end}": torch.zeros(1) for i in range(4) for end in "01"}
    calls = [
        lambda: checkpoints.convert(model, to_format=format),
        lambda: checkpoints.save(model, tmp_path / "x.pth", to_format=format),
        lambda: checkpoints.load(model, state, format=format),
        lambda: checkpoints.load(model, checkpoints.convert(published, to_format=format)),
    ]
    published = models.SegNet(3, other)
    for call in calls:
        with pytest.raises(CheckpointError, match=re.escape(text)):
            call()
    assert not list(tmp_path.iterdir())


def pspnet(x: Tensor, net: dict[str, Tensor], blocks: tuple[int, ...], stride_on: str) -> Tensor:
    """The layers of pspnet50_ADE20K_473.prototxt, or of pspnet101_VOC2012_473.prototxt."""

    def conv(name: str, x: Tensor, stride: int = 1, hole: int = 1) -> Tensor:
        weight = net[f"{name}.0"]
        pad = hole * (weight.shape[2] // 2)
        x = functional.conv2d(x, weight, None, stride, pad, hole)
        scale, shift, mean, var = (net[f"{name}/bn.{i}"] for i in range(4))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = relu(conv("conv1_1_3x3_s2", x, 2))
    x = relu(conv("conv1_3_3x3", relu(conv("conv1_2_3x3", x))))
    x = functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for stage, count in enumerate(blocks, 2):
        for block in range(1, count + 1):
            name = f"conv{stage}_{block}"
            stride = 2 if (stage, block) == (3, 1) else 1
            hole = {4: 2, 5: 4}.get(stage, 1)
            first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
            y = relu(conv(f"{name}_1x1_reduce", x, first))
            y = conv(f"{name}_1x1_increase", relu(conv(f"{name}_3x3", y, second, hole)))
            x = relu(y + (conv(f"{name}_1x1_proj", x, stride) if block == 1 else x))
    rows = [x]
    for bins in (6, 3, 2, 1):
        y = functional.adaptive_avg_pool2d(x, bins)
        y = relu(conv(f"conv5_3_pool{bins}_conv", y))
        rows.append(functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True))
    x = relu(conv("conv5_4", torch.cat(rows, 1)))
    return functional.conv2d(x, net["conv6.0"], net["conv6.1"])


@pytest.mark.parametrize(("published", "stride_on"), [(50, "1x1"), (101, "3x3")])
def test_pspnet(published, stride_on):
    with small_resnet() as depth:
        build = partial(models.PSPNet, 3, depth, aux=False)
        model = fill(build(stride_on=stride_on, ceil_mode=True))
        plain = build(stride_on="3x3" if stride_on == "1x1" else "1x1")
    model.depth = plain.depth = published  # fewer blocks, but of that net
    state = caffe(model)
    # 3, 4 and 4 x 4 (with bn), 4 grids, the head: convolutions of 1 blob, norms of 4.
    assert len(state) == 5 * (3 + 4 * 4 + 4 + 1) + 2
    assert state["conv5_4/bn.3"].shape == (1, 512, 1, 1)
    x = torch.randn(1, 3, 49, 66, generator=torch.manual_seed(1))
    with torch.no_grad():
        expected = pspnet(x.double(), state, (1, 1, 1, 1), stride_on)
        assert close(model(x, low_resolution=True).double(), expected)
    report = checkpoints.load(plain, state)
    assert report.complete and report.preprocessing == "caffe-vgg"
    assert report.notes == [
        f"networks of caffe have stride_on={stride_on}, this model has not",
        "networks of caffe have ceil_mode=True, this model has not",
    ]
    assert report.options == {"stride_on": stride_on, "ceil_mode": True}
    assert not checkpoints.load(model, state).notes


def test_pspnet_with_auxiliary_output():
    """Caffe's files have none; the messages say what to do."""
    with small_resnet() as depth:
        model, plain = (models.PSPNet(3, depth, aux=aux, ceil_mode=True) for aux in (True, False))
    text = "no place for aux.0.weight: its networks have aux=False, build the model so or give"
    with pytest.raises(CheckpointError, match=text):
        caffe(model)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("aux.")}
    state = checkpoints.convert(model, own, to_format="caffe")
    assert checkpoints.load(plain, state).complete
    with pytest.raises(CheckpointError, match=r"(?s)missing .*have aux=False, this model has not"):
        checkpoints.load(model, state)


@pytest.mark.parametrize(
    ("name", "blocks", "stride_on"),
    [("pspnet_resnet50", 16, "1x1"), ("pspnet_resnet101", 33, "3x3")],
)
def test_names_of_pspnet(name, blocks, stride_on):
    with torch.device("meta"):
        model = models.get_model(name, aux=False)
        state = checkpoints.convert(model, to_format="caffe")
    assert len(state) == 5 * (3 + 3 * blocks + 4 + 4 + 1) + 2
    held = {key: torch.empty(value.shape) for key, value in state.items()}
    for how in ("1x1", "3x3"):
        with torch.device("meta"):
            other = models.get_model(name, num_classes=21, stride_on=how, ceil_mode=True, aux=False)
        report = checkpoints.plan(other, held)[0]
        assert report.complete
        assert report.options == ({} if how == stride_on else {"stride_on": stride_on})
    last = "conv4_6" if blocks == 16 else "conv4_23"
    for key in (f"{last}_1x1_increase/bn.3", "conv5_3_pool6_conv.0", "conv2_1_1x1_proj.0"):
        assert key in state
