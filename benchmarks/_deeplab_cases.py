# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3 and v3+ in the benchmark of atrous convolution: convolutions, head, whole model."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d

from benchmarks._autograd_cases import DTYPES, Problem

# Of DeepLabV3-ResNet101 at 520 x 520, as torchvision gives it in its description of the weights;
# maps of 1/8 of the size are the same at 513 x 513.
_MODEL_FLOP = 2 * 258.743e9


def separable(
    channels: int,
    size: int,
    outputs: int,
    rate: int,
    dtype: torch.dtype,
    backward: bool = True,
) -> Problem:
    """DeepLab v3+'s separable convolution; its FLOP leave the padding out."""
    from pydense.ops import atrous_separable_conv2d

    name = "separable" if backward else "separable-inference"
    taps = sum(max(0, size - d) for d in (rate, 0, rate)) ** 2
    return Problem(
        f"{name}/{channels}x{size}x{size}-{outputs}-rate{rate}/{DTYPES[dtype]}",
        ((1, channels, size, size),),
        ((channels, 1, 3, 3), (outputs, channels, 1, 1)),
        (1, outputs, size, size),
        dtype,
        lambda x, d, p: atrous_separable_conv2d(x, d, p, dilation=rate),
        lambda x, d, p: conv2d(conv2d(x, d, padding=rate, dilation=rate, groups=channels), p),
        2.0 * channels * (taps + outputs * size**2),
        backward,
    )


def aspp_concat(
    channels: int,
    size: int,
    outputs: int,
    dtype: torch.dtype,
    backward: bool = True,
    rates: tuple[int, ...] = (6, 12, 18),
) -> Problem:
    """DeepLab v3's branches without normalisation; their FLOP leave the padding out."""
    from pydense.ops import aspp_concat

    def theirs(x: Tensor, first: Tensor, *rest: Tensor) -> Tensor:
        branches = [conv2d(x, first)]
        for weight, rate in zip(rest, rates, strict=False):
            branches.append(conv2d(x, weight, padding=rate, dilation=rate))
        pooled = conv2d(adaptive_avg_pool2d(x, 1), rest[-1])
        return torch.cat([*branches, pooled.expand(-1, -1, size, size)], 1).relu()

    def own(x: Tensor, *weights: Tensor) -> Tensor:
        return aspp_concat(x, weights[:-1], (1, *rates), pool_weight=weights[-1], activation="relu")

    name = "aspp-concat" if backward else "aspp-concat-inference"
    atrous = len(rates) * ((outputs, channels, 3, 3),)
    one = (outputs, channels, 1, 1)
    taps = sum(sum(max(0, size - d) for d in (rate, 0, rate)) ** 2 for rate in rates)
    return Problem(
        f"{name}/{channels}x{size}x{size}-{outputs}/{DTYPES[dtype]}",
        ((1, channels, size, size),),
        (one, *atrous, one),
        (1, (len(rates) + 2) * outputs, size, size),
        dtype,
        own,
        theirs,
        2.0 * channels * outputs * (taps + size**2 + 1),
        backward,
    )


def model(dtype: torch.dtype, size: int = 513) -> Problem:
    """torchvision's DeepLabV3-ResNet101 as it is, and converted and folded; inference."""

    @cache
    def models() -> tuple[nn.Module, nn.Module]:
        from benchmarks._torchvision import segmentation_models
        from pydense.nn import convert, fold_batchnorm

        segmentation = segmentation_models()
        assert segmentation is not None
        torch.manual_seed(1)
        theirs = segmentation.deeplabv3_resnet101(weights=None, weights_backbone=None)
        theirs = theirs.eval().to(dtype)
        return theirs, fold_batchnorm(convert(copy.deepcopy(theirs)))

    def runs(index: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            out: Tensor = models()[index](x)["out"]
            return out

        return run

    return Problem(
        f"deeplabv3-resnet101-inference/{size}x{size}/{DTYPES[dtype]}",
        ((1, 3, size, size),),
        (),
        (1, 21, size, size),
        dtype,
        torch.no_grad()(runs(1)),
        torch.no_grad()(runs(0)),
        _MODEL_FLOP * (size / 513) ** 2,
        False,
    )


def problems() -> list[Problem]:
    """What the benchmark measures; the whole model where torchvision is installed."""
    found = []
    for dtype in DTYPES:
        for backward in (True, False):
            found.append(separable(2048, 65, 256, 12, dtype, backward))
            found.append(aspp_concat(2048, 33, 256, dtype, backward))
        if importlib.util.find_spec("torchvision") is not None:
            found.append(model(dtype))
    return found


def quick_problems() -> list[Problem]:
    """Small ones, to see that everything works."""
    return [
        separable(16, 13, 5, 3, torch.float32),
        aspp_concat(16, 13, 5, torch.float32, rates=(2, 7)),
        aspp_concat(16, 13, 5, torch.bfloat16, backward=False, rates=(2, 7)),
    ]
