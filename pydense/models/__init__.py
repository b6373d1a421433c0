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
from ._hrnet import HRNetWidth
from ._net_surgery import transplant_fc_weights
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
from .crf_as_rnn import FCNCRFasRNN, crf_as_rnn_vgg16
from .deeplab_v2 import (
    DeepLabV2ResNet,
    DeepLabV2VGG,
    deeplab_largefov_vgg16,
    deeplab_v2_resnet101,
    deeplab_v2_resnet101_crf,
    deeplab_v2_resnet101_single_scale,
    deeplab_v2_vgg16,
    deeplab_v2_vgg16_crf,
    deeplab_v2_vgg16_no_pool5a,
)
from .deeplab_v3 import (
    DeepLabV3,
    FCNResNet,
    deeplab_v3_resnet50,
    deeplab_v3_resnet101,
    fcn_resnet50,
    fcn_resnet101,
)
from .fcn import (
    FCN,
    FCNAlexNet,
    fcn8s_atonce_vgg16,
    fcn8s_vgg16,
    fcn16s_vgg16,
    fcn32s_vgg16,
    fcn_alexnet,
)
from .hrnet import (
    HRNet,
    HRNetClassifier,
    hrnet_w18,
    hrnet_w18_small_v1,
    hrnet_w18_small_v2,
    hrnet_w32,
    hrnet_w40,
    hrnet_w48,
)
from .hrnet_ocr import HRNetOCR, hrnet_ocr_w18, hrnet_ocr_w48
from .inference import average_logits, predict_labels
from .lw_refinenet import (
    LightWeightRefineNet,
    LightWeightRefineNetMobileNet,
    lw_refinenet50,
    lw_refinenet101,
    lw_refinenet152,
    lw_refinenet_mobilenet_v2,
)
from .pspnet import PSPNet, pspnet_resnet50, pspnet_resnet101
from .refinenet import (
    RefineNet,
    refinenet50,
    refinenet50_improved,
    refinenet101,
    refinenet101_improved,
    refinenet152,
    refinenet152_improved,
)
from .segnet import SegNet, segnet, segnet_basic
from .unet import UNet, unet, unet_bilinear

__all__ = [
    "FCN",
    "FCRN",
    "DeepLabV2ResNet",
    "DeepLabV2VGG",
    "DeepLabV3",
    "FCNAlexNet",
    "FCNCRFasRNN",
    "FCNResNet",
    "Frame",
    "HRNet",
    "HRNetClassifier",
    "HRNetOCR",
    "HRNetWidth",
    "LightWeightRefineNet",
    "LightWeightRefineNetMobileNet",
    "PSPNet",
    "RefineNet",
    "SegNet",
    "SegmentationModel",
    "UNet",
    "WiderResNet38",
    "average_logits",
    "crf_as_rnn_vgg16",
    "deeplab_largefov_vgg16",
    "deeplab_v2_resnet101",
    "deeplab_v2_resnet101_crf",
    "deeplab_v2_resnet101_single_scale",
    "deeplab_v2_vgg16",
    "deeplab_v2_vgg16_crf",
    "deeplab_v2_vgg16_no_pool5a",
    "deeplab_v3_resnet50",
    "deeplab_v3_resnet101",
    "fcn8s_atonce_vgg16",
    "fcn8s_vgg16",
    "fcn16s_vgg16",
    "fcn32s_vgg16",
    "fcn_alexnet",
    "fcn_resnet50",
    "fcn_resnet101",
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
    "pspnet_resnet50",
    "pspnet_resnet101",
    "reference_twin",
    "refinenet50",
    "refinenet50_improved",
    "refinenet101",
    "refinenet101_improved",
    "refinenet152",
    "refinenet152_improved",
    "register_model",
    "segnet",
    "segnet_basic",
    "transplant_fc_weights",
    "unet",
    "unet_bilinear",
    "wider_resnet38_a",
    "wider_resnet38_a1",
    "wider_resnet38_a2",
]
