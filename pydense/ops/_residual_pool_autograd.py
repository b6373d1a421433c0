# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of chained residual pooling with 1x1 convolutions.

Backward walks the chain from its end. What arrives at a stage's result is the gradient of the block
(the residual) plus what the stages behind it hand back, so the pool's backward adds the one to the
other while it gathers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._conv1x1_gradient import conv1x1_backward
from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture, suggested
from ._operator import Differentiable
from ._pool_autograd import max_pool2d_same_backward

_OPS = torch.ops.pydense


def _fake(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    pool_first: bool,
    pool_size: int,
    save_inputs: bool,
    save_offsets: bool,
) -> list[Tensor]:
    inputs = (len(weights) - (not pool_first)) * save_inputs
    dtypes = [x.dtype] * (1 + inputs) + [torch.uint8] * (len(weights) * save_offsets)
    return [empty_picture(x, x.shape[2], x.shape[3], dtype) for dtype in dtypes]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, ctx.pool_first, ctx.pool_size, ctx.save_inputs, ctx.save_offsets = inputs
    saved = output[1:]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # else zeros of the size of all that is saved
    ctx.stages, ctx.with_bias = len(weights), bool(biases)
    first = [x] if ctx.save_inputs and not ctx.pool_first else []
    ctx.save_for_backward(*weights, *first, *saved)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    op = "chained_residual_pool (backward)"
    need_x, need_weights, need_biases = ctx.needs_input_grad[:3]
    need_weights, need_biases = list(need_weights), list(need_biases or [])
    grad = grads[0]
    if grad is None:
        return None, [None] * len(need_weights), [None] * len(need_biases), *[None] * 4
    refuse_tangent(op, "grad", grad)
    if not ctx.save_offsets or (any(need_weights) and not ctx.save_inputs):
        raise RuntimeError(
            f"{op}: save_inputs and save_offsets must be True where gradients are wanted"
        )
    n = ctx.stages
    tensors = list(ctx.saved_tensors)
    weights, convolved, offsets = tensors[:n], tensors[n:-n], tensors[-n:]
    made = iter(
        _OPS.chained_residual_pool_backward(
            grad,
            weights,
            convolved,
            offsets,
            ctx.pool_first,
            ctx.pool_size,
            [need_x],
            need_weights,
            need_biases,
        )
    )
    return (
        next(made) if need_x else None,
        [next(made) if need else None for need in need_weights],
        [next(made) if need else None for need in need_biases],
        *[None] * 4,
    )


def _own_products(grad: Tensor) -> bool:
    """Whether the gradients of convolutions are pydense's products, else torch's."""
    # torch's know AMX, with many times the speed of what pydense has for bfloat16.
    return grad.is_cpu and (grad.dtype != torch.bfloat16 or _OPS._cpu_capability() != "amx")


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, addend: Tensor | None, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of a 1x1 convolution's input (plus ``addend``), weight and bias."""
    if _own_products(grad):
        made = iter(_OPS.residual_stage_backward(grad, x, weight, addend, *needed))
        return tuple(next(made) if need else None for need in needed)
    layout = suggested(grad)
    if grad.is_cpu:
        one, none = [1, 1], [0, 0]
        below, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, [grad.shape[1]], one, none, one, False, none, 1, needed
        )
    else:
        x = x.contiguous(memory_format=layout)
        below, of_weight, of_bias = conv1x1_backward(grad, x, weight, needed)
    if addend is not None and below is not None:
        below = (below + addend).contiguous(memory_format=layout)
    return below, None if of_weight is None else of_weight.contiguous(), of_bias


# Without a derivative of its own: a second derivative raises.
@torch.library.custom_op("pydense::chained_residual_pool_backward", mutates_args=())
def _chain_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    convolved: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pool_first: bool,
    pool_size: int,
    need_x: Sequence[bool],
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
) -> list[Tensor]:
    n = len(weights)
    layout = suggested(offsets[0])
    grad = grad.contiguous(memory_format=layout)
    grads_of_weights: list[Tensor] = []
    grads_of_biases: list[Tensor] = []
    grad_x: list[Tensor] = []
    top = grad
    for i in reversed(range(n)):
        needed = [
            need_x[0] or any(need_weights[:i]) or any(need_biases[:i]),
            need_weights[i],
            bool(need_biases) and need_biases[i],
        ]
        if not pool_first:
            top = max_pool2d_same_backward(top, offsets[i], None, pool_size)
        # Without weights' gradients only the shape of the input counts.
        convolved_here = convolved[i] if convolved else top
        below, weight, bias = _convolution_backward(
            top, convolved_here, weights[i], None if pool_first else grad, needed
        )
        if weight is not None:
            grads_of_weights.insert(0, weight)
        if bias is not None:
            grads_of_biases.insert(0, bias)
        if below is None:
            break
        top = below
        if pool_first:
            top = max_pool2d_same_backward(below, offsets[i], grad, pool_size)
    if need_x[0]:
        grad_x.append(top)
    return [*grad_x, *grads_of_weights, *grads_of_biases]


def _fake_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    convolved: Sequence[Tensor],
    offsets: Sequence[Tensor],
    pool_first: bool,
    pool_size: int,
    need_x: Sequence[bool],
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
) -> list[Tensor]:
    height, width = grad.shape[2:]
    return [
        *[empty_picture(offsets[0], height, width, grad.dtype) for need in need_x if need],
        *[
            weight.new_empty(weight.shape)
            for weight, need in zip(weights, need_weights, strict=True)
            if need
        ],
        *[grad.new_empty(grad.shape[1]) for need in need_biases if need],
    ]


def _fake_stage_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    addend: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    made = [empty_picture(grad, grad.shape[2], grad.shape[3])] if need_x else []
    made += [weight.new_empty(weight.shape)] if need_weight else []
    return made + ([grad.new_empty(grad.shape[1])] if need_bias else [])


def _flops(
    shape: Any, weights: Any, biases: Any, pool_first: Any, pool_size: int, *rest: Any, **v: Any
) -> int:
    batch, channels, rows, columns = shape
    elements = batch * channels * rows * columns
    return int(len(weights) * elements * (2 * channels + 2 * (pool_size - 1) + 1))


def _backward_flops(
    shape: Any,
    weights: Any,
    convolved: Any,
    offsets: Any,
    first: Any,
    size: int,
    *rest: Any,
    **v: Any,
) -> int:
    batch, channels, rows, columns = shape
    elements = batch * channels * rows * columns
    return int(len(weights) * elements * (4 * channels + 2 * (size - 1) + 1))


torch.library.register_fake("pydense::chained_residual_pool")(_fake)
torch.library.register_fake("pydense::chained_residual_pool_backward")(_fake_backward)
torch.library.register_fake("pydense::residual_stage_backward")(_fake_stage_backward)
chained_residual_pool: Differentiable[list[Tensor]] = Differentiable(
    "chained_residual_pool", _setup, _backward
)
register_flop_formula(_OPS.chained_residual_pool)(_flops)
register_flop_formula(_OPS.chained_residual_pool_backward)(_backward_flops)
