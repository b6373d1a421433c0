# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of max pooling: fakes, derivatives, vmap, FLOP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture
from ._operator import Differentiable

_OPS = torch.ops.pydense


def _fake(x: Tensor, kernel_size: int) -> Tensor:
    return empty_picture(x, x.shape[2], x.shape[3])


def _fake_with_offsets(x: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    return _fake(x, kernel_size), empty_picture(x, x.shape[2], x.shape[3], torch.uint8)


def _fake_backward(
    grad: Tensor, offsets: Tensor, addend: Tensor | None, kernel_size: int
) -> Tensor:
    return empty_picture(offsets, grad.shape[2], grad.shape[3], grad.dtype)


def pool_at(x: Tensor, offsets: Tensor, kernel_size: int) -> Tensor:
    """The elements of ``x`` that the offsets point to: the adjoint of the pool's backward."""
    height, width = x.shape[2:]
    reach = kernel_size // 2
    code = offsets.long()
    rows = torch.arange(height, device=x.device)[:, None] + (code >> 4) - reach
    columns = torch.arange(width, device=x.device) + (code & 15) - reach
    return x.flatten(2).gather(2, (rows * width + columns).flatten(2)).view(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kernel_size = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    # The public function asks for offsets where a gradient is wanted. This is for programs that
    # were exported without one: the maxima are looked for again.
    refuse_tangent("max_pool2d_same (backward)", "grad", grad)
    (x,) = ctx.saved_tensors
    _, offsets = max_pool2d_same_with_offsets(x.detach(), ctx.kernel_size)
    return max_pool2d_same_backward(grad, offsets, None, ctx.kernel_size), None


def _setup_with_offsets(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.kernel_size = inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros for the offsets
    ctx.save_for_backward(output[1])


def _backward_with_offsets(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    refuse_tangent("max_pool2d_same (backward)", "grad", grad)
    (offsets,) = ctx.saved_tensors
    return max_pool2d_same_backward(grad, offsets, None, ctx.kernel_size), None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, _, ctx.kernel_size = inputs
    ctx.save_for_backward(offsets)


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (offsets,) = ctx.saved_tensors
    first = pool_at(grad, offsets, ctx.kernel_size) if ctx.needs_input_grad[0] else None
    return first, None, grad if ctx.needs_input_grad[2] else None, None


torch.library.register_fake("pydense::max_pool2d_same")(_fake)
torch.library.register_fake("pydense::max_pool2d_same_with_offsets")(_fake_with_offsets)
torch.library.register_fake("pydense::max_pool2d_same_backward")(_fake_backward)
max_pool2d_same: Differentiable[Tensor] = Differentiable("max_pool2d_same", _setup, _backward)
max_pool2d_same_with_offsets: Differentiable[tuple[Tensor, Tensor]] = Differentiable(
    "max_pool2d_same_with_offsets", _setup_with_offsets, _backward_with_offsets
)
max_pool2d_same_backward: Differentiable[Tensor] = Differentiable(
    "max_pool2d_same_backward", _setup_backward, _double_backward
)


def _fold(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, kernel_size: int
) -> tuple[Tensor, int]:
    batched = x.movedim(in_dims[0] or 0, 0)
    out = _OPS.max_pool2d_same(batched.flatten(0, 1), kernel_size)
    return out.unflatten(0, batched.shape[:2]), 0


torch.library.register_vmap("pydense::max_pool2d_same")(_fold)


def _pool_flops(shape: Any, kernel_size: int, *rest: Any, **values: Any) -> int:
    """A comparison for each further row and column of the window, as the kernels make them."""
    batch, channels, rows, columns = shape
    return int(2 * (kernel_size - 1) * batch * channels * rows * columns)


register_flop_formula(_OPS.max_pool2d_same)(_pool_flops)
register_flop_formula(_OPS.max_pool2d_same_with_offsets)(_pool_flops)


def _backward_flops(
    shape: Any, offsets: Any, addend: Any, kernel_size: int, *rest: Any, **values: Any
) -> int:
    return _pool_flops(shape, kernel_size)


register_flop_formula(_OPS.max_pool2d_same_backward)(_backward_flops)
