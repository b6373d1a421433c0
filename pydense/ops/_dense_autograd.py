# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of the dense operators: fakes, derivatives of any order, FLOP.

Turned round, a kernel's inputs and outputs are exchanged too.
"""

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


def flops(
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
torch.library.register_fake("pydense::_dense_atrous_conv2d_branches_into")(_fake_into)
torch.library.register_fake("pydense::_pack_dense_atrous_weight")(_fake_pack)
torch.library.register_fake("pydense::dense_atrous_conv2d_weight_gradient")(_fake_gradient)
_OPERATORS = ConvolutionOperators(
    lambda x, weight, *geometry: dense_atrous_conv2d(x, weight, None, None, *geometry, False),
    lambda *arguments: dense_atrous_conv2d_weight_gradient(*arguments),
    lambda weight: weight.transpose(0, 1).flip(2, 3),
)
dense_atrous_conv2d: Differentiable[Tensor] = _OPERATORS.differentiable("dense_atrous_conv2d")
dense_atrous_conv2d_weight_gradient: Differentiable[Tensor] = _OPERATORS.differentiable_gradient(
    "dense_atrous_conv2d_weight_gradient"
)
register_flop_formula(_OPS.dense_atrous_conv2d)(flops)
register_flop_formula(_OPS.dense_atrous_conv2d_weight_gradient)(_gradient_flops)
