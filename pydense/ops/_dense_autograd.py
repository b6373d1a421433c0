# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of the dense operators: fakes, derivatives of any order, FLOP.

As of the depthwise ones (``_atrous_autograd``), but for the exchange of inputs and outputs: with
respect to x, the operator's derivative is itself with the kernel turned round and transposed.
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
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    height: int,
    width: int,
    dilation_y: int,
    dilation_x: int,
    top: int,
    left: int,
    transposed: bool,
    relu: bool,
) -> Tensor:
    return empty_picture(x, height, width, channels=weight.shape[1 if transposed else 0])


def _fake_into(*arguments: Any) -> None:
    return None


def _fake_pack(weight: Tensor, transposed: bool) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()  # the CPU's instruction set decides
    return weight.new_empty((size,), dtype=torch.uint8)


def _fake_gradient(
    grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int, *rest: Any
) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1], kernel_height, kernel_width))


def _adjoint(x: Tensor, weight: Tensor, geometry: Any, size: Any, transposed: bool) -> Tensor:
    """From what the operator makes back to maps of ``size``."""
    dilation_y, dilation_x, top, left = geometry
    result: Tensor = _OPS.dense_atrous_conv2d(
        x,
        weight,
        None,
        None,
        *size,
        dilation_y,
        dilation_x,
        dilation_y * (weight.shape[2] - 1) - top,
        dilation_x * (weight.shape[3] - 1) - left,
        not transposed,
        False,
    )
    return result


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, _, _, *geometry, ctx.transposed, ctx.relu = inputs
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
        of_x = _adjoint(grad, weight, ctx.geometry, ctx.size, ctx.transposed)
    if ctx.needs_input_grad[1]:
        of_weight = _OPS.dense_atrous_conv2d_weight_gradient(grad, x, *ctx.kernel, *ctx.geometry)
        of_weight = of_weight.transpose(0, 1).flip(2, 3) if ctx.transposed else of_weight
    if ctx.needs_input_grad[3]:
        of_bias = grad.sum((0, 2, 3))
    return of_x, of_weight, None, of_bias, *[None] * 8


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(grad, x)


def _gradient_backward(ctx: Any, of_weight: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = _OPS.dense_atrous_conv2d(
            x, of_weight, None, None, *grad.shape[2:], *ctx.geometry, False, False
        )
    if ctx.needs_input_grad[1]:
        of_x = _adjoint(grad, of_weight, ctx.geometry, x.shape[2:], False)
    return of_grad, of_x, *[None] * 6


def _flops(
    shape: Any, weight: Any, packed: Any, bias: Any, height: int, width: int, *rest: Any, **_: Any
) -> int:
    """Two for each tap, channel and output, as torch counts."""
    outputs, channels, *kernel = weight
    return int(2 * shape[0] * height * width * outputs * channels * kernel[0] * kernel[1])


def _gradient_flops(
    shape: Any, x: Any, kernel_height: int, kernel_width: int, *rest: Any, **_: Any
) -> int:
    batch, outputs, height, width = shape
    return int(2 * batch * height * width * outputs * x[1] * kernel_height * kernel_width)


torch.library.register_fake("pydense::dense_atrous_conv2d")(_fake)
torch.library.register_fake("pydense::_dense_atrous_conv2d_into")(_fake_into)
torch.library.register_fake("pydense::_dense_atrous_conv2d_branches_into")(_fake_into)
torch.library.register_fake("pydense::_pack_dense_atrous_weight")(_fake_pack)
torch.library.register_fake("pydense::dense_atrous_conv2d_weight_gradient")(_fake_gradient)
torch.library.register_autograd("pydense::dense_atrous_conv2d", _backward, setup_context=_setup)
torch.library.register_autograd(
    "pydense::dense_atrous_conv2d_weight_gradient",
    _gradient_backward,
    setup_context=_setup_gradient,
)
register_flop_formula(_OPS.dense_atrous_conv2d)(_flops)
register_flop_formula(_OPS.dense_atrous_conv2d_weight_gradient)(_gradient_flops)
