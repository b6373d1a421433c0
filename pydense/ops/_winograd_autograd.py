# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of Winograd's atrous convolutions: operator, fake, derivatives, FLOP.

The picture's gradient is the same operator with the weights turned round, the weight's that of
dense convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pydense import _library

from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture, in_format, suggested
from ._operator import Differentiable, operator
from ._winograd import best_tile

_library.load()

from ._dense_autograd import dense_atrous_conv2d_weight_gradient  # noqa: E402
from ._mixed_autograd import direct  # noqa: E402

_OPS = torch.ops.pydense
_NAME = "winograd_atrous_conv2d"


@operator(_NAME)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rate: int,
    relu: bool,
    flipped: bool,
    tile: int,
) -> Tensor:
    """relu(conv + bias).

    Args:
        x: (N, C, H, W).
        weight: (O, C, 3, 3), or flipped (C, O, 3, 3), turned round: the convolution's adjoint.
        bias: (O,), or None.
        rate: Dilation and padding.
        relu: Whether negative results become 0.
        flipped: How the weight lies.
        tile: The largest tile that is allowed.
    """
    batch, _, height, width = x.shape
    outputs = weight.shape[1 if flipped else 0]
    own = tile if x.numel() == 0 else best_tile(batch, height, width, rate, tile)
    # A program that was exported on the CPU may have been moved.
    if own is None or not x.is_cpu:
        both = (rate, rate)
        made = direct(x, weight, bias, (height, width), both, both, flipped, relu)
        return in_format(made, suggested(x))
    out = empty_picture(x, height, width, channels=outputs)
    _OPS._winograd_atrous_conv2d(out, x, weight, bias, rate, relu, flipped, own)
    return out


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rate: int,
    relu: bool,
    flipped: bool,
    tile: int,
) -> Tensor:
    outputs = weight.shape[1 if flipped else 0]
    return empty_picture(x, x.shape[2], x.shape[3], channels=outputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.rate, ctx.relu, ctx.flipped, ctx.tile = inputs
    ctx.set_materialize_grads(False)
    # Each is what the other one's gradient needs.
    ctx.with_x, ctx.with_weight = weight.requires_grad, x.requires_grad
    ctx.save_for_backward(*[x] * ctx.with_x, *[weight] * ctx.with_weight, *[output] * ctx.relu)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    refuse_tangent("atrous_conv2d (backward)", "grad", grad)
    saved = list(ctx.saved_tensors)
    x = saved.pop(0) if ctx.with_x else None
    weight = saved.pop(0) if ctx.with_weight else None
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, saved[0], 0)
    of_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        of_x = winograd_atrous_conv2d(
            grad, weight, None, ctx.rate, False, not ctx.flipped, ctx.tile
        )
    if ctx.needs_input_grad[1] and x is not None:
        of_weight = dense_atrous_conv2d_weight_gradient(grad, x, 3, 3, *(ctx.rate,) * 4)
        of_weight = of_weight.transpose(0, 1).flip(2, 3) if ctx.flipped else of_weight
    return of_x, of_weight, of_bias, *[None] * 4


def _flops(shape: Any, weight: Any, *rest: Any, **values: Any) -> int:
    """Two for each tap and pair of channels, as torch counts a convolution."""
    batch, _, height, width = shape
    return int(2 * batch * height * width * weight[0] * weight[1] * 9)


torch.library.register_fake(f"pydense::{_NAME}")(_fake)
torch.library.register_fake("pydense::_winograd_atrous_conv2d")(lambda *arguments: None)
winograd_atrous_conv2d = Differentiable(_NAME, _setup, _backward, _convolution)
register_flop_formula(_OPS.winograd_atrous_conv2d)(_flops)
