# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of aspp_concat: operators, fakes, derivatives, FLOP.

Every branch, its factor, shift and ReLU included, is written into its channels of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import register_flop_formula

from ._atrous_dispatch import Call, Choice, Kernels, choose, own_weight_gradient
from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture, in_format, suggested
from ._operator import Differentiable, operator

_OPS = torch.ops.pydense


@operator("aspp_concat")
def _concat(
    x: Tensor,
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    pool_weight: Tensor | None,
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    rates: Sequence[int],
    relu: bool,
) -> Tensor:
    """``packed`` is empty, or has a tensor for each weight, without elements where it is not."""
    out = _fake(x, weights, packed, pool_weight, scales, biases, rates, relu)
    parts = _parts(out, weights, pool_weight)
    owns = are_own(x, weights, rates)
    first = 0  # of the channels
    # Neighbours go together: in one launch on CUDA; on the CPU, x is laid out for all of them.
    for own, numbers in itertools.groupby(range(len(weights)), owns.__getitem__):
        some = list(numbers)
        run = slice(some[0], some[-1] + 1)
        end = first + sum(len(weight) for weight in weights[run])
        if own:
            options = [row[run] for row in (packed, scales, biases)]
            _OPS._dense_atrous_conv2d_branches_into(
                x, weights[run], *options, out[:, first:end], rates[run], relu
            )
        else:
            for i in some:
                scale, bias = (row[i] if row else None for row in (scales, biases))
                padding = _padding(weights[i], rates[i])
                made = conv2d(x, weights[i], padding=padding, dilation=rates[i])
                _finish(made, scale, bias, relu, parts[i])
        first = end
    if pool_weight is not None:
        scale, bias = (row[-1] if row else None for row in (scales, biases))
        _finish(conv2d(_mean(x), pool_weight), scale, bias, relu, parts[-1])
    return out


def _parts(out: Tensor, weights: Sequence[Tensor], pool_weight: Tensor | None) -> list[Tensor]:
    """Of the branches, one after the other."""
    every = [*weights, *([] if pool_weight is None else [pool_weight])]
    return list(torch.split(out, [weight.shape[0] for weight in every], 1))


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _finish(
    made: Tensor, scale: Tensor | None, bias: Tensor | None, relu: bool, out: Tensor
) -> None:
    """What stands behind a convolution of torch's; in float32 for 16-bit numbers."""
    if scale is not None:
        made = made * scale[:, None, None]
    if bias is not None:
        made = made + bias[:, None, None]
    out.copy_(made)
    if relu:
        out.relu_()


def _call(x: Tensor, weight: Tensor, rate: int) -> Call:
    outputs, channels, height, width = weight.shape
    last = suggested(x) == torch.channels_last
    shape = (channels, outputs, 1, (height, width), (1, 1), (rate, rate))
    return Call(x.device.type, x.dtype, last, *shape)


def choose_branch(x: Tensor, weight: Tensor, rate: int) -> Choice:
    """Who convolves a branch alone: the rule of atrous_conv2d without Winograd's algorithm."""
    choice = choose(_call(x, weight, rate))
    if choice.kernels is Kernels.DEPTHWISE:
        return Choice(
            Kernels.TORCH,
            "of one channel and one output it is depthwise, and branches have dense kernels alone",
        )
    return choice


def choose_branches(x: Tensor, weights: Sequence[Tensor], rates: Sequence[int]) -> list[Choice]:
    """Who convolves each branch, forward.

    On CUDA pydense's kernels do all where they do one: the others fill its launch.
    """
    alone = [choose_branch(x, weight, rate) for weight, rate in zip(weights, rates, strict=True)]
    dense = [i for i, choice in enumerate(alone) if choice.kernels is Kernels.DENSE]
    if x.device.type != "cuda" or not dense:
        return alone
    why = f"branch {dense[0]} is pydense's, and the others fill its launch"
    return [
        choice
        if choice.kernels is Kernels.DENSE
        else Choice(Kernels.DENSE, f"{why} (alone it would be torch's: {choice.reason})")
        for choice in alone
    ]


def are_own(x: Tensor, weights: Sequence[Tensor], rates: Sequence[int]) -> list[bool]:
    """For which branches pydense's kernels convolve, forward."""
    return [choice.kernels is Kernels.DENSE for choice in choose_branches(x, weights, rates)]


def own_gradients(x: Tensor, weight: Tensor, rate: int) -> tuple[bool, bool]:
    """Whether pydense's kernels compute the gradients of a branch: of x, and of its weight."""
    own = choose_branch(x, weight, rate).kernels is Kernels.DENSE
    return own, own or own_weight_gradient(_call(x, weight, rate)) is not None


def _fake(
    x: Tensor,
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    pool_weight: Tensor | None,
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    rates: Sequence[int],
    relu: bool,
) -> Tensor:
    channels = sum(weight.shape[0] for weight in weights)
    if pool_weight is not None:
        channels += pool_weight.shape[0]
    return empty_picture(x, x.shape[2], x.shape[3], channels=channels)


# Without a derivative of its own: a second derivative raises. `grad` has gone through the ReLU.
# Gradients of x (need_x), and of weights and scales, one after the other where `needed`.
@torch.library.custom_op("pydense::aspp_concat_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    pool_weight: Tensor | None,
    scales: Sequence[Tensor],
    rates: Sequence[int],
    need_x: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    layout = suggested(x)
    of_x, of_weights, of_scales = None, [], []
    branches = [*weights, *([] if pool_weight is None else [pool_weight])]
    for i, part in enumerate(_parts(grad, weights, pool_weight)):
        pools, weight, scale = i == len(weights), branches[i], scales[i] if scales else None
        if pools:  # a map of one pixel
            source, rate = _mean(x), 1
            part = part.sum((2, 3), keepdim=True)
        else:
            source, rate = x, rates[i]
        part = part.contiguous(memory_format=layout)
        need_weight, need_scale = needed[i], bool(scales) and needed[len(branches) + i]
        # The factor goes into the weight, which is smaller than a gradient.
        own, plain = _gradients(
            part, source, weight, scale, rate, (need_x, need_weight or need_scale)
        )
        if own is not None:
            if pools:
                own = (own / (x.shape[2] * x.shape[3])).expand(x.shape)
            of_x = in_format(own, layout) if of_x is None else of_x.add_(own)
        if plain is not None and need_weight:
            of_weights.append(_times(plain, scale).contiguous())
        if plain is not None and need_scale and scale is not None:
            # What the convolution makes is linear in its weight: it need not be made again.
            of_scales.append((plain.to(scale.dtype) * weight).sum((1, 2, 3)))
    return [*([] if of_x is None else [of_x]), *of_weights, *of_scales]


def _times(weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return weight
    return (weight * scale[:, None, None, None]).to(weight.dtype)


def _padding(weight: Tensor, rate: int) -> list[int]:
    return [rate * (k // 2) for k in weight.shape[2:]]


def _gradients(
    part: Tensor,
    source: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    rate: int,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of the source, with the factor, and of the weight, without it."""
    padding, scaled = _padding(weight, rate), _times(weight, scale)
    of_source = of_weight = None
    own, own_weight = own_gradients(source, weight, rate)
    if needed[0] and own:
        of_source = _OPS.dense_atrous_conv2d(
            part, scaled, None, None, *source.shape[2:], rate, rate, *padding, True, False
        )
    if needed[1] and own_weight:
        of_weight = _OPS.dense_atrous_conv2d_weight_gradient(
            part, source, *weight.shape[2:], rate, rate, *padding
        )
    theirs = [needed[0] and not own, needed[1] and not own_weight, False]
    if any(theirs):
        made = torch.ops.aten.convolution_backward(
            part, source, scaled, None, [1, 1], padding, [rate] * 2, False, [0, 0], 1, theirs
        )
        of_source = made[0] if theirs[0] else of_source
        of_weight = made[1] if theirs[1] else of_weight
    return of_source, of_weight


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    pool_weight: Tensor | None,
    scales: Sequence[Tensor],
    rates: Sequence[int],
    need_x: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    branches = [*weights, *([] if pool_weight is None else [pool_weight])]
    every = [t.new_empty(t.shape) for t in (*branches, *scales)]
    return [
        *([empty_picture(x, x.shape[2], x.shape[3])] if need_x else []),
        *(t for t, need in zip(every, needed, strict=True) if need),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, packed, pool_weight, scales, biases, rates, ctx.relu = inputs
    ctx.rates = list(rates)
    ctx.counts = len(weights), len(scales), [bias.dtype for bias in biases]
    ctx.num_packed = len(packed)
    ctx.pools = pool_weight is not None
    pool = [pool_weight] * ctx.pools
    ctx.save_for_backward(x, *weights, *pool, *scales, *[output] * ctx.relu)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangent("aspp_concat (backward)", "grad", grad)
    num_weights, num_scales, kinds = ctx.counts
    x, *saved = ctx.saved_tensors
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, saved.pop(), 0)
    weights, saved = saved[:num_weights], saved[num_weights:]
    pool_weight = saved.pop(0) if ctx.pools else None
    need_x, need_weights, _, need_pool, need_scales, need_biases = ctx.needs_input_grad[:6]
    needed = [*need_weights, *[bool(need_pool)] * ctx.pools, *(need_scales if num_scales else [])]
    made = iter(())
    if need_x or any(needed):
        made = iter(
            _OPS.aspp_concat_backward(
                grad, x, weights, pool_weight, saved, ctx.rates, need_x, needed
            )
        )
    of_x = next(made) if need_x else None
    found = [next(made) if need else None for need in needed]
    of_weights, of_scales = found[:num_weights], found[num_weights + ctx.pools :]
    of_pool = found[num_weights] if ctx.pools else None
    of_biases: list[Tensor | None] = []
    if kinds:
        sums = [part.sum((0, 2, 3)) for part in _parts(grad, weights, pool_weight)]
        of_biases = [
            part.to(kind) if need else None
            for part, kind, need in zip(sums, kinds, need_biases, strict=True)
        ]
    of_packed = [None] * ctx.num_packed
    return of_x, of_weights, of_packed, of_pool, of_scales, of_biases, None, None


def _flops(shape: Any, weights: Any, packed: Any, pool: Any, *rest: Any, **values: Any) -> int:
    """Two for each tap and output, as torch counts, and the pooled ones."""
    batch, _, height, width = shape
    each = sum(o * c * kh * kw for o, c, kh, kw in weights) * height * width
    return int(2 * batch * (each + (0 if pool is None else pool[0] * pool[1])))


def _backward_flops(
    grad: Any,
    x: Any,
    weights: Any,
    pool: Any,
    scales: Any,
    rates: Any,
    need_x: bool,
    needed: Any,
    **values: Any,
) -> int:
    total = 0
    branches = [*weights, *([] if pool is None else [pool])]
    for i in range(len(branches)):
        products = need_x + (needed[i] or (bool(scales) and needed[len(branches) + i]))
        one = [branches[i]] if i < len(weights) else []
        total += products * _flops(x, one, [], None if one else branches[i])
    return total


torch.library.register_fake("pydense::aspp_concat")(_fake)
torch.library.register_fake("pydense::aspp_concat_backward")(_fake_backward)
aspp_concat: Differentiable[Tensor] = Differentiable("aspp_concat", _setup, _backward, _concat)
register_flop_formula(_OPS.aspp_concat)(_flops)
register_flop_formula(_OPS.aspp_concat_backward)(_backward_flops)
