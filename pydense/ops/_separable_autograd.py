# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of atrous_separable_conv2d: its fake, derivatives of any order, FLOP.

Backward goes through the operators of its two halves, which have derivatives of their own. The map
between them is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._atrous_autograd import (
    depthwise_atrous_conv2d,
    depthwise_atrous_conv2d_weight_gradient,
)
from ._conv1x1_gradient import conv1x1_backward
from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture, suggested
from ._operator import Differentiable

_OPS = torch.ops.pydense


def _fake(
    x: Tensor,
    depthwise: Tensor,
    inner_bias: Tensor | None,
    pointwise: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    *rest: Any,
) -> Tensor:
    return empty_picture(x, height, width, channels=pointwise.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, depthwise, inner_bias, pointwise, _, *geometry, ctx.inner_relu, ctx.relu = inputs
    ctx.geometry = geometry
    ctx.with_bias = inner_bias is not None
    ctx.save_for_backward(
        x, depthwise, pointwise, *[inner_bias] * ctx.with_bias, *[output] * ctx.relu
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangent("atrous_separable_conv2d (backward)", "grad", grad)
    x, depthwise, pointwise, *saved = ctx.saved_tensors
    inner_bias = saved.pop(0) if ctx.with_bias else None
    dilation_y, dilation_x, top, left = ctx.geometry[2:]
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, saved[0], 0)
    grad = grad.contiguous(memory_format=suggested(x))
    need_x, need_depthwise, need_inner, need_pointwise, need_bias = ctx.needs_input_grad[:5]
    through = need_x or need_depthwise or need_inner
    inner = None
    if need_pointwise or (through and ctx.inner_relu):
        inner = depthwise_atrous_conv2d(
            x, depthwise, inner_bias, *ctx.geometry, False, ctx.inner_relu
        )
    of_inner, of_pointwise, of_bias = conv1x1_backward(
        grad, inner, pointwise, (through, need_pointwise, need_bias)
    )
    of_x = of_depthwise = of_inner_bias = None
    if through and ctx.inner_relu:
        of_inner = torch.ops.aten.threshold_backward(of_inner, inner, 0)
    if need_x:
        of_x = depthwise_atrous_conv2d(
            of_inner,
            depthwise,
            None,
            *x.shape[2:],
            dilation_y,
            dilation_x,
            dilation_y * (depthwise.shape[2] - 1) - top,
            dilation_x * (depthwise.shape[3] - 1) - left,
            True,
            False,
        )
    if need_depthwise:
        of_depthwise = depthwise_atrous_conv2d_weight_gradient(
            of_inner, x, *depthwise.shape[2:], dilation_y, dilation_x, top, left
        )
    if need_inner:
        of_inner_bias = of_inner.sum((0, 2, 3))
    return of_x, of_depthwise, of_inner_bias, of_pointwise, of_bias, *[None] * 8


def _flops(
    shape: Any,
    depthwise: Any,
    inner_bias: Any,
    pointwise: Any,
    bias: Any,
    height: int,
    width: int,
    *rest: Any,
    **values: Any,
) -> int:
    """Two for each tap and output, as torch counts."""
    batch, channels = shape[:2]
    each = depthwise[2] * depthwise[3] + pointwise[0]
    return int(2 * batch * channels * height * width * each)


torch.library.register_fake("pydense::atrous_separable_conv2d")(_fake)
atrous_separable_conv2d: Differentiable[Tensor] = Differentiable(
    "atrous_separable_conv2d", _setup, _backward
)
register_flop_formula(_OPS.atrous_separable_conv2d)(_flops)
