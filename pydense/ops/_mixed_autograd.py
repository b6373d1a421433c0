# SPDX-License-Identifier: Apache-2.0
"""A dense convolution of stride 1 with torch's gradient of x and pydense's of the weight.

Forward is what the dispatch rule says. Operator, fake, derivatives of any order, FLOP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d
from torch.utils.flop_counter import register_flop_formula

from pydense import _library

from ._atrous_dispatch import Call, Kernels, choose
from ._convolution_arguments import without_autocast
from ._forward_ad import refuse_tangent
from ._memory_format import in_format, suggested

_library.load()

from . import _dense_autograd as _dense_autograd  # noqa: E402  registers

_OPS = torch.ops.pydense
_NAME = "pydense::mixed_conv2d"


@torch.library.custom_op(_NAME, mutates_args=())
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``F.conv2d`` with stride 1, in torch's memory format: channels_last where one input is so."""
    call = Call(
        x.device.type,
        x.dtype,
        suggested(x) == torch.channels_last,
        x.shape[1],
        weight.shape[0],
        1,
        (weight.shape[2], weight.shape[3]),
        (1, 1),
        (dilation[0], dilation[1]),
    )
    if choose(call).kernels is Kernels.DENSE:
        size = _size(x, weight, padding, dilation)
        made: Tensor = _OPS.dense_atrous_conv2d(
            x, weight, None, bias, *size, *dilation, *padding, False, False
        )
    else:
        with without_autocast(x.device.type):
            made = conv2d(x, weight, bias, padding=list(padding), dilation=list(dilation))
    return in_format(made, _format(x, weight))


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    last = torch.channels_last in (suggested(x), suggested(weight))
    return torch.channels_last if last else torch.contiguous_format


def _size(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> list[Any]:
    return [
        n + 2 * p - d * (k - 1)
        for n, p, d, k in zip(x.shape[2:], padding, dilation, weight.shape[2:], strict=True)
    ]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = (x.shape[0], weight.shape[0], *_size(x, weight, padding, dilation))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_format(x, weight))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.padding, ctx.dilation = inputs
    ctx.set_materialize_grads(False)
    ctx.kernel = weight.shape[2:]
    # Each is what the other one's gradient needs.
    ctx.with_x, ctx.with_weight = weight.requires_grad, x.requires_grad
    ctx.save_for_backward(*[x] * ctx.with_x, *[weight] * ctx.with_weight)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    refuse_tangent("atrous_conv2d (backward)", "grad", grad)
    saved = list(ctx.saved_tensors)
    x = saved.pop(0) if ctx.with_x else None
    weight = saved.pop(0) if ctx.with_weight else None
    of_x = of_weight = None
    if ctx.needs_input_grad[0] and weight is not None:
        with without_autocast(grad.device.type):
            of_x = conv_transpose2d(grad, weight, padding=ctx.padding, dilation=ctx.dilation)
    if ctx.needs_input_grad[1] and x is not None:
        of_weight = _OPS.dense_atrous_conv2d_weight_gradient(
            grad, x, *ctx.kernel, *ctx.dilation, *ctx.padding
        )
    of_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return of_x, of_weight, of_bias, None, None


def _flops(shape: Any, weight: Any, *rest: Any, out_shape: Any, **values: Any) -> int:
    """Two for each tap, channel and output, as torch counts a convolution."""
    batch, _, height, width = out_shape
    outputs, channels, *kernel = weight
    return int(2 * batch * height * width * outputs * channels * kernel[0] * kernel[1])


torch.library.register_fake(_NAME)(_fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup)
register_flop_formula(_OPS.mixed_conv2d)(_flops)
