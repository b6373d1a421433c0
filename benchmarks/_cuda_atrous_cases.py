# SPDX-License-Identifier: Apache-2.0
"""How the CUDA kernels of atrous convolutions are reached from Python, and their rivals.

Kernels of one call have the same entry, so that it is seen to be one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks._cuda_calls import Calls, pictures, switched
from benchmarks._cuda_rivals import (
    BRANCH_NAME,
    CONTIGUOUS_NAME,
    DATA_GRADIENT_NAME,
    GRADIENT_NAME,
    LARGE_FOV,
    LARGE_FOV_NAME,
    POINT,
    PYRAMID,
    PYRAMID_NAME,
    SEPARABLE_NAME,
    SINGLE,
    TAPS_NAME,
    V2_HEAD,
    Branch,
)


@cache
def _aspp_sum(
    dtype: torch.dtype, last: bool = False, gradient: bool = False
) -> Callable[[], Calls]:
    """DeepLab v2's head; torch's is four convolutions and three sums."""

    def make() -> Calls:
        from pydense import reference
        from pydense.ops import aspp_sum

        rates = [branch.rate for branch in V2_HEAD]
        x = pictures(1, 2048, 65, 65, dtype=dtype, last=last).requires_grad_(gradient)
        form = torch.channels_last if last else torch.contiguous_format
        weights = [
            torch.randn(21, 2048, 3, 3, device="cuda").mul_(0.01).to(dtype).requires_grad_(gradient)
            for _ in rates
        ]
        theirs = [
            w.detach().contiguous(memory_format=form).requires_grad_(gradient) for w in weights
        ]
        grad = torch.randn(1, 21, 65, 65, device="cuda").to(dtype)

        def call(function: Callable[..., Tensor], row: list[Tensor]) -> object:
            out = function(x, row, rates=rates)
            return torch.autograd.grad(out, [x, *row], grad) if gradient else out

        compiled = torch.compile(reference.aspp_sum)
        return Calls(
            lambda: call(aspp_sum, weights),
            lambda: call(reference.aspp_sum, theirs),
            lambda: call(compiled, theirs),
        )

    return make


def _convolutions(
    size: int,
    channels: int,
    branches: tuple[Branch, ...],
    dtype: torch.dtype,
    last: bool = True,
) -> tuple[Tensor, list[Tensor], list[int]]:
    """A map, and weights and rates of branches."""
    torch.backends.cudnn.allow_tf32 = True
    form = torch.channels_last if last else torch.contiguous_format
    weights = [
        (torch.randn(o, channels, k, k, device="cuda") / 64)
        .to(dtype)
        .contiguous(memory_format=form)
        for o, k, _ in branches
    ]
    x = pictures(1, channels, size, size, dtype=dtype, last=last)
    return x, weights, [rate for _, _, rate in branches]


@cache
def _atrous(
    size: int,
    channels: int,
    branches: tuple[Branch, ...],
    dtype: torch.dtype,
    last: bool = True,
) -> Callable[[], Calls]:
    """Against torch's convolutions, and its ``cat`` where there are several."""

    def make() -> Calls:
        x, weights, rates = _convolutions(size, channels, branches, dtype, last)
        outputs = sum(len(weight) for weight in weights)
        out = pictures(1, outputs, size, size, dtype=dtype, last=last)
        ours = torch.ops.pydense._dense_atrous_conv2d_branches_into

        def rival() -> object:
            made = [
                conv2d(x, weight, padding=rate * (weight.shape[2] // 2), dilation=rate)
                for weight, rate in zip(weights, rates, strict=True)
            ]
            return made[0] if len(made) == 1 else torch.cat(made, 1)

        return Calls(
            lambda: ours(x, weights, [], [], [], out, rates, False), rival, torch.compile(rival)
        )

    return make


@cache
def _depthwise(
    dtype: torch.dtype, last: bool = False, gradient: bool = False
) -> Callable[[], Calls]:
    """One branch of DeepLab v3+, depthwise."""

    def make() -> Calls:
        x = pictures(1, 2048, 65, 65, dtype=dtype, last=last)
        weight = torch.randn(2048, 1, 3, 3, device="cuda").to(dtype)
        geometry = (12, 12, 12, 12)
        if not gradient:
            ours = torch.ops.pydense.depthwise_atrous_conv2d

            def theirs() -> Tensor:
                return conv2d(x, weight, padding=12, dilation=12, groups=2048)

            return Calls(
                lambda: ours(x, weight, None, 65, 65, *geometry, False, False),
                theirs,
                torch.compile(theirs),
            )
        grad = torch.randn_like(x)
        backward = torch.ops.pydense.depthwise_atrous_conv2d_weight_gradient
        aten = torch.ops.aten.convolution_backward
        pair, needed = [12, 12], [False, True, False]

        def rival() -> object:
            return aten(grad, x, weight, None, [1, 1], pair, pair, False, [0, 0], 2048, needed)

        return Calls(lambda: backward(grad, x, 3, 3, *geometry), rival, torch.compile(rival))

    return make


@cache
def _separable(
    size: int, channels: int, rate: int, dtype: torch.dtype, last: bool = True
) -> Callable[[], Calls]:
    """In one pass, against pydense's depthwise kernel and torch's product.

    Compiled, both convolutions are torch's.
    """

    def make() -> Calls:
        torch.backends.cuda.matmul.allow_tf32 = True
        x = pictures(1, channels, size, size, dtype=dtype, last=last)
        depthwise = torch.randn(channels, 1, 3, 3, device="cuda").to(dtype)
        pointwise = (torch.randn(256, channels, 1, 1, device="cuda") / 64).to(dtype)
        geometry = (size, size, rate, rate, rate, rate)
        ours = torch.ops.pydense.atrous_separable_conv2d
        first = torch.ops.pydense.depthwise_atrous_conv2d

        def rival() -> object:
            inner = first(x, depthwise, None, *geometry, False, False)
            if last:
                return torch.nn.functional.linear(inner.movedim(1, -1), pointwise.flatten(1))
            return torch.bmm(pointwise.flatten(1)[None], inner.flatten(2))

        def torchs() -> Tensor:
            inner = conv2d(x, depthwise, padding=rate, dilation=rate, groups=channels)
            return conv2d(inner, pointwise)

        return Calls(
            lambda: ours(x, depthwise, None, pointwise, None, *geometry, False, False),
            rival,
            torch.compile(torchs),
        )

    return make


def _atrous_data_gradient() -> Calls:
    """The kernel of the forward pass, with taps in reverse."""
    x, (weight,), _ = _convolutions(33, 2048, SINGLE, torch.bfloat16)
    grad = pictures(1, 256, 33, 33, dtype=torch.bfloat16, last=True)
    ours = torch.ops.pydense.dense_atrous_conv2d
    aten = torch.ops.aten.convolution_backward
    mask, pair = [True, False, False], [12, 12]

    def rival() -> object:
        return aten(grad, x, weight, None, [1, 1], pair, pair, False, [0, 0], 1, mask)

    return Calls(
        lambda: ours(grad, weight, None, None, 33, 33, 12, 12, 12, 12, True, False),
        rival,
        torch.compile(rival),
    )


def _atrous_weight_gradient() -> Calls:
    x, (weight,), _ = _convolutions(33, 2048, SINGLE, torch.bfloat16)
    grad = pictures(1, 256, 33, 33, dtype=torch.bfloat16, last=True)
    ours = torch.ops.pydense.dense_atrous_conv2d_weight_gradient
    aten = torch.ops.aten.convolution_backward
    mask, pair = [False, True, False], [12, 12]

    def rival() -> object:
        return aten(grad, x, weight, None, [1, 1], pair, pair, False, [0, 0], 1, mask)

    return Calls(lambda: ours(grad, x, 3, 3, 12, 12, 12, 12), rival, torch.compile(rival))


_contiguous_atrous = _atrous(33, 2048, SINGLE, torch.float16, last=False)

ATROUS_CASES: dict[str, Callable[[], Calls]] = {
    f"depthwise_kernel|{BRANCH_NAME}, bfloat16": _depthwise(torch.bfloat16),
    f"depthwise_kernel|{BRANCH_NAME}, float32": _depthwise(torch.float32),
    f"depthwise_last_kernel|{BRANCH_NAME}, bfloat16, channels_last": _depthwise(
        torch.bfloat16, last=True
    ),
    **{
        f"depthwise_gradient{part}_kernel|{BRANCH_NAME}, {name}": _depthwise(
            dtype, last, gradient=True
        )
        for part in ("", "_sum")
        for name, dtype, last in (
            ("bfloat16", torch.bfloat16, False),
            ("bfloat16, channels_last", torch.bfloat16, True),
            ("float32", torch.float32, False),
        )
    },
    f"tap_add_kernel|{TAPS_NAME}, bfloat16": _aspp_sum(torch.bfloat16),
    f"tap_add_kernel|{TAPS_NAME}, bfloat16, channels_last": _aspp_sum(torch.bfloat16, last=True),
    f"tap_add_kernel|{TAPS_NAME}, float32": _aspp_sum(torch.float32),
    f"tap_gather_kernel|{TAPS_NAME}, bfloat16": _aspp_sum(torch.bfloat16, gradient=True),
    f"tap_gather_kernel|{TAPS_NAME}, bfloat16, channels_last": _aspp_sum(
        torch.bfloat16, last=True, gradient=True
    ),
    f"tap_gather_kernel|{TAPS_NAME}, float32": _aspp_sum(torch.float32, gradient=True),
    "tap_stack_kernel|4 x 21 x 2048 x 3 x 3, bfloat16": _aspp_sum(torch.bfloat16),
    "tap_unstack_kernel|21 x 2048 x 3 x 3, bfloat16": _aspp_sum(torch.bfloat16, gradient=True),
    f"dense_mma_kernel|{PYRAMID_NAME}, channels_last": _atrous(33, 2048, PYRAMID, torch.bfloat16),
    f"dense_sum_kernel|{PYRAMID_NAME}": _atrous(33, 2048, PYRAMID, torch.bfloat16),
    f"dense_mma_kernel|{LARGE_FOV_NAME}, bfloat16, channels_last": _atrous(
        41, 512, LARGE_FOV, torch.bfloat16
    ),
    f"dense_mma_kernel|{LARGE_FOV_NAME}, TF32, channels_last": _atrous(
        41, 512, LARGE_FOV, torch.float32
    ),
    "dense_mma_kernel|1 x 2048 x 4 x 4 to 256, 1x1, bfloat16, channels_last": _atrous(
        4, 2048, POINT, torch.bfloat16
    ),
    f"dense_mma_kernel|{CONTIGUOUS_NAME}": _contiguous_atrous,
    f"dense_pixels_kernel|{CONTIGUOUS_NAME}": _contiguous_atrous,
    f"dense_weight_kernel|{CONTIGUOUS_NAME}": _contiguous_atrous,
    **{
        f"separable_mma_kernel|1 x {shape}": _separable(*arguments)
        for shape, arguments in (
            (f"{SEPARABLE_NAME}, bfloat16, channels_last", (65, 2048, 12, torch.bfloat16)),
            (f"{SEPARABLE_NAME}, bfloat16", (65, 2048, 12, torch.bfloat16, False)),
            (f"{SEPARABLE_NAME}, TF32, channels_last", (65, 2048, 12, torch.float32)),
            (
                "304 x 129 x 129 to 256, rate 1, bfloat16, channels_last",
                (129, 304, 1, torch.bfloat16),
            ),
        )
    },
    f"dense_wgmma_kernel|{PYRAMID_NAME}, channels_last": switched(
        _atrous(33, 2048, PYRAMID, torch.bfloat16)
    ),
    f"dense_wgmma_kernel|{LARGE_FOV_NAME}, bfloat16, channels_last": switched(
        _atrous(41, 512, LARGE_FOV, torch.bfloat16)
    ),
    f"dense_wgmma_kernel|{DATA_GRADIENT_NAME}": switched(_atrous_data_gradient),
    f"dense_gradient_mma_kernel|{GRADIENT_NAME}": _atrous_weight_gradient,
    f"dense_gradient_sum_kernel|{GRADIENT_NAME}": _atrous_weight_gradient,
}
