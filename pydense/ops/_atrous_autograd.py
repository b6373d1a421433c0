# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of the depthwise operators: fakes, derivatives of any order, FLOP.

The operator is linear in both of its inputs. With respect to one it is the same operator with the
kernel turned round, with respect to the other the weight's gradient, whose own derivatives are the
operator again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture

_OPS = torch.ops.pydense


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, *rest: Any
) -> Tensor:
    return empty_picture(x, height, width)


def _fake_gradient(
    grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int, *rest: Any
) -> Tensor:
    return x.new_empty((x.shape[1], 1, kernel_height, kernel_width))


def _adjoint(x: Tensor, weight: Tensor, geometry: Any, size: Any, flipped: bool) -> Tensor:
    """From what the operator makes back to maps of ``size``."""
    dilation_y, dilation_x, top, left = geometry
    result: Tensor = _OPS.depthwise_atrous_conv2d(
        x,
        weight,
        None,
        *size,
        dilation_y,
        dilation_x,
        dilation_y * (weight.shape[2] - 1) - top,
        dilation_x * (weight.shape[3] - 1) - left,
        not flipped,
        False,
    )
    return result


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, _, *geometry, ctx.flipped, ctx.relu = inputs
    ctx.geometry, ctx.size, ctx.kernel = geometry, x.shape[2:], weight.shape[2:]
    # Each is what the other one's gradient needs.
    ctx.with_x, ctx.with_weight = weight.requires_grad, x.requires_grad
    ctx.save_for_backward(*[x] * ctx.with_x, *[weight] * ctx.with_weight, *[output] * ctx.relu)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangent("atrous_conv2d (backward)", "grad", grad)
    saved = list(ctx.saved_tensors)
    x = saved.pop(0) if ctx.with_x else None
    weight = saved.pop(0) if ctx.with_weight else None
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, saved[0], 0)
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0] and weight is not None:
        of_x = _adjoint(grad, weight, ctx.geometry, ctx.size, ctx.flipped)
    if ctx.needs_input_grad[1]:
        of_weight = _OPS.depthwise_atrous_conv2d_weight_gradient(
            grad, x, *ctx.kernel, *ctx.geometry
        )
        of_weight = of_weight.flip(2, 3) if ctx.flipped else of_weight
    if ctx.needs_input_grad[2]:
        of_bias = grad.sum((0, 2, 3))
    return of_x, of_weight, of_bias, *[None] * 8


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(grad, x)


def _gradient_backward(ctx: Any, of_weight: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = _OPS.depthwise_atrous_conv2d(
            x, of_weight, None, *grad.shape[2:], *ctx.geometry, False, False
        )
    if ctx.needs_input_grad[1]:
        of_x = _adjoint(grad, of_weight, ctx.geometry, x.shape[2:], False)
    return of_grad, of_x, *[None] * 6


def _flops(
    shape: Any, weight: Any, bias: Any, height: int, width: int, *rest: Any, **values: Any
) -> int:
    """Two for each tap and output, as torch counts."""
    batch, channels = shape[:2]
    return int(2 * batch * channels * height * width * weight[2] * weight[3])


def _gradient_flops(
    shape: Any, x: Any, kernel_height: int, kernel_width: int, *rest: Any, **values: Any
) -> int:
    batch, channels, height, width = shape
    return int(2 * batch * channels * height * width * kernel_height * kernel_width)


torch.library.register_fake("pydense::depthwise_atrous_conv2d")(_fake)
torch.library.register_fake("pydense::depthwise_atrous_conv2d_weight_gradient")(_fake_gradient)
torch.library.register_autograd("pydense::depthwise_atrous_conv2d", _backward, setup_context=_setup)
torch.library.register_autograd(
    "pydense::depthwise_atrous_conv2d_weight_gradient",
    _gradient_backward,
    setup_context=_setup_gradient,
)
register_flop_formula(_OPS.depthwise_atrous_conv2d)(_flops)
register_flop_formula(_OPS.depthwise_atrous_conv2d_weight_gradient)(_gradient_flops)
