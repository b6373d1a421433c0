# SPDX-License-Identifier: Apache-2.0
"""Every published configuration: parameters, entries of the state_dict, sizes of its output.

Nothing is computed and no memory is taken for weights. Counts are those of the authors' code or of
the widespread port; where deconvolutions are fixed here, their weights are no parameters, and that
is all the difference.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pydense import models

SIZES = ((33, 200), (97, 45), (161, 129))
# Of the logits of low resolution for these.
EIGHTH = ((5, 25), (13, 6), (21, 17))
EIGHTH_CEIL = ((5, 26), (13, 6), (21, 17))  # ceil_mode once: (n - 1) % 8 is 7
EIGHTH_CAFFE = ((5, 26), (13, 7), (21, 17))  # at every pooling
QUARTER = ((9, 50), (25, 12), (41, 33))
FCN_8 = ((16, 36), (24, 16), (32, 28))  # a padding of 100, and a ring
FCN_16 = ((8, 18), (12, 8), (16, 14))
FCN_32 = ((4, 9), (6, 4), (8, 7))
FULL = SIZES


class Published(NamedTuple):
    """What is known of a configuration; ``fixed`` parameters are deconvolutions'."""

    parameters: int
    entries: int
    low: tuple[tuple[int, int], ...]
    fixed: int = 0


PUBLISHED = {
    "crf_as_rnn_vgg16": Published(134_489_759 + 21 + 3 * 21**2, 43, FULL),
    "deeplab_largefov_vgg16": Published(20_505_429, 32, EIGHTH_CAFFE),
    "deeplab_v2_resnet101": Published(44_048_532, 632, EIGHTH_CEIL),
    "deeplab_v2_resnet101_crf": Published(44_048_532, 632, EIGHTH_CEIL),
    "deeplab_v2_resnet101_single_scale": Published(44_048_532, 632, EIGHTH_CEIL),
    "deeplab_v2_vgg16": Published(37_877_652, 50, EIGHTH_CAFFE),
    "deeplab_v2_vgg16_crf": Published(37_877_652, 50, EIGHTH_CAFFE),
    "deeplab_v2_vgg16_no_pool5a": Published(37_877_652, 50, EIGHTH_CAFFE),
    "deeplab_v3_resnet50": Published(42_004_074, 370, EIGHTH),
    "deeplab_v3_resnet101": Published(60_996_202, 676, EIGHTH),
    "fcn32s_vgg16": Published(136_152_917, 32, FCN_32, 21**2 * 64**2),
    "fcn16s_vgg16": Published(134_815_994, 34, FCN_16, 21**2 * (4**2 + 32**2)),
    "fcn8s_vgg16": Published(134_489_759, 36, FCN_8, 21**2 * (2 * 4**2 + 16**2)),
    "fcn8s_atonce_vgg16": Published(134_489_759, 36, FCN_8, 21**2 * (2 * 4**2 + 16**2)),
    "fcn_alexnet": Published(57_037_610, 16, FCN_32, 21 * 63**2),
    "fcn_resnet50": Published(35_322_218, 334, EIGHTH),
    "fcn_resnet101": Published(54_314_346, 640, EIGHTH),
    "fcrn_a1": Published(124_042_581, 232, EIGHTH),
    "fcrn_a2": Published(124_033_363, 232, EIGHTH),
    "hrnet_w18_small_v1": Published(1_540_819, 435, QUARTER),
    "hrnet_w18_small_v2": Published(3_939_579, 873, QUARTER),
    "hrnet_w18": Published(9_641_119, 1839, QUARTER),
    "hrnet_w32": Published(29_546_515, 1839, QUARTER),
    "hrnet_w40": Published(45_894_435, 1839, QUARTER),
    "hrnet_w48": Published(65_859_379, 1839, QUARTER),
    "hrnet_ocr_w18": Published(12_080_818, 1890, QUARTER),
    "hrnet_ocr_w48": Published(70_372_678, 1890, QUARTER),
    "lw_refinenet50": Published(27_357_525, 346, QUARTER),
    "lw_refinenet101": Published(46_349_653, 652, QUARTER),
    "lw_refinenet152": Published(61_993_301, 958, QUARTER),
    "lw_refinenet_mobilenet_v2": Published(3_284_565, 339, QUARTER),
    "pspnet_resnet50": Published(49_081_578, 370, EIGHTH),
    "pspnet_resnet101": Published(68_073_706, 676, EIGHTH),
    "refinenet50": Published(99_060_309, 406, QUARTER),
    "refinenet101": Published(118_052_437, 712, QUARTER),
    "refinenet152": Published(133_696_085, 1018, QUARTER),
    "refinenet50_improved": Published(99_060_309, 406, QUARTER),
    "refinenet101_improved": Published(118_052_437, 712, QUARTER),
    "refinenet152_improved": Published(133_696_085, 1018, QUARTER),
    "segnet": Published(29_449_355, 177, FULL),
    "segnet_basic": Published(1_416_587, 58, FULL),
    "unet": Published(31_037_698, 118, FULL),
    "unet_bilinear": Published(17_263_042, 110, FULL),
}


# The same layers as the largest of their kind, fewer or narrower: one size is enough.
SMALLER = {
    *("hrnet_w18", "hrnet_w18_small_v1", "hrnet_w18_small_v2", "hrnet_w32", "hrnet_w40"),
    *("hrnet_ocr_w18", "lw_refinenet50", "lw_refinenet101", "refinenet50", "refinenet101"),
    *("refinenet50_improved", "refinenet101_improved", "pspnet_resnet50", "fcn_resnet50"),
    *("deeplab_v3_resnet50", "deeplab_v2_resnet101_crf", "deeplab_v2_resnet101_single_scale"),
}


def test_all_are_listed():
    assert sorted(PUBLISHED) == models.list_models()
    assert set(PUBLISHED) > SMALLER


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name):
    published = PUBLISHED[name]
    # The lattice of a CRF has a size of its own, which only the points' values tell.
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        model = models.get_model(name).eval()
        count = sum(p.numel() for p in model.parameters())
        assert count == published.parameters - published.fixed
        assert len(model.state_dict()) == published.entries
        for size, low_size in zip(SIZES, published.low, strict=True):
            if name in SMALLER and size != SIZES[0]:
                continue
            low = model(torch.empty(1, 3, *size), low_resolution=True)
            assert low.shape == (1, model.num_classes, *low_size)
            assert model.upsample(low, size).shape == (1, model.num_classes, *size)


# Trained with the statistics of the weights that they began from.
FROZEN = ("deeplab_v2_resnet*", "fcrn_*", "lw_refinenet*", "refinenet*")
MOMENTUM = {
    "deeplab_v2_resnet101": 0.001,
    "fcrn_a1": 0.1,
    "deeplab_v3_resnet50": 0.1,
    "fcn_resnet50": 0.1,
    "hrnet_w18_small_v1": 0.01,
    "hrnet_ocr_w18": 0.1,
    "lw_refinenet50": 0.1,
    "lw_refinenet_mobilenet_v2": 0.1,
    "pspnet_resnet50": 0.1,
    "refinenet50": 0.1,
    "segnet_basic": 0.1,
    "unet": 0.1,
}


@pytest.mark.parametrize("name", MOMENTUM)
def test_batch_normalisation(name):
    """One pair of arguments in all families; the defaults are the published."""

    def norms(**options):
        with torch.device("meta"):
            model = models.get_model(name, **options).train()
        found = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert found and model.training
        return {m.training for m in found}, {m.momentum for m in found}

    frozen = any(name in models.list_models(pattern) for pattern in FROZEN)
    assert norms() == ({not frozen}, {MOMENTUM[name]})
    assert norms(frozen_norm=not frozen, norm_momentum=0.25) == ({frozen}, {0.25})


def test_batch_normalisation_errors():
    for value, error in (
        (1.5, ValueError),
        (-0.1, ValueError),
        (True, TypeError),
        ("a", TypeError),
    ):
        with pytest.raises(error, match="UNet: norm_momentum must be"):
            models.UNet(2, width=2, norm_momentum=value)
    with pytest.raises(TypeError, match="SegNet: frozen_norm must be a bool"):
        models.SegNet(2, "basic", frozen_norm=1)


DEFAULTS = {
    models.FCN: {"ceil_mode": True, "dropout": "element", "upsampling": "bilinear"},
    models.FCNAlexNet: {"ceil_mode": True, "norm_first": False, "dropout": "element"},
    models.FCNCRFasRNN: {"iterations": (5, 10), "dropout": "channel", "upsampling": "learned"},
    models.DeepLabV2VGG: {"pool5a": True, "align_corners": True, "ceil_mode": True, "msc": False},
    models.DeepLabV2ResNet: {
        **{"msc": True, "align_corners": True, "ceil_mode": True, "stride_on": "1x1"},
        "rates": (6, 12, 18, 24),
    },
    models.DeepLabV3: {
        **{"align_corners": False, "ceil_mode": False, "stride_on": "3x3", "rates": None},
        "first_dilation": "previous",
    },
    models.PSPNet: {"align_corners": True, "ceil_mode": False, "stride_on": "3x3", "dropout": 0.1},
    models.RefineNet: {"variant": "pool_conv", "align_corners": True, "stride_on": "3x3"},
    models.LightWeightRefineNet: {"variant": "pool_conv", "align_corners": True},
    models.LightWeightRefineNetMobileNet: {"variant": "pool_conv", "align_corners": True},
    models.HRNet: {"align_corners": False, "fuse_mode": "bilinear", "final_kernel_size": 1},
    models.HRNetOCR: {"align_corners": True, "fuse_mode": "bilinear", "dropout": 0.05},
    models.FCRN: {
        **{"variant": "A1", "first_dilation": "previous", "norm_eps": 1.001e-5},
        **{"dropout": (0.3, 0.5), "dropout_kind": "element", "pool_padding": 1},
    },
    models.SegNet: {"ceil_mode": True},
    models.UNet: {"bilinear": False, "align_corners": True},
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_published_defaults(kind):
    parameters = inspect.signature(kind).parameters
    assert DEFAULTS[kind] == {name: parameters[name].default for name in DEFAULTS[kind]}


def test_arguments_are_documented():
    """Each of every network's constructor, in its own docstring or in one that it names."""
    kinds = [k for k in vars(models).values() if isinstance(k, type) and issubclass(k, nn.Module)]
    for kind in set(kinds) - {models.SegmentationModel}:
        text = kind.__doc__
        for name in re.findall(r"arguments are those of :class:`(\w+)`", text):
            text += getattr(models, name).__doc__
        named = set(re.findall(r"^ {8}(\w+): ", text, re.MULTILINE))
        own = set(inspect.signature(kind).parameters)
        assert own <= named, f"{kind.__name__}: {sorted(own - named)}"
    assert len(kinds) > 15
