# SPDX-License-Identifier: Apache-2.0
"""Gradients that do not exist yet: backward raises, so that nobody trains on silence.

The error comes from an operator, not from Python code in backward, because ``torch.compile`` traces
the backward pass together with the forward one: a model whose weights require grad can thus be
compiled and run, and only a call of ``backward`` raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("pydense::_missing_gradient", mutates_args=())
def _missing_gradient(op: str, grad: Tensor, shape: Sequence[int]) -> Tensor:
    raise NotImplementedError(
        f"{op}: the gradient is not implemented yet; detach the input or run under torch.no_grad()"
    )


@_missing_gradient.register_fake
def _(op: str, grad: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(shape)


def register_missing_gradient(name: str) -> None:
    """Give the operator ``pydense::name`` a backward that raises NotImplementedError.

    It returns a tensor or a list of tensors.

    Saves the shapes of the inputs, no tensor.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shapes = tuple(_shapes(value) for value in inputs)

    def backward(ctx: Any, grads: Tensor | list[Tensor | None]) -> tuple[Any, ...]:
        several = [grads] if isinstance(grads, Tensor) else grads
        grad = next(one for one in several if one is not None)
        return tuple(
            _fail(name, grad, shape, needed)
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )

    torch.library.register_autograd(f"pydense::{name}", backward, setup_context=setup_context)


def missing_gradient(name: str, out: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """``out``, whose backward raises where one of ``inputs`` requires grad.

    For inputs from which ``out`` was computed behind a detach.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        result: Tensor = _MissingGradient.apply(name, out, *inputs)  # type: ignore[no-untyped-call]
        return result
    return out


class _MissingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, out: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        ctx.shapes = [x.shape for x in inputs]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        return None, None, *_fail(ctx.name, grads[0], ctx.shapes, list(needed))


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, list):
        return [_shapes(item) for item in value]
    return None


def _fail(name: str, grad: Tensor, shape: Any, needed: Any) -> Any:
    if isinstance(needed, list):
        return [_fail(name, grad, *pair) for pair in zip(shape, needed, strict=True)]
    return _missing_gradient(name, grad, shape) if needed else None
