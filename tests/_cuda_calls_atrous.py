# SPDX-License-Identifier: Apache-2.0
"""Calls of atrous convolutions, for ``_cuda_calls.CALLS``."""

from __future__ import annotations

import torch
from _cuda_call import Call, normal
from torch import Tensor

from pydense.ops import aspp_sum, atrous_conv2d
from pydense.ops._memory_format import empty_picture


def aspp(x: Tensor, *parameters: Tensor) -> Tensor:
    half = len(parameters) // 2
    return aspp_sum(x, parameters[:half], parameters[half:], rates=(1, 3, 40)[:half])


def large_aspp(device: torch.device) -> None:
    """The last image is its own; past 2^31 numbers in the picture and its gradient."""
    x = torch.zeros(2**31 // (512 * 65 * 65) + 2, 512, 65, 65, dtype=torch.bfloat16, device=device)
    x[-1, 5, 40, 41] = 1
    weight = torch.zeros(2, 512, 3, 3, dtype=torch.bfloat16, device=device)
    weight[1, 5] = torch.arange(1, 10, dtype=torch.bfloat16, device=device).view(3, 3)
    out = aspp_sum(x.requires_grad_(), [weight], rates=[6])
    assert float(out[-1, 1].sum()) == 45 == float(out.sum())
    assert float(out[-1, 1, 46, 47]) == 1 and float(out[-1, 1, 34, 35]) == 9
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert float(grad[-1, 5, 32, 32]) == 45 == float(grad[0, 5, 32, 32])


def dense_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The operator itself: the rule of atrous_conv2d would leave small ones to torch."""
    result: Tensor = torch.ops.pydense.dense_atrous_conv2d(
        x, weight, None, bias, *x.shape[2:], 3, 3, 3, 3, False, False
    )
    return result


def large_dense_convolution(device: torch.device) -> None:
    """The last image is its own."""
    x = torch.zeros(2**31 // 2**19 + 1, 8, 256, 256, dtype=torch.bfloat16, device=device)
    x[-1, 3, 60, 61] = 3
    weight = torch.ones(8, 8, 3, 3, dtype=torch.bfloat16, device=device)
    bias = torch.zeros(8, dtype=torch.bfloat16, device=device)
    out = dense_convolution(x, weight, bias)
    assert float(out[-1].sum()) == 8 * 9 * 3 == float(out.sum())


def dense_branches(x: Tensor, one: Tensor, two: Tensor, three: Tensor, shift: Tensor) -> Tensor:
    """Into parts of one result: two branches in a launch, one of them packed, and one alone."""
    out = empty_picture(x, *x.shape[2:], channels=40)
    ops = torch.ops.pydense
    packed: list[Tensor] = []
    if not torch.compiler.is_compiling():  # nothing is packed in traced code
        packed = [ops._pack_dense_atrous_weight(one, False), x.new_empty(0, dtype=torch.uint8)]
    ops._dense_atrous_conv2d_branches_into(
        x, [one, two], packed, [shift, shift], [shift, shift], out[:, :24], [1, 3], True
    )
    ops._dense_atrous_conv2d_branches_into(x, [three], [], [], [], out[:, 24:], [2], False)
    return out


def dense_tolerance(dtype: torch.dtype) -> float:
    """float32 is multiplied in TF32, which rounds operands to 11 bits."""
    return 2**-9 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def depthwise_map(x: Tensor) -> Tensor:
    """Both kernels, of 3x3 and of another size; the map's gradient alone."""
    weight = torch.linspace(-1, 1, x.shape[1] * 9).view(-1, 1, 3, 3).to(x)
    out = atrous_conv2d(x, weight, dilation=3, groups=x.shape[1], activation="relu")
    return out + atrous_conv2d(x, weight[:, :, :2], dilation=2, groups=x.shape[1])


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return atrous_conv2d(x, weight, bias, dilation=2, groups=x.shape[1])


def separable(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, inner: Tensor, outer: Tensor
) -> Tensor:
    """The operator itself, in one pass: the rule would leave small ones to two steps."""
    result: Tensor = torch.ops.pydense.atrous_separable_conv2d(
        x, depthwise, inner, pointwise, outer, *x.shape[2:], 2, 2, 2, 2, True, False
    )
    return result


def large_depthwise(device: torch.device) -> None:
    """The last plane is its own, and its weight."""
    channels = 2**31 // 2**14 + 1
    x = torch.zeros(1, channels, 128, 128, dtype=torch.bfloat16, device=device)
    x[0, -1, 60, 61] = 2
    weight = torch.ones(channels, 1, 3, 3, dtype=torch.bfloat16, device=device)
    weight[-1] = 3
    out = atrous_conv2d(x.requires_grad_(), weight.requires_grad_(), dilation=12, groups=channels)
    assert float(out[0, -1].sum()) == 54 == float(out.sum())
    of_x, of_weight = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    assert float(of_x[0, -1, 60, 61]) == 27 and float(of_x[0, 0, 60, 61]) == 9
    assert float(of_weight[-1].sum()) == 18 == float(of_weight.sum())


ATROUS_CALLS: dict[str, Call] = {
    "atrous_conv2d": Call(
        run=depthwise_map,
        inputs=lambda: (normal(2, 8, 11, 13),),
        tolerance=lambda dtype: 8 * torch.finfo(dtype).eps,
    ),
    "atrous_conv2d and its weight": Call(
        run=depthwise,
        inputs=lambda: (normal(2, 12, 9, 10), normal(12, 1, 3, 3, seed=1), normal(12, seed=2)),
        tolerance=lambda dtype: 16 * torch.finfo(dtype).eps,
        images=False,  # sums of weights have another order in another format
        large=large_depthwise,
    ),
    "aspp_sum": Call(
        run=aspp,
        inputs=lambda: (
            normal(2, 16, 9, 12),
            *(normal(5, 16, 3, 3, seed=i) / 16 for i in range(3)),
            *(normal(5, seed=i) for i in range(3)),
        ),
        tolerance=lambda dtype: 32 * torch.finfo(dtype).eps,
        images=False,  # the products are torch's, of other operands for another format
        large=large_aspp,
    ),
    "dense_atrous_conv2d": Call(
        run=dense_convolution,
        inputs=lambda: (normal(2, 8, 9, 11), normal(16, 8, 3, 3, seed=1) / 8, normal(16, seed=2)),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        tolerance=dense_tolerance,
        large=large_dense_convolution,
    ),
    "dense_atrous_conv2d into a part": Call(
        run=dense_branches,
        inputs=lambda: (
            normal(2, 8, 9, 11),
            *(normal(n, 8, 3, 3, seed=i) / 8 for i, n in enumerate((12, 12, 16), 3)),
            normal(12, seed=2),
        ),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        tolerance=dense_tolerance,
        gradient=False,
    ),
    "atrous_separable_conv2d": Call(
        run=separable,
        inputs=lambda: (
            normal(2, 12, 9, 10),
            normal(12, 1, 3, 3, seed=1) / 4,
            normal(6, 12, 1, 1, seed=2) / 4,
            normal(12, seed=3),
            normal(6, seed=4),
        ),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        tolerance=lambda dtype: 4 * dense_tolerance(dtype),
        images=False,  # the products of its gradient are torch's
    ),
}
