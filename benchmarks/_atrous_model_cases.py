# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions of published networks, as the benchmark of the dispatch rule calls them.

A map's size is that of the network's usual input: 513 (DeepLab v3 at output strides 8 and 16, FCN
on ResNet), 321 (DeepLab v1 and v2, VGG), 473 (PSPNet), 512 (DRN, HRNet). At rate 1 torch makes
most of bfloat16's forward convolutions on both sides; the weight's gradient is pydense's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks._autograd_cases import DTYPES, Problem

# Channels, size, outputs, rates.
SHAPES: tuple[tuple[str, int, int, int, tuple[int, ...]], ...] = (
    ("deeplabv3-os8-layer3", 256, 65, 256, (2,)),
    ("deeplabv3-os8-layer4", 512, 65, 512, (4,)),
    ("deeplabv3-os8-aspp", 2048, 65, 256, (12, 24, 36)),
    ("deeplabv3-os16-layer4", 512, 33, 512, (2, 4, 8)),
    ("deeplabv3-os16-aspp", 2048, 33, 256, (6, 12, 18)),
    ("deeplabv3-mobilenet-aspp", 960, 33, 256, (12, 24, 36)),
    ("deeplabv2-aspp", 2048, 41, 21, (6, 12, 18, 24)),
    ("deeplabv2-vgg-aspp", 512, 41, 1024, (6, 12, 18, 24)),
    ("deeplabv1-conv5", 512, 41, 512, (2,)),
    ("pspnet-layer3", 256, 60, 256, (2,)),
    ("pspnet-layer4", 512, 60, 512, (4,)),
    ("drn-layer6", 512, 64, 512, (4,)),
    ("resnet-layer2", 128, 65, 128, (1,)),
    ("resnet-layer3", 256, 33, 256, (1,)),
    ("deeplabv3-os8-head", 256, 65, 256, (1,)),
    ("fcn-head", 2048, 65, 512, (1,)),
    ("pspnet-head", 4096, 60, 512, (1,)),
    ("vgg-conv2", 128, 161, 128, (1,)),
    ("vgg-conv3", 256, 81, 256, (1,)),
    ("vgg-conv4", 512, 41, 512, (1,)),
    ("hrnet-w48-branch3", 192, 32, 192, (1,)),
    ("hrnet-w48-branch4", 384, 16, 384, (1,)),
)
# Of those, with the weight packed before, as a layer in eval mode has it.
PACKED = ("deeplabv3-os8-aspp", "deeplabv3-os16-aspp", "deeplabv2-vgg-aspp")


def model_problem(
    name: str,
    channels: int,
    size: int,
    outputs: int,
    rate: int,
    dtype: torch.dtype,
    kind: str = "forward",
) -> Problem:
    """A 3x3 convolution; ``kind`` is forward, backward (with forward) or packed."""
    from pydense.nn._packed_weight import PackedWeight
    from pydense.ops import atrous_conv2d
    from pydense.ops.atrous_conv import convolve

    cache = PackedWeight()

    def packed(x: Tensor, w: Tensor) -> Tensor:
        return convolve(x, w, None, 1, rate, rate, 1, None, 2, cache)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return atrous_conv2d(x, w, padding=rate, dilation=rate)

    taps = sum(max(0, size - abs(k) * rate) for k in (-1, 0, 1)) ** 2
    return Problem(
        f"{kind}/{name}-{channels}x{size}x{size}-{outputs}-rate{rate}/{DTYPES[dtype]}",
        ((1, channels, size, size),),
        ((outputs, channels, 3, 3),),
        (1, outputs, size, size),
        dtype,
        packed if kind == "packed" else plain,
        lambda x, w: conv2d(x, w, padding=rate, dilation=rate),
        2.0 * channels * outputs * taps,
        kind == "backward",
    )


def problems() -> list[Problem]:
    """What the benchmark measures."""
    return [
        model_problem(*shape[:4], rate, dtype, kind)
        for dtype in DTYPES
        for shape in SHAPES
        for rate in shape[4]
        for kind in ("forward", "packed", "backward")
        if kind != "packed" or shape[0] in PACKED
    ]


def quick_problems() -> list[Problem]:
    """Small ones, to see that everything works."""
    return [
        model_problem("small", 128, 13, 3, 8, torch.float32, "backward"),
        model_problem("small", 128, 13, 3, 16, torch.bfloat16),
        model_problem("small", 128, 13, 3, 8, torch.float32, "packed"),
        model_problem("small", 16, 13, 3, 2, torch.float32),
    ]
