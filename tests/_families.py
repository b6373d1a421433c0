# SPDX-License-Identifier: Apache-2.0
"""A small network of every family of the reference models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from _models import small_resnet

from pydense import models
from pydense.models import SegmentationModel
from pydense.models import _vgg as vgg

CLASSES = 7
_WIDTH = models.HRNetWidth(6, (1, 8), (1, 1, 1), 1)
_WIDER_RESNET = {"blocks": (1, 1, 1, 1, 1, 1), "width": 1 / 32, "head_channels": 8}
_REFINENET = {"depth": 14, "channels": (24, 16)}

Build = Callable[[], SegmentationModel]

LOW: dict[str, Build] = {
    "fcn32s": lambda: models.FCN(CLASSES, 32, fc_channels=8),
    "fcn16s": lambda: models.FCN(CLASSES, 16, fc_channels=8),
    "fcn8s": lambda: models.FCN(CLASSES, 8, fc_channels=8),
    "fcn8s at once": lambda: models.FCN(CLASSES, 8, True, fc_channels=8),
    "fcn alexnet": lambda: models.FCNAlexNet(CLASSES, fc_channels=8),
    "deeplab large_fov": lambda: models.DeepLabV2VGG(CLASSES, "large_fov"),
    "deeplab v2 vgg": lambda: models.DeepLabV2VGG(CLASSES),
    "deeplab v2 vgg no pool5a": lambda: models.DeepLabV2VGG(CLASSES, pool5a=False),
    "deeplab v2 resnet": lambda: models.DeepLabV2ResNet(CLASSES, 14),
    "deeplab v2 resnet half-pixel": lambda: models.DeepLabV2ResNet(
        CLASSES, 14, align_corners=False, ceil_mode=False
    ),
    "deeplab v3": lambda: models.DeepLabV3(CLASSES, 14),
    "fcn resnet": lambda: models.FCNResNet(CLASSES, 14),
    "pspnet": lambda: models.PSPNet(CLASSES, 14),
    "refinenet": lambda: models.RefineNet(CLASSES, **_REFINENET),
    "refinenet bicubic": lambda: models.RefineNet(
        CLASSES, variant="conv_pool", upsampling="bicubic", **_REFINENET
    ),
    "lw refinenet": lambda: models.LightWeightRefineNet(CLASSES, **_REFINENET),
    "lw refinenet mobilenet": lambda: models.LightWeightRefineNetMobileNet(CLASSES, channels=16),
    "hrnet": lambda: models.HRNet(CLASSES, _WIDTH),
    "hrnet ocr": lambda: models.HRNetOCR(CLASSES, _WIDTH, channels=16, key_channels=8),
    "fcrn a": lambda: models.FCRN(CLASSES, "A", **_WIDER_RESNET),
    "fcrn a caffe": lambda: models.FCRN(
        CLASSES, "A", pool_padding=0, ceil_mode=True, **_WIDER_RESNET
    ),
    "fcrn a1": lambda: models.FCRN(CLASSES, "A1", **_WIDER_RESNET),
    "fcrn a2": lambda: models.FCRN(CLASSES, "A2", first_dilation="own", **_WIDER_RESNET),
}
"""Those with logits of low resolution."""

FULL: dict[str, Build] = {
    "unet": lambda: models.UNet(CLASSES, width=4),
    "unet bilinear": lambda: models.UNet(CLASSES, width=4, bilinear=True),
    "segnet": lambda: models.SegNet(CLASSES),
    "segnet basic": lambda: models.SegNet(CLASSES, "basic"),
    "segnet basic floor": lambda: models.SegNet(CLASSES, "basic", ceil_mode=False),
    "crf as rnn": lambda: models.FCNCRFasRNN(CLASSES, fc_channels=8, iterations=(1, 1)),
}
"""Those whose decoder, or CRF, ends at full resolution."""


@contextmanager
def small() -> Iterator[None]:
    """VGG16 of one narrow convolution a stage, ResNets of depth 14: one block a layer."""
    with pytest.MonkeyPatch.context() as patch, small_resnet():
        patch.setattr(vgg, "CONVOLUTIONS", (1, 1, 1, 1, 1))
        patch.setattr(vgg, "CHANNELS", (4, 4, 6, 8, 12))
        yield
