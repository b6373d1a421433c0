# SPDX-License-Identifier: Apache-2.0
"""Segmentation networks as published, on pydense's layers.

``list_models()`` names the published configurations; each is a function here. Pictures of any size
work, logits have the size of the input.

    >>> from pydense.models import unet
    >>> import torch
    >>> model = unet(num_classes=3).eval()
    >>> model.predict(torch.rand(1, 3, 33, 50)).shape  # labels, without logits of that size
    torch.Size([1, 33, 50])

Every constructor takes ``reference=True`` for the network's twin in plain torch, and
``features_only=True`` for the ordered dict of maps that torchvision's detectors take.
"""

from ._base import Frame, SegmentationModel, reference_twin
from ._registry import get_model, list_models, register_model
from .ademxapp import (
    FCRN,
    WiderResNet38,
    fcrn_a1,
    fcrn_a2,
    wider_resnet38_a,
    wider_resnet38_a1,
    wider_resnet38_a2,
)
from .hrnet import (
    HRNet,
    HRNetClassifier,
    HRNetOCR,
    hrnet_ocr_w18,
    hrnet_ocr_w48,
    hrnet_w18,
    hrnet_w18_small_v1,
    hrnet_w18_small_v2,
    hrnet_w32,
    hrnet_w40,
    hrnet_w48,
)
from .inference import average_logits, predict_labels
from .lw_refinenet import (
    LightWeightRefineNet,
    LightWeightRefineNetMobileNet,
    lw_refinenet50,
    lw_refinenet101,
    lw_refinenet152,
    lw_refinenet_mobilenet_v2,
)
from .refinenet import (
    RefineNet,
    refinenet50,
    refinenet50_improved,
    refinenet101,
    refinenet101_improved,
    refinenet152,
    refinenet152_improved,
)
from .unet import UNet, unet, unet_bilinear

__all__ = [
    "FCRN",
    "Frame",
    "HRNet",
    "HRNetClassifier",
    "HRNetOCR",
    "LightWeightRefineNet",
    "LightWeightRefineNetMobileNet",
    "RefineNet",
    "SegmentationModel",
    "UNet",
    "WiderResNet38",
    "average_logits",
    "fcrn_a1",
    "fcrn_a2",
    "get_model",
    "hrnet_ocr_w18",
    "hrnet_ocr_w48",
    "hrnet_w18",
    "hrnet_w18_small_v1",
    "hrnet_w18_small_v2",
    "hrnet_w32",
    "hrnet_w40",
    "hrnet_w48",
    "list_models",
    "lw_refinenet50",
    "lw_refinenet101",
    "lw_refinenet152",
    "lw_refinenet_mobilenet_v2",
    "predict_labels",
    "reference_twin",
    "refinenet50",
    "refinenet50_improved",
    "refinenet101",
    "refinenet101_improved",
    "refinenet152",
    "refinenet152_improved",
    "register_model",
    "unet",
    "unet_bilinear",
    "wider_resnet38_a",
    "wider_resnet38_a1",
    "wider_resnet38_a2",
]
