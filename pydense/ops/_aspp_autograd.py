# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of aspp_sum: operators, fakes, derivatives, FLOP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._aspp_products import gradients_of_branches, sum_of_branches, taps_of
from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture, suggested
from ._operator import Differentiable, operator

_OPS = torch.ops.pydense


@operator("aspp_sum")
def _sum(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rates: Sequence[int]
) -> Tensor:
    return sum_of_branches(x, weights, biases, rates)


def _fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rates: Sequence[int]
) -> Tensor:
    return empty_picture(x, x.shape[2], x.shape[3], channels=weights[0].shape[0])


# Without a derivative of its own: a second derivative raises. The picture's gradient is made where
# there are weights, those of weights where x is given; channels_last says how the picture lay.
@torch.library.custom_op("pydense::aspp_sum_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    channels_last: bool,
    need_weights: Sequence[bool],
) -> list[Tensor]:
    layout = _format(channels_last)
    of_x, of_weights = gradients_of_branches(grad, x, weights, rates, layout, need_weights)
    return [*([] if of_x is None else [of_x]), *of_weights]


def _fake_backward(
    grad: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    channels_last: bool,
    need_weights: Sequence[bool],
) -> list[Tensor]:
    batch, outputs, height, width = grad.shape
    made = []
    if weights:
        size = (batch, weights[0].shape[1], height, width)
        layout = _format(channels_last)
        made.append(grad.new_empty(size).contiguous(memory_format=layout))
    if x is not None:
        size = (outputs, x.shape[1], 3, 3)
        made += [grad.new_empty(size) for need in need_weights if need]
    return made


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases, rates = inputs
    ctx.rates = list(rates)
    ctx.channels_last = suggested(x) == torch.channels_last
    ctx.with_x = any(w.requires_grad for w in weights)
    ctx.biases = len(biases)
    ctx.save_for_backward(*[x] * ctx.with_x, *(weights if x.requires_grad else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangent("aspp_sum (backward)", "grad", grad)
    need_x, need_weights, need_biases = ctx.needs_input_grad[:3]
    of_x = of_bias = None
    of_weights: list[Tensor | None] = [None] * len(ctx.rates)
    if need_x or any(need_weights):
        saved = list(ctx.saved_tensors)
        x = saved.pop(0) if ctx.with_x else None
        made = iter(
            _OPS.aspp_sum_backward(
                grad,
                x if any(need_weights) else None,
                saved if need_x else [],
                ctx.rates,
                ctx.channels_last,
                list(need_weights),
            )
        )
        of_x = next(made) if need_x else None
        of_weights = [next(made) if need else None for need in need_weights]
    needed = list(need_biases) if ctx.biases else []
    if any(needed):
        of_bias = grad.sum((0, 2, 3))
    return of_x, of_weights, [of_bias if need else None for need in needed], None


def _flops(shape: Any, weights: Any, biases: Any, rates: Any, *rest: Any, **values: Any) -> int:
    """Of the product: two for each number of a tap that is left."""
    batch, channels, height, width = shape
    taps = len(taps_of(rates, height, width).rows)
    return int(2 * batch * channels * height * width * weights[0][0] * taps)


def _backward_flops(shape: Any, x: Any, weights: Any, rates: Any, *rest: Any, **values: Any) -> int:
    batch, outputs, height, width = shape
    channels = weights[0][1] if weights else x[1]
    products = bool(weights) + (x is not None)
    taps = len(taps_of(rates, height, width).rows)
    return int(2 * batch * channels * height * width * outputs * taps * products)


torch.library.register_fake("pydense::aspp_sum")(_fake)
torch.library.register_fake("pydense::aspp_sum_backward")(_fake_backward)
for _name in (
    *("sum", "spread", "products", "picture_gradient", "stack_gradient"),
    *("add", "gather", "unstack"),
):
    torch.library.register_fake(f"pydense::_tap_{_name}")(lambda *arguments: None)
torch.library.register_fake("pydense::_tap_stack")(
    lambda weights, places, taps, first, count: weights[0].new_empty(
        (taps * count, weights[0].shape[1])
    )
)
aspp_sum: Differentiable[Tensor] = Differentiable("aspp_sum", _setup, _backward, _sum)
register_flop_formula(_OPS.aspp_sum)(_flops)
register_flop_formula(_OPS.aspp_sum_backward)(_backward_flops)
