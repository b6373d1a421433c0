# SPDX-License-Identifier: Apache-2.0
"""Operators of atrous convolution on a GPU as users call them, beside torch's and torch.compile's.

Kernels have predictions and are timed one by one (``_cuda_cases.py``); here a call has all that it
launches, with the dispatch rule's choice, and where it is named so with gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d

from benchmarks._cuda_calls import Calls, pictures, switched

LAST = torch.channels_last


def _calls(
    ours: Callable[[list[Tensor]], Tensor],
    theirs: Callable[[list[Tensor]], Tensor],
    leaves: list[Tensor],
    training: bool,
) -> Calls:
    own = [leaf.detach().requires_grad_() for leaf in leaves]
    grad = torch.randn_like(ours(own).detach()) if training else None

    def call(function: Callable[[list[Tensor]], Tensor]) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return function(leaves)

        return (lambda: torch.autograd.grad(function(own), own, grad)) if training else forward

    return Calls(call(ours), call(theirs), call(torch.compile(theirs)))


def _pyramid(
    batch: int, size: int, rates: tuple[int, ...], training: bool = False
) -> Callable[[], Calls]:
    """DeepLab v3's branches in bfloat16: convolution, batch normalisation of eval(), ReLU, cat."""

    def make() -> Calls:
        from pydense.ops import aspp_concat

        x = pictures(batch, 2048, size, size, dtype=torch.bfloat16, last=True)
        weights = [
            (torch.randn(256, 2048, *[1 if rate == 1 else 3] * 2, device="cuda") / 64)
            .bfloat16()
            .contiguous(memory_format=LAST)
            for rate in rates
        ]
        scales = [1 + 0.1 * torch.randn(256, device="cuda") for _ in rates]
        biases = [torch.randn(256, device="cuda") for _ in rates]
        mean, variance = torch.zeros(256, device="cuda"), torch.ones(256, device="cuda")

        def ours(leaves: list[Tensor]) -> Tensor:
            return aspp_concat(
                leaves[0], leaves[1:], rates, scales=scales, biases=biases, activation="relu"
            )

        def theirs(leaves: list[Tensor]) -> Tensor:
            found = []
            for weight, rate, scale, bias in zip(leaves[1:], rates, scales, biases, strict=True):
                padding = rate * (weight.shape[2] // 2)
                y = conv2d(leaves[0], weight, padding=padding, dilation=rate)
                found.append(batch_norm(y, mean, variance, scale, bias).relu())
            return torch.cat(found, 1)

        return _calls(ours, theirs, [x, *weights], training)

    return make


def _head(dtype: torch.dtype, training: bool = False) -> Callable[[], Calls]:
    """DeepLab v2's classifier: four convolutions and their sum."""

    def make() -> Calls:
        from pydense import reference
        from pydense.ops import aspp_sum

        rates = (6, 12, 18, 24)
        x = pictures(1, 2048, 65, 65, dtype=dtype, last=True)
        weights = [
            (torch.randn(21, 2048, 3, 3, device="cuda") / 64)
            .to(dtype)
            .contiguous(memory_format=LAST)
            for _ in rates
        ]
        return _calls(
            lambda leaves: aspp_sum(leaves[0], leaves[1:], rates=rates),
            lambda leaves: reference.aspp_sum(leaves[0], leaves[1:], rates=rates),
            [x, *weights],
            training,
        )

    return make


def _convolution(
    shape: tuple[int, int, int, int],
    outputs: int,
    groups: int,
    dtype: torch.dtype,
    training: bool = False,
) -> Callable[[], Calls]:
    """One of rate 12."""

    def make() -> Calls:
        from pydense.ops import atrous_conv2d

        x = pictures(*shape, dtype=dtype, last=True)
        weight = torch.randn(outputs, shape[1] // groups, 3, 3, device="cuda") / 64
        weight = weight.to(dtype).contiguous(memory_format=LAST)
        same = {"padding": 12, "dilation": 12, "groups": groups}
        return _calls(
            lambda leaves: atrous_conv2d(*leaves, **same),
            lambda leaves: conv2d(*leaves, **same),
            [x, weight],
            training,
        )

    return make


V3 = (1, 6, 12, 18)
BF16, F32 = torch.bfloat16, torch.float32

# All channels_last, which cuDNN's kernels for tensor cores ask for.
OPERATORS: dict[str, Callable[[], Calls]] = {
    "DeepLab v3's branches, 1 x 2048 x 33 x 33, bfloat16": _pyramid(1, 33, V3),
    "DeepLab v3's branches, 16 x 2048 x 33 x 33, bfloat16": _pyramid(16, 33, V3),
    "DeepLab v3's branches, 1 x 2048 x 65 x 65, rates 12, 24, 36, bfloat16": _pyramid(
        1, 65, (1, 12, 24, 36)
    ),
    "DeepLab v3's branches, 16 x 2048 x 33 x 33, bfloat16, gradients": _pyramid(16, 33, V3, True),
    "DeepLab v2's head, 1 x 2048 x 65 x 65 to 21, bfloat16": _head(BF16),
    "DeepLab v2's head, 1 x 2048 x 65 x 65 to 21, bfloat16, gradients": _head(BF16, True),
    "DeepLab v2's head, 1 x 2048 x 65 x 65 to 21, float32": _head(F32),
    "LargeFOV, 1 x 512 x 41 x 41 to 1024, bfloat16": _convolution((1, 512, 41, 41), 1024, 1, BF16),
    "LargeFOV, 8 x 512 x 41 x 41 to 1024, bfloat16, gradients": _convolution(
        (8, 512, 41, 41), 1024, 1, BF16, True
    ),
    "depthwise, 1 x 2048 x 65 x 65, bfloat16": _convolution((1, 2048, 65, 65), 2048, 2048, BF16),
    "depthwise, 1 x 2048 x 65 x 65, float32": _convolution((1, 2048, 65, 65), 2048, 2048, F32),
    "depthwise, 8 x 2048 x 65 x 65, bfloat16, gradients": _convolution(
        (8, 2048, 65, 65), 2048, 2048, BF16, True
    ),
}
TWIN_OPERATORS: dict[str, Callable[[], Calls]] = {
    f"{name}, sm_90a twin": switched(OPERATORS[name])
    for name in (
        "DeepLab v3's branches, 1 x 2048 x 33 x 33, bfloat16",
        "DeepLab v3's branches, 16 x 2048 x 33 x 33, bfloat16",
        "LargeFOV, 1 x 512 x 41 x 41 to 1024, bfloat16",
    )
}
