# SPDX-License-Identifier: Apache-2.0
"""Direct convolutions of stride 1 whose weight's gradient is pydense's, whoever convolves.

Operator, fake, derivatives of any order, FLOP; and what it has in common with Winograd's operator
where that computes directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d
from torch.utils.flop_counter import register_flop_formula

from pydense import _library

from ._atrous_dispatch import Call, Kernels, choose, known_choice
from ._convolution_arguments import without_autocast
from ._convolution_autograd import ConvolutionOperators
from ._memory_format import in_format, suggested
from ._operator import Differentiable, operator

_library.load()

from . import _dense_autograd as dense  # noqa: E402

_OPS = torch.ops.pydense
_NAME = "mixed_conv2d"


def direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    dilation: tuple[int, int],
    before: tuple[int, int],
    flipped: bool,
    relu: bool,
) -> Tensor:
    """relu(conv + bias) by what the dispatch rule takes without Winograd's algorithm.

    Args:
        x: (N, C, H, W).
        weight: (O, C, kH, kW), or flipped (C, O, kH, kW), turned round: a convolution's adjoint.
        bias: (O,), or None.
        size: Of the result; there is as much padding behind the picture as before it.
        dilation: (y, x).
        before: Padding above and on the left.
        flipped: How the weight lies.
        relu: Whether negative results become 0.
    """
    last = suggested(x) == torch.channels_last
    outputs, kernel = weight.shape[1 if flipped else 0], (weight.shape[2], weight.shape[3])
    call = Call(x.device.type, x.dtype, last, x.shape[1], outputs, 1, kernel, (1, 1), dilation)
    found = known_choice(call) if x.is_cpu else choose(call)
    if found.kernels is Kernels.DENSE:
        return dense.dense_atrous_conv2d(
            x, weight, None, bias, *size, *dilation, *before, flipped, relu
        )
    with without_autocast(x.device.type):  # backward may run in its region
        if flipped:  # no copy of the weight turned round
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = [r - p for r, p in zip(reach, before, strict=True)]
            made = conv_transpose2d(x, weight, bias, padding=padding, dilation=dilation)
        else:
            made = conv2d(x, weight, bias, padding=before, dilation=dilation)
    return made.relu_() if relu else made


@operator(_NAME)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    dilation_y: int,
    dilation_x: int,
    top: int,
    left: int,
    flipped: bool,
    relu: bool,
) -> Tensor:
    """As :func:`direct`, in torch's memory format: channels_last where x or the weight is so."""
    dilation, before = (dilation_y, dilation_x), (top, left)
    made = direct(x, weight, bias, (height, width), dilation, before, flipped, relu)
    return in_format(made, _format(x, weight))


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    last = torch.channels_last in (suggested(x), suggested(weight))
    return torch.channels_last if last else torch.contiguous_format


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, *rest: Any
) -> Tensor:
    size = (x.shape[0], weight.shape[1 if rest[-2] else 0], height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_format(x, weight))


def _flops(shape: Any, weight: Any, bias: Any, *rest: Any, **values: Any) -> int:
    return dense.flops(shape, weight, None, bias, *rest, **values)


torch.library.register_fake(f"pydense::{_NAME}")(_fake)
mixed_conv2d: Differentiable[Tensor] = ConvolutionOperators(
    lambda x, weight, *geometry: mixed_conv2d(x, weight, None, *geometry, False),
    lambda *arguments: dense.dense_atrous_conv2d_weight_gradient(*arguments),
    lambda weight: weight.transpose(0, 1).flip(2, 3),
).differentiable(_NAME, _convolution)
register_flop_formula(_OPS.mixed_conv2d)(_flops)
