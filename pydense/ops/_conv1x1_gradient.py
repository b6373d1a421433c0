# SPDX-License-Identifier: Apache-2.0
"""The gradients of a 1x1 convolution as matrix products, which BLAS does in one order.

On CUDA, torch's own way chooses among cuDNN's algorithms, some of which add with atomics, and by
default rounds float32 to TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._convolution_arguments import without_autocast


def conv1x1_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, needed: Sequence[bool]
) -> tuple[Any, Any, Any]:  # tensors or None, as torch.ops.aten.convolution_backward
    """Gradients of ``conv2d(x, weight, bias)``.

    Args:
        grad: (N, O, H, W), dense, contiguous or channels_last.
        x: (N, C, H, W), as ``grad``; read for the weight's gradient alone.
        weight: (O, C, 1, 1).
        needed: Whether ``x``, ``weight`` and ``bias`` want one.

    Returns:
        Gradients (N, C, H, W) in the memory format of ``grad``, (O, C, 1, 1) and (O,), or None.
    """
    with without_autocast(grad.device.type):
        return _products(grad, x, weight, needed)


def _products(
    grad: Tensor, x: Tensor | None, weight: Tensor, needed: Sequence[bool]
) -> tuple[Any, Any, Any]:
    matrix = weight.flatten(1)
    last = not grad.is_contiguous()
    of_x = of_weight = of_bias = None
    if last:
        rows = grad.movedim(1, -1)  # (N, H, W, C)
        if needed[0]:
            of_x = torch.matmul(rows, matrix).movedim(-1, 1)
        if needed[1] and x is not None:
            pixels = x.movedim(1, -1).flatten(0, -2)
            of_weight = torch.matmul(rows.flatten(0, -2).t(), pixels)
    else:
        planes = grad.flatten(2)  # (N, C, H W)
        if needed[0]:
            size = (grad.shape[0], matrix.shape[1], *grad.shape[2:])
            of_x = torch.matmul(matrix.t(), planes).view(size)
        if needed[1] and x is not None:
            # A product for each image, in its dtype; their sum is rounded once.
            of_weight = torch.bmm(planes, x.flatten(2).transpose(1, 2)).sum(0)
    if needed[2]:
        of_bias = grad.sum((0, 2, 3))
    return of_x, None if of_weight is None else of_weight.view(weight.shape), of_bias
