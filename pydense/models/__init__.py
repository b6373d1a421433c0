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
from .inference import average_logits, predict_labels
from .unet import UNet, unet, unet_bilinear

__all__ = [
    "Frame",
    "SegmentationModel",
    "UNet",
    "average_logits",
    "get_model",
    "list_models",
    "predict_labels",
    "reference_twin",
    "register_model",
    "unet",
    "unet_bilinear",
]
