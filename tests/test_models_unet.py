# SPDX-License-Identifier: Apache-2.0
"""U-Net and SegNet: counts, definitions, odd sizes, twins, compilers."""

from __future__ import annotations

import sys

import pytest
import torch
from _models import (
    check_any_size,
    check_graph,
    check_loss,
    check_twin,
    filled,
    picture,
)
from _ops import one_thread as one_thread
from torch import nn
from torch.nn.functional import interpolate, local_response_norm, max_pool2d, max_unpool2d, pad

from pydense.models import SegNet, UNet
from pydense.models._pool import MaxPool


def small_segnet(**options):
    segnet = sys.modules["pydense.models.segnet"]  # the name in the package is the constructor
    stages = segnet._VGG16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segnet, "_VGG16", tuple(tuple(n // 16 for n in row[:2]) for row in stages))
        return SegNet(3, **options)


FAMILIES = {
    "unet": lambda: UNet(3, width=4),
    "unet bilinear": lambda: UNet(3, width=4, bilinear=True),
    "segnet": small_segnet,
    "segnet basic": lambda: SegNet(3, "basic"),
}


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_twin(self, family):
        check_twin(FAMILIES[family])

    def test_loss(self, family):
        check_loss(filled(FAMILIES[family]()))

    def test_graph(self, family):
        check_graph(filled(FAMILIES[family]()), twin_too=family == "unet bilinear")


@pytest.mark.parametrize("family", FAMILIES)
def test_any_size(family):
    check_any_size(filled(FAMILIES[family]()), examples=4)


@pytest.mark.parametrize(
    ("bilinear", "align_corners"), [(False, True), (True, True), (True, False)]
)
@pytest.mark.parametrize("size", [(48, 64), (51, 39)])
def test_unet_by_the_book(bilinear, align_corners, size):
    model = filled(UNet(3, width=4, bilinear=bilinear, align_corners=align_corners))
    x = picture(2, 3, *size)
    with torch.no_grad():
        skips = [model.inc(x)]
        for i in range(1, 5):
            skips.append(model.get_submodule(f"down{i}")(skips[-1]))
        out = skips.pop()
        for i in range(1, 5):
            up, skip = model.get_submodule(f"up{i}"), skips.pop()
            if bilinear:
                out = interpolate(out, scale_factor=2, mode="bilinear", align_corners=align_corners)
            else:
                out = up.up(out)
            rows, columns = (skip.shape[k] - out.shape[k] for k in (2, 3))
            out = pad(out, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            out = up.conv(torch.cat([skip, out], 1))
        expected = model.outc.conv(out)
        assert torch.allclose(model(x), expected, atol=1e-4 * float(expected.std()))


def test_unet_keys():
    keys = [*UNet(2).state_dict()]
    assert len(keys) == 118 and len(UNet(2, bilinear=True).state_dict()) == 110
    assert {"inc.double_conv.0.weight", "down1.maxpool_conv.1.double_conv.0.weight"} < set(keys)
    assert {"up1.up.weight", "up4.conv.double_conv.4.running_mean", "outc.conv.bias"} < set(keys)


@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("variant", ["vgg16", "basic"])
def test_segnet_by_the_book(variant, ceil_mode):
    """45 rows become 23 and are 45 again; with torch's own unpooling."""
    model = filled(
        SegNet(3, "basic", ceil_mode=ceil_mode)
        if variant == "basic"
        else small_segnet(ceil_mode=ceil_mode)
    )
    x = picture(1, 3, 45, 61)
    with torch.no_grad():
        out, found = x, []
        if variant == "basic":
            out = local_response_norm(out, 5)
        for stage in model.encoder:
            out = stage(out)
            size = out.shape[2:]
            out, where = max_pool2d(out, 2, 2, ceil_mode=ceil_mode, return_indices=True)
            found.append((where, size))
        if ceil_mode:
            assert out.shape[2] == (3 if variant == "basic" else 2)
        for stage in model.decoder:
            where, size = found.pop()
            out = stage(max_unpool2d(out, where, 2, output_size=size))
        assert torch.equal(model(x), model.classifier(out))


def test_segnet_layers():
    vgg, basic = SegNet(11), SegNet(11, "basic")
    for model, convolutions, activations in ((vgg, 26, 25), (basic, 9, 4)):
        kinds = [type(m) for m in model.modules()]
        assert sum(issubclass(kind, nn.Conv2d) for kind in kinds) == convolutions
        assert kinds.count(nn.BatchNorm2d) == convolutions - 1
        assert kinds.count(nn.ReLU) == activations
    with pytest.raises(ValueError, match="variant must be one of"):
        SegNet(2, "large")


@pytest.mark.parametrize("kernel_size, padding", [(2, 0), (3, 0), (3, 1)])
@pytest.mark.parametrize("ceil_mode", [True, False])
def test_pool_exported(kernel_size, padding, ceil_mode, monkeypatch):
    """What is exported is what runs, for every remainder."""
    layer = MaxPool(kernel_size, padding, ceil_mode)
    for height, width in ((8, 9), (9, 8), (7, 10), (10, 11), (3, 4)):
        x = picture(2, 3, height, width)
        monkeypatch.undo()
        eager, (out, where) = layer(x), layer.with_indices(x)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        exported, (out_too, where_too) = layer(x), layer.with_indices(x)
        assert torch.equal(eager, out) and torch.equal(eager, exported)
        assert torch.equal(eager, out_too) and torch.equal(where, where_too)
