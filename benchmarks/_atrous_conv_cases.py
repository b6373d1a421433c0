# SPDX-License-Identifier: Apache-2.0
"""Cases of the benchmark of atrous convolution: what is called, on what, by which rivals.

Cases called inference are forward alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks import _deeplab_cases
from benchmarks._autograd_cases import DTYPES, Problem


def aspp_sum(
    channels: int,
    size: int,
    outputs: int,
    dtype: torch.dtype,
    backward: bool = True,
    rates: tuple[int, ...] = (6, 12, 18, 24),
) -> Problem:
    """DeepLab v2's classifier; its FLOP are those of the taps that read the map."""
    from pydense.ops import aspp_sum

    def theirs(x: Tensor, *weights: Tensor) -> Tensor:
        out = conv2d(x, weights[0], padding=rates[0], dilation=rates[0])
        for weight, rate in zip(weights[1:], rates[1:], strict=True):
            out = out + conv2d(x, weight, padding=rate, dilation=rate)
        return out

    name = "aspp-sum" if backward else "aspp-sum-inference"
    return Problem(
        f"{name}/{channels}x{size}x{size}-{outputs}/{DTYPES[dtype]}",
        ((1, channels, size, size),),
        len(rates) * ((outputs, channels, 3, 3),),
        (1, outputs, size, size),
        dtype,
        lambda x, *weights: aspp_sum(x, weights, rates=rates),
        theirs,
        2.0 * channels * outputs * _taps(size, rates),
        backward,
    )


def depthwise(
    channels: int, size: int, rate: int, dtype: torch.dtype, backward: bool = True
) -> Problem:
    """The depthwise half of DeepLab v3+'s separable convolutions."""
    from pydense.ops import atrous_conv2d

    shape = (1, channels, size, size)
    name = "depthwise" if backward else "depthwise-inference"
    return Problem(
        f"{name}/{channels}x{size}x{size}-rate{rate}/{DTYPES[dtype]}",
        (shape,),
        ((channels, 1, 3, 3),),
        shape,
        dtype,
        lambda x, w: atrous_conv2d(x, w, dilation=rate, groups=channels),
        lambda x, w: conv2d(x, w, padding=rate, dilation=rate, groups=channels),
        2.0 * channels * _taps(size, (rate,)),
        backward,
    )


def winograd(
    channels: int, size: int, outputs: int, rate: int, tile: int = 2, backward: bool = False
) -> Problem:
    """Dense convolutions by Winograd's F(tile x tile, 3 x 3); its FLOP are a direct one's."""
    from pydense.ops import atrous_conv2d

    name = f"winograd-{tile}" + ("" if backward else "-inference")
    return Problem(
        f"{name}/{channels}x{size}x{size}-{outputs}-rate{rate}/f32",
        ((1, channels, size, size),),
        ((outputs, channels, 3, 3),),
        (1, outputs, size, size),
        torch.float32,
        lambda x, w: atrous_conv2d(x, w, dilation=rate, winograd_tile=tile),
        lambda x, w: conv2d(x, w, padding=rate, dilation=rate),
        2.0 * channels * outputs * _taps(size, (rate,)),
        backward,
    )


def _taps(size: int, rates: tuple[int, ...]) -> int:
    """Pixels that taps read, summed over the taps of all rates."""
    return sum(sum(max(0, size - d) for d in (rate, 0, rate)) ** 2 for rate in rates)


def problems() -> list[Problem]:
    """What the benchmark measures."""
    found = []
    for dtype in DTYPES:
        for backward in (True, False):
            found.append(aspp_sum(2048, 65, 21, dtype, backward))
            found += [depthwise(2048, 65, rate, dtype, backward) for rate in (6, 18)]
    for shape, tile in (((256, 65, 256, 2), 4), ((512, 65, 512, 4), 4), ((2048, 33, 256, 6), 3)):
        found += [winograd(*shape), winograd(*shape, backward=True), winograd(*shape, tile)]
    return found + _deeplab_cases.problems()


def quick_problems() -> list[Problem]:
    """Small ones, to see that everything works."""
    return [
        aspp_sum(16, 13, 3, torch.float32),
        aspp_sum(16, 13, 3, torch.bfloat16, backward=False),
        depthwise(16, 13, 3, torch.float32),
        winograd(128, 13, 128, 2, backward=True),
        *_deeplab_cases.quick_problems(),
    ]
