# SPDX-License-Identifier: Apache-2.0
"""Cases of the benchmark of chained residual pooling: what is called, on what, by which rivals.

Beside the light-weight block's inference stands what it cannot do without, torch's matrix products
and pydense's pools in a row.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d

from benchmarks._autograd_cases import DTYPES, Problem


def pool(channels: int, size: int, dtype: torch.dtype) -> Problem:
    """RefineNet's 5x5 max pooling."""
    from pydense.ops import max_pool2d_same

    shape = (1, channels, size, size)
    name = f"pool/{channels}x{size}x{size}/{DTYPES[dtype]}"
    theirs = partial(max_pool2d, kernel_size=5, stride=1, padding=2)
    return Problem(name, (shape,), (), shape, dtype, max_pool2d_same, theirs, 0.0)


def chain(
    name: str, channels: int, size: int, kernel: int, dtype: torch.dtype, backward: bool = True
) -> Problem:
    """A pooling block of 4 stages: light-weight (1x1) or original (3x3)."""
    from pydense.ops import chained_residual_pool, max_pool2d_same

    shape = (1, channels, size, size)

    def floor(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            pooled = max_pool2d_same(x)
            product: Tensor = torch.mm(weight.flatten(1), pooled.view(channels, -1))
            x = product.view(shape)
        return x

    def theirs(x: Tensor, *weights: Tensor) -> Tensor:
        top = x
        for weight in weights:
            top = conv2d(max_pool2d(top, 5, 1, 2), weight, padding=kernel // 2)
            x = x + top
        return x

    return Problem(
        f"{name}/{channels}x{size}x{size}/{DTYPES[dtype]}",
        (shape,),
        4 * ((channels, channels, kernel, kernel),),
        shape,
        dtype,
        lambda x, *weights: chained_residual_pool(x, weights),
        theirs,
        8.0 * channels * channels * kernel * kernel * size * size,
        backward,
        floor if kernel == 1 and not backward else None,
    )


def concat_head(channels: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype) -> Problem:
    """HRNet's head: upsample, concatenate, convolve 1x1."""
    from pydense.nn import UpsampleConcatConv1x1

    total = sum(channels)
    head = UpsampleConcatConv1x1(channels, total, bias=False)
    maps = tuple((1, c, size[0] >> k, size[1] >> k) for k, c in enumerate(channels))

    def own(*inputs: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": inputs[-1]}, (inputs[:-1],))

    def theirs(*inputs: Tensor) -> Tensor:
        first, *rest = inputs[:-1]
        up = [interpolate(x, size=size, mode="bilinear") for x in rest]
        return conv2d(torch.cat([first, *up], 1), inputs[-1])

    return Problem(
        f"concat-head/{total}x{size[0]}x{size[1]}/{DTYPES[dtype]}",
        maps,
        ((total, total, 1, 1),),
        (1, total, *size),
        dtype,
        own,
        theirs,
        sum(2.0 * total * m[1] * m[2] * m[3] for m in maps),
    )


def problems() -> list[Problem]:
    """What the benchmark measures."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [
            pool(256, 128, dtype),
            pool(512, 64, dtype),
            chain("light-weight", 256, 128, 1, dtype),
            chain("light-weight-inference", 256, 128, 1, dtype, backward=False),
            chain("original", 256, 64, 3, dtype),
            concat_head((48, 96, 192, 384), (128, 256), dtype),
        ]
    return found


def quick_problems() -> list[Problem]:
    """Small ones, to see that everything works."""
    return [
        pool(16, 20, torch.float32),
        chain("light-weight", 16, 20, 1, torch.bfloat16),
        chain("light-weight-inference", 16, 20, 1, torch.float32, backward=False),
        chain("original", 8, 12, 3, torch.float32, backward=False),
        concat_head((8, 16), (16, 16), torch.float32),
    ]
