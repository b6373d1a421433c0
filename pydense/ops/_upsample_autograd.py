# SPDX-License-Identifier: Apache-2.0
"""What torch has to know of the upsampling operators: fakes, derivatives, vmap, FLOP.

Upsampling is linear: its backward is its adjoint, and the backward of that is upsampling again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._forward_ad import refuse_tangent
from ._memory_format import empty_picture
from ._operator import Differentiable

_OPS = torch.ops.pydense


def _fake(x: Tensor, height: int, width: int, *options: object) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"upsample: x must be 4-dimensional, got {x.shape}")
    return empty_picture(x, height, width)


_LINEAR: dict[str, Differentiable[Tensor]] = {}


def _derivative(name: str, adjoint: str) -> Differentiable[Tensor]:
    """A linear operator (x, height, width, *options) whose backward is ``adjoint``."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, *ctx.options = inputs
        ctx.size = x.shape[2:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_tangent(f"{name} (backward)", "grad", grad)
        result = _LINEAR[adjoint](grad, *ctx.size, *ctx.options)
        return result, None, None, *[None] * len(ctx.options)

    return Differentiable(name, setup_context, backward)


def _vmap(name: str) -> None:
    """Another batch dimension is folded into the batch."""

    def fold(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, *options: Any
    ) -> tuple[Tensor, int]:
        batched = x.movedim(in_dims[0] or 0, 0)
        out = getattr(_OPS, name)(batched.flatten(0, 1), *options)
        return out.unflatten(0, batched.shape[:2]), 0

    torch.library.register_vmap(f"pydense::{name}", fold)


for _name in ("upsample_bilinear", "upsample_crop"):
    for _one, _other in ((_name, f"{_name}_backward"), (f"{_name}_backward", _name)):
        torch.library.register_fake(f"pydense::{_one}")(_fake)
        _LINEAR[_one] = _derivative(_one, _other)
        _vmap(_one)
upsample_bilinear, upsample_crop = _LINEAR["upsample_bilinear"], _LINEAR["upsample_crop"]


def _fake_fuse(
    inputs: list[Tensor], height: int, width: int, mode: str, align_corners: bool, relu: bool
) -> Tensor:
    return empty_picture(inputs[0], height, width)


def _fake_fuse_backward(
    grad: Tensor,
    out: Tensor | None,
    heights: list[int],
    widths: list[int],
    mode: str,
    align_corners: bool,
) -> list[Tensor]:
    return [empty_picture(grad, h, w) for h, w in zip(heights, widths, strict=True)]


def _setup_fuse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, _, _, ctx.mode, ctx.align_corners, relu = inputs
    ctx.sizes = [x.shape[2:] for x in maps]
    ctx.save_for_backward(*[output] * relu)


def _fuse_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangent("fuse_sum_upsample (backward)", "grad", grad)
    (out,) = ctx.saved_tensors or (None,)  # once: checkpoints unpack no tensor twice
    needed = ctx.needs_input_grad[0]
    is_same = [tuple(size) == tuple(grad.shape[2:]) for size in ctx.sizes]
    # One gradient serves all maps of the output's size; without ReLU it is grad itself.
    wanted = [
        size
        for size, same, need in zip(ctx.sizes, is_same, needed, strict=True)
        if need and not same
    ]
    same_needed = any(same and need for same, need in zip(is_same, needed, strict=True))
    masked = same_needed and out is not None
    sizes = [*([tuple(grad.shape[2:])] if masked else []), *wanted]
    made: Iterator[Tensor] = iter(())
    same_grad = grad
    if sizes:
        heights, widths = ([size[i] for size in sizes] for i in (0, 1))
        made = iter(
            fuse_sum_upsample_backward(grad, out, heights, widths, ctx.mode, ctx.align_corners)
        )
        if masked:
            same_grad = next(made)
    grads = [
        None if not need else same_grad if same else next(made)
        for same, need in zip(is_same, needed, strict=True)
    ]
    return grads, None, None, None, None, None


def _setup_fuse_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, out, _, _, ctx.mode, ctx.align_corners = inputs
    ctx.size = grad.shape[2:]
    ctx.save_for_backward(*[] if out is None else [out])


def _fuse_double_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    maps = [g for g in grads if g is not None]
    result = None
    if maps:
        result = fuse_sum_upsample(maps, *ctx.size, ctx.mode, ctx.align_corners, False)
        (out,) = ctx.saved_tensors or (None,)
        if out is not None:
            result = result.masked_fill(out <= 0, 0)
    return result, None, None, None, None, None


def _fold_fuse(
    info: Any, in_dims: tuple[Any, ...], inputs: list[Tensor], *options: Any
) -> tuple[Tensor, int]:
    maps = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(inputs, in_dims[0], strict=True)
    ]
    out = _OPS.fuse_sum_upsample([x.flatten(0, 1) for x in maps], *options)
    return out.unflatten(0, maps[0].shape[:2]), 0


torch.library.register_vmap("pydense::fuse_sum_upsample", _fold_fuse)
torch.library.register_fake("pydense::fuse_sum_upsample")(_fake_fuse)
torch.library.register_fake("pydense::fuse_sum_upsample_backward")(_fake_fuse_backward)
fuse_sum_upsample: Differentiable[Tensor] = Differentiable(
    "fuse_sum_upsample", _setup_fuse, _fuse_backward
)
fuse_sum_upsample_backward: Differentiable[list[Tensor]] = Differentiable(
    "fuse_sum_upsample_backward", _setup_fuse_backward, _fuse_double_backward
)


def _picture_flops(shape: Any, height: int, width: int, *options: Any, **values: Any) -> int:
    """Horizontally once per row of the input at most, vertically once per output: 3 FLOP each."""
    batch, channels, rows, _ = shape
    return int(3 * batch * channels * width * (height + min(rows, 2 * height)))


def _adjoint_flops(shape: Any, height: int, width: int, *options: Any, **values: Any) -> int:
    """Every number is added to two rows, every column of those to two columns: 4 FLOP each."""
    batch, channels, rows, columns = shape
    return int(4 * batch * channels * columns * (rows + min(height, 2 * rows)))


def _fuse_flops(
    shapes: Any, height: int, width: int, *options: Any, out_shape: Any = None, **values: Any
) -> int:
    return sum(
        shape[0] * shape[1] * height * width
        if tuple(shape[2:]) == (height, width)
        else _picture_flops(shape, height, width)
        for shape in shapes
    )


_FORMULAS: dict[str, Callable[..., int]] = {
    "upsample_bilinear": _picture_flops,
    "upsample_crop": _picture_flops,
    "upsample_bilinear_backward": _adjoint_flops,
    "upsample_crop_backward": _adjoint_flops,
    "fuse_sum_upsample": _fuse_flops,
}
for _name, _formula in _FORMULAS.items():
    register_flop_formula(getattr(_OPS, _name))(_formula)
