# SPDX-License-Identifier: Apache-2.0
"""Sums of 3x3 atrous convolutions as matrix products and shifts, forward and backward.

On the CPU kernels multiply and shift, block by block. Where torch has instructions that they lack,
the products are torch's, and two kernels do the shifting: `own_products` decides. On a GPU they
are torch's, too (`_aspp_cuda.py`). Here sizes are plain numbers: this runs inside the operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _aspp_cuda as cuda
from ._convolution_arguments import without_autocast
from ._memory_format import empty_picture, suggested

_OPS = torch.ops.pydense
WORKSPACE = 64 << 20  # bytes
CENTRE = 4


class Taps(NamedTuple):
    """The distinct taps of all branches that reach a pixel, from the uppermost on."""

    rows: list[int]  # how far the tap is from the output, downwards
    columns: list[int]
    members: list[list[tuple[int, int]]]  # branches, and which of their 9 taps it is


def taps_of(rates: Sequence[int], height: int, width: int) -> Taps:
    """What is left to multiply on a map of this size."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    found[0, 0] = [(branch, CENTRE) for branch in range(len(rates))]
    for branch, rate in enumerate(rates):
        for tap in range(9):
            dy, dx = (tap // 3 - 1) * rate, (tap % 3 - 1) * rate
            if tap != CENTRE and abs(dy) < height and abs(dx) < width:
                found.setdefault((dy, dx), []).append((branch, tap))
    places = sorted(found)
    return Taps([y for y, _ in places], [x for _, x in places], [found[p] for p in places])


def own_products(dtype: torch.dtype) -> bool:
    """Whether pydense multiplies: everything but bfloat16 on CPUs with AMX, which torch uses."""
    return dtype != torch.bfloat16 or str(_OPS._cpu_capability()) != "amx"


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the matrix products: float32 for 16 bits where the CPU has no instructions for them."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not _multiplies_bfloat16()):
        return torch.float32
    return dtype


def _multiplies_bfloat16() -> bool:
    return _OPS._cpu_capability() in ("avx512_bf16", "amx")


def sum_of_branches(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rates: Sequence[int]
) -> Tensor:
    """The forward operator."""
    batch, _, height, width = x.shape
    outputs = weights[0].shape[0]
    out = empty_picture(x, height, width, channels=outputs)
    if batch == 0:
        return out
    taps = taps_of(rates, height, width)
    if _OPS._runs_cuda(x):
        return cuda.sum_of_branches(x, weights, biases, cuda.Places(taps, len(rates)), WORKSPACE)
    dtype = product_dtype(x.dtype)
    sums = torch.promote_types(x.dtype, torch.float32)
    bias = torch.stack([b.to(sums) for b in biases]).sum(0) if biases else None
    own = own_products(x.dtype)
    each = len(taps.rows) * height * width * (sums if own else dtype).itemsize
    group = min(outputs, max(1, WORKSPACE // each))
    if own:
        x = x.contiguous(memory_format=suggested(x))
    for first in range(0, outputs, group):
        last = min(first + group, outputs)
        stack = _stacked([w[first:last] for w in weights], taps, dtype)
        own_bias = None if bias is None else bias[first:last]
        if own:
            part = out[:, first:last]
            _OPS._tap_products(part, x, stack, own_bias, WORKSPACE, taps.rows, taps.columns)
            continue
        maps = x.new_empty((len(taps.rows), last - first, height, width), dtype=dtype)
        for image, picture in zip(out, x, strict=True):
            _multiply(stack, picture.flatten(1), maps.view(len(stack), -1))
            _OPS._tap_sum(image[first:last], maps, own_bias, taps.rows, taps.columns)
    return out


def gradients_of_branches(
    grad: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    layout: torch.memory_format,
    need_weights: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of the picture where ``weights`` hold numbers, of weights where ``x`` is given.

    Args:
        grad: (N, O, H, W).
        x: The picture, or None where no weight wants a gradient.
        weights: Of all branches, or none where the picture wants no gradient.
        rates: Of all branches.
        layout: Of the picture's gradient.
        need_weights: Which branches' gradients are returned.
    """
    batch, outputs, height, width = grad.shape
    taps = taps_of(rates, height, width)
    if _OPS._runs_cuda(grad):
        with without_autocast(grad.device.type):  # backward may run in its region
            return cuda.gradients_of_branches(
                grad, x, weights, cuda.Places(taps, len(rates)), layout, need_weights, WORKSPACE
            )
    dtype = product_dtype(grad.dtype)
    rows = len(taps.rows) * outputs
    stack = _stacked(weights, taps, dtype) if weights else None
    channels = weights[0].shape[1] if weights else 0 if x is None else x.shape[1]
    grad_x = sums = None
    if stack is not None:
        grad_x = torch.empty(
            (batch, channels, height, width), dtype=grad.dtype, memory_format=layout
        )
    if own_products(grad.dtype):
        grad = grad.contiguous()
        if grad_x is not None:
            _OPS._tap_picture_gradient(grad_x, grad, stack, taps.rows, taps.columns)
        if x is not None:
            sums = grad.new_empty(
                (rows, channels), dtype=torch.promote_types(grad.dtype, torch.float32)
            )
            _OPS._tap_stack_gradient(sums, grad, x, taps.rows, taps.columns)
        return grad_x, _weights_of(sums, grad.dtype, taps, outputs, need_weights)
    bands = list(_bands(height, width * dtype.itemsize * (rows + channels * (dtype != grad.dtype))))
    several = batch * len(bands) > 1
    if x is not None:
        wide = torch.promote_types(dtype, torch.float32) if several else dtype
        sums = grad.new_zeros((rows, channels), dtype=wide)
    for image in range(batch):
        planes = grad[image].contiguous()
        for top, bottom in bands:
            maps = grad.new_empty((len(taps.rows), outputs, bottom - top, width), dtype=dtype)
            _OPS._tap_spread(maps, planes, top, taps.rows, taps.columns)
            shifted = maps.view(rows, -1)
            if stack is not None and grad_x is not None:
                band = grad_x[image].flatten(1)[:, top * width : bottom * width]
                if dtype == grad.dtype:
                    torch.mm(stack.t(), shifted, out=band)
                else:
                    band.copy_(torch.mm(stack.t(), shifted))
            if x is not None and sums is not None:
                pixels = x[image, :, top:bottom].flatten(1).t().to(dtype)
                if sums.dtype == dtype:
                    sums.addmm_(shifted, pixels)
                else:
                    sums.add_(torch.mm(shifted, pixels))
    return grad_x, _weights_of(sums, grad.dtype, taps, outputs, need_weights)


def _stacked(weights: Sequence[Tensor], taps: Taps, dtype: torch.dtype) -> Tensor:
    """(taps x outputs, channels): a tap that several branches have is the sum of theirs."""
    split = [w.permute(2, 3, 0, 1).flatten(0, 1).to(dtype) for w in weights]
    wide = torch.promote_types(dtype, torch.float32)

    def matrix(members: list[tuple[int, int]]) -> Tensor:
        if len(members) == 1:
            return split[members[0][0]][members[0][1]]
        return torch.stack([split[b][tap] for b, tap in members]).to(wide).sum(0).to(dtype)

    return torch.cat([matrix(members) for members in taps.members])


def _weights_of(
    stack: Tensor | None,
    dtype: torch.dtype,
    taps: Taps,
    outputs: int,
    need_weights: Sequence[bool],
) -> list[Tensor]:
    """What the stack's gradient is to the branches' weights."""
    if stack is None:
        return []
    by_tap = stack.to(dtype).view(len(taps.rows), outputs, -1)
    return [_unstacked(by_tap, taps, branch) for branch, need in enumerate(need_weights) if need]


def _unstacked(by_tap: Tensor, taps: Taps, branch: int) -> Tensor:
    """A branch's (outputs, channels, 3, 3); taps beside the map have gradient 0."""
    matrices = by_tap.new_zeros((9, *by_tap.shape[1:]))
    for matrix, members in zip(by_tap, taps.members, strict=True):
        for member, tap in members:
            if member == branch:
                matrices[tap] = matrix
    return matrices.permute(1, 2, 0).contiguous().view(*by_tap.shape[1:], 3, 3)


def _multiply(stack: Tensor, matrix: Tensor, out: Tensor) -> None:
    """``stack @ matrix``; a matrix of another dtype is converted by parts."""
    if matrix.dtype == out.dtype:
        torch.mm(stack, matrix, out=out)
        return
    step = max(1, WORKSPACE // (matrix.shape[1] * out.itemsize))
    for k in range(0, len(matrix), step):
        part = matrix[k : k + step].to(out.dtype)
        torch.addmm(out, stack[:, k : k + step], part, beta=int(k > 0), out=out)


def _bands(height: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Bands of rows, as many as the workspace holds."""
    step = max(1, WORKSPACE // row_bytes)
    for top in range(0, height, step):
        yield top, min(top + step, height)
