# SPDX-License-Identifier: Apache-2.0
"""What networks expect of a picture, as data: order of channels, range, mean, deviation.

It belongs to the weights, not to the architecture, and cannot be seen in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """``(x * scale - mean) / std`` channel by channel, of a picture x of 0 to 255.

    Attributes:
        channels: ``"rgb"`` or ``"bgr"``, the order in which the network takes them.
        scale: 1, or 1 / 255.
        mean: In the order of ``channels``.
        std: As that.
        note: Whose it is.
    """

    channels: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    note: str

    def __call__(self, picture: Tensor) -> Tensor:
        """A picture (..., H, W, 3), RGB, 0 to 255, as input (..., 3, H, W), float32."""
        x = picture.to(torch.float32)
        if self.channels == "bgr":
            x = x.flip(-1)
        x = (x * self.scale - torch.tensor(self.mean)) / torch.tensor(self.std)
        return x.movedim(-1, -3)


_ONE = (1.0, 1.0, 1.0)
_ZERO = (0.0, 0.0, 0.0)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PREPROCESSING = {
    "imagenet": Preprocessing(
        "rgb", 1 / 255, _IMAGENET_MEAN, _IMAGENET_STD, "torchvision, timm, HRNet, PSPNet, DrSleep"
    ),
    "unit": Preprocessing("rgb", 1 / 255, _ZERO, _ONE, "milesial's U-Net, say4n's SegNet"),
    "caffe-fcn": Preprocessing(
        "bgr", 1.0, (104.00698793, 116.66876762, 122.67891434), _ONE, "FCN in Caffe and its ports"
    ),
    "caffe-deeplab": Preprocessing(
        "bgr", 1.0, (104.008, 116.669, 122.675), _ONE, "DeepLab in Caffe and its ports"
    ),
    "caffe-vgg": Preprocessing(
        "bgr",
        1.0,
        (103.939, 116.779, 123.68),
        _ONE,
        "VGG16 in Caffe: PSPNet in Caffe, CRF-as-RNN's PyTorch port",
    ),
    "matlab-refinenet": Preprocessing(
        "rgb", 1.0, (128.0, 128.0, 128.0), _ONE, "RefineNet in MATLAB (which also enlarges by 1.2)"
    ),
    "digits": Preprocessing("rgb", 1.0, (116.0, 116.0, 116.0), _ONE, "FCN-AlexNet of DIGITS"),
    "bgr255": Preprocessing("bgr", 1.0, _ZERO, _ONE, "SegNet in Caffe"),
    "rgb255": Preprocessing("rgb", 1.0, _ZERO, _ONE, "nothing is done"),
}
"""By the names that formats, checkpoints and ``pydense predict --preprocess`` use."""
