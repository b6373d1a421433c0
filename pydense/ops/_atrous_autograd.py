# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of the depthwise operators: fakes, derivatives of any order, FLOP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._convolution_autograd import ConvolutionOperators
from ._memory_format import empty_picture
from ._operator import Differentiable

_OPS = torch.ops.pydense


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, *rest: Any
) -> Tensor:
    return empty_picture(x, height, width)


def _fake_gradient(
    grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int, *rest: Any
) -> Tensor:
    return x.new_empty((x.shape[1], 1, kernel_height, kernel_width))


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
_OPERATORS = ConvolutionOperators(
    lambda x, weight, *geometry: depthwise_atrous_conv2d(x, weight, None, *geometry, False),
    lambda *arguments: depthwise_atrous_conv2d_weight_gradient(*arguments),
    lambda weight: weight.flip(2, 3),
)
depthwise_atrous_conv2d: Differentiable[Tensor] = _OPERATORS.differentiable(
    "depthwise_atrous_conv2d"
)
depthwise_atrous_conv2d_weight_gradient: Differentiable[Tensor] = (
    _OPERATORS.differentiable_gradient("depthwise_atrous_conv2d_weight_gradient")
)
register_flop_formula(_OPS.depthwise_atrous_conv2d)(_flops)
register_flop_formula(_OPS.depthwise_atrous_conv2d_weight_gradient)(_gradient_flops)
