# SPDX-License-Identifier: Apache-2.0
"""Derivatives of any order of a stride-1 convolution and of its weight's gradient.

Both operators are linear in both of their inputs. With respect to one, a convolution is the same
operator with the kernel turned round (the adjoint), with respect to the other the weight's
gradient, whose own derivatives are the convolution again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._forward_ad import refuse_tangent
from ._operator import Differentiable

# An operator's arguments from the bias on: bias, height, width, four of geometry, turned, relu.
_FROM_BIAS = 9


@dataclass(frozen=True)
class ConvolutionOperators:
    """A convolution operator, its weight's gradient, and what turning a kernel round means.

    Attributes:
        convolve: (x, weight, height, width, dilation_y, dilation_x, top, left, turned) -> the
            convolution, without bias and activation.
        weight_gradient: (grad, x, kernel_height, kernel_width, dilation_y, dilation_x, top, left)
            -> the weight's gradient.
        turn: A weight, turned round.
    """

    convolve: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]
    turn: Callable[[Tensor], Tensor]

    def adjoint(self, x: Tensor, weight: Tensor, geometry: Any, size: Any, turned: bool) -> Tensor:
        """From what the operator makes back to maps of ``size``."""
        dilation_y, dilation_x, top, left = geometry
        top = dilation_y * (weight.shape[2] - 1) - top
        left = dilation_x * (weight.shape[3] - 1) - left
        return self.convolve(x, weight, *size, dilation_y, dilation_x, top, left, not turned)

    def differentiable(
        self, name: str, kernel: Callable[..., Tensor] | None = None
    ) -> Differentiable[Tensor]:
        """Gives the convolution of this name its derivatives; ``kernel`` as there."""

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, weight, *_ = inputs
            *ctx.geometry, ctx.turned, ctx.relu = inputs[-6:]
            ctx.set_materialize_grads(False)
            ctx.size, ctx.kernel, ctx.arguments = x.shape[2:], weight.shape[2:], len(inputs)
            # Each is what the other one's gradient needs.
            ctx.with_x, ctx.with_weight = weight.requires_grad, x.requires_grad
            ctx.save_for_backward(
                *[x] * ctx.with_x, *[weight] * ctx.with_weight, *[output] * ctx.relu
            )

        def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
            if grad is None:
                return tuple([None] * ctx.arguments)
            refuse_tangent("atrous_conv2d (backward)", "grad", grad)
            saved = list(ctx.saved_tensors)
            x = saved.pop(0) if ctx.with_x else None
            weight = saved.pop(0) if ctx.with_weight else None
            if ctx.relu:
                grad = torch.ops.aten.threshold_backward(grad, saved[0], 0)
            gradients: list[Tensor | None] = [None] * ctx.arguments
            if ctx.needs_input_grad[0] and weight is not None:
                gradients[0] = self.adjoint(grad, weight, ctx.geometry, ctx.size, ctx.turned)
            if ctx.needs_input_grad[1]:
                of_weight = self.weight_gradient(grad, x, *ctx.kernel, *ctx.geometry)
                gradients[1] = self.turn(of_weight) if ctx.turned else of_weight
            if ctx.needs_input_grad[-_FROM_BIAS]:
                gradients[-_FROM_BIAS] = grad.sum((0, 2, 3))
            return tuple(gradients)

        return Differentiable(name, setup, backward, kernel)

    def differentiable_gradient(self, name: str) -> Differentiable[Tensor]:
        """Gives the weight's gradient of this name its derivatives."""

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            grad, x, _, _, *ctx.geometry = inputs
            ctx.save_for_backward(grad, x)

        def backward(ctx: Any, of_weight: Tensor) -> tuple[Any, ...]:
            grad, x = ctx.saved_tensors
            of_grad = of_x = None
            if ctx.needs_input_grad[0]:
                of_grad = self.convolve(x, of_weight, *grad.shape[2:], *ctx.geometry, False)
            if ctx.needs_input_grad[1]:
                of_x = self.adjoint(grad, of_weight, ctx.geometry, x.shape[2:], False)
            return of_grad, of_x, *[None] * 6

        return Differentiable(name, setup, backward)
