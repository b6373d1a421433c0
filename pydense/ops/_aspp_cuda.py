# SPDX-License-Identifier: Apache-2.0
"""Sums of 3x3 atrous convolutions on a GPU: one matrix product for all taps, and a shifting kernel.

A map may be the operand of a product in either memory format: contiguous, each image is the
matrix (C, pixels) of a batched product; channels_last, the batch is one matrix (pixels, C). The
maps of the taps then lie in the same way, and the kernels shift and add, or gather, in it: nothing
is transposed. Sizes are plain numbers: this runs inside the operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._memory_format import empty_picture, suggested

_OPS = torch.ops.pydense
# Rows of operands begin at multiples of this: tensor cores load them in vectors.
ALIGNMENT = 8


class Places:
    """Which row of the stack each tap of each branch is in: as the kernels want it."""

    def __init__(self, taps: tuple[list[int], list[int], list[list[tuple[int, int]]]], n: int):
        self.rows, self.columns, members = taps
        self.of_branches = [[-1] * 9 for _ in range(n)]
        for place, row in enumerate(members):
            for branch, tap in row:
                self.of_branches[branch][tap] = place


def sum_of_branches(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], places: Places, workspace: int
) -> Tensor:
    """The forward operator for a batch of at least one.

    Args:
        x: (N, C, H, W).
        weights: Of all branches.
        biases: Of all branches, or none.
        places: For maps of this size.
        workspace: Bytes for the maps of the taps; those of one output and image at least.
    """
    batch, _, height, width = x.shape
    outputs, lines, pixels = weights[0].shape[0], len(places.rows), height * width
    out = empty_picture(x, height, width, channels=outputs)
    layout = suggested(x)
    x = x.contiguous(memory_format=layout)
    last = layout == torch.channels_last
    each = lines * pixels * x.itemsize
    group = min(outputs, max(1, workspace // each))
    images = min(batch, max(1, workspace // (each * group)))
    flat = [place for row in places.of_branches for place in row]
    for first in range(0, outputs, group):
        count = min(group, outputs - first)
        stack = _OPS._tap_stack(weights, flat, lines, first, count)
        shifts = [bias[first : first + count] for bias in biases]
        for begin in range(0, batch, images):
            part = x[begin : begin + images]
            made = out[begin : begin + images, first : first + count]
            if last:
                maps = x.new_empty((len(part), pixels, _aligned(len(stack))))
                rows = maps.flatten(0, 1)[:, : len(stack)]
                torch.mm(_matrix(part), stack.t(), out=rows)
            else:
                maps = x.new_empty((len(part), len(stack), _aligned(pixels)))
                each_stack = stack.expand(len(part), -1, -1)
                torch.bmm(each_stack, part.flatten(2), out=maps[:, :, :pixels])
            _OPS._tap_add(made, maps, shifts, places.rows, places.columns, last)
    return out


def gradients_of_branches(
    grad: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    places: Places,
    layout: torch.memory_format,
    need_weights: Sequence[bool],
    workspace: int,
) -> tuple[Tensor | None, list[Tensor]]:
    """The backward operator.

    Args:
        grad: (N, O, H, W), any strides.
        x: The picture, or None where no weight wants a gradient.
        weights: Of all branches, or none where the picture wants no gradient.
        places: For maps of this size.
        layout: Of the picture and its gradient.
        need_weights: Which branches' gradients are returned.
        workspace: Bytes for the shifted gradients.
    """
    batch, outputs, height, width = grad.shape
    lines, pixels = len(places.rows) * outputs, height * width
    last = layout == torch.channels_last
    channels = weights[0].shape[1] if weights else 0 if x is None else x.shape[1]
    grad_x = stack = sums = None
    if weights:
        flat = [place for row in places.of_branches for place in row]
        stack = _OPS._tap_stack(weights, flat, len(places.rows), 0, outputs)
        size = (batch, channels, height, width)
        grad_x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
    if x is not None:
        x = x.contiguous(memory_format=layout)
    for begin, end, first, count in _parts(batch, pixels, lines * grad.itemsize, workspace):
        images = end - begin
        own = slice(first, first + count)
        rows, length = (count, lines) if last else (lines, count)
        maps = grad.new_empty((images, rows, _aligned(length)))
        _OPS._tap_gather(maps, grad[begin:end], first, count, places.rows, places.columns, last)
        shifted = maps[:, :, :length]
        if stack is not None and grad_x is not None:
            if last:
                flat_grad = _matrix(grad_x[begin:end]).view(images, pixels, channels)
                torch.mm(shifted.flatten(0, 1), stack, out=flat_grad[:, own].view(-1, channels))
            else:
                each_stack = stack.t().expand(images, -1, -1)
                torch.bmm(each_stack, shifted, out=grad_x[begin:end].flatten(2)[:, :, own])
        if x is None:
            continue
        if last:
            matrix = _matrix(x[begin:end]).view(images, pixels, channels)[:, own]
            product = torch.mm(shifted.flatten(0, 1).t(), matrix.reshape(-1, channels))
            sums = _added(sums, product, whole=images == batch and count == pixels)
        else:
            for image, picture in zip(shifted, x[begin:end], strict=True):
                product = torch.mm(image, picture.flatten(1)[:, own].t())
                sums = _added(sums, product, whole=batch == 1 and count == pixels)
    if x is None:
        return grad_x, []
    found = []
    for own_places, need in zip(places.of_branches, need_weights, strict=True):
        if need:
            found.append(grad.new_empty((outputs, channels, 3, 3)))
            if sums is None:
                found[-1].zero_()
            else:
                _OPS._tap_unstack(found[-1], sums, own_places)
    return grad_x, found


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _matrix(x: Tensor) -> Tensor:
    """(pixels of all images, C) of a dense channels_last tensor, a view."""
    batch, channels, height, width = x.shape
    return x.as_strided((batch * height * width, channels), (channels, 1))


def _parts(
    batch: int, pixels: int, pixel_bytes: int, workspace: int
) -> Iterator[tuple[int, int, int, int]]:
    """Images [begin, end) and pixels [first, first + count) whose maps the workspace holds.

    Several images at a time, or a part of one; from multiples of ``ALIGNMENT``.
    """
    images = max(1, workspace // (pixels * pixel_bytes))
    count = pixels
    if images == 1:
        held = max(ALIGNMENT, workspace // pixel_bytes // ALIGNMENT * ALIGNMENT)
        count = min(pixels, held)
    for begin in range(0, batch, images):
        for first in range(0, pixels, count):
            yield begin, min(begin + images, batch), first, min(count, pixels - first)


def _added(sums: Tensor | None, product: Tensor, whole: bool) -> Tensor:
    """In float32 for 16 bits where there are several; the only one is it."""
    if sums is not None:
        return sums.add_(product)
    return product if whole else product.to(torch.promote_types(product.dtype, torch.float32))
