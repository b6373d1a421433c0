# SPDX-License-Identifier: Apache-2.0
"""Max pooling with stride 1, and RefineNet's chained residual pooling on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments
from ._convolution_arguments import as_convolution, parameter, tensors
from .atrous_conv import atrous_conv2d

_library.load()

from . import _pool_autograd as pools  # noqa: E402  registers
from . import _residual_pool_autograd as operators  # noqa: E402  registers

MIN_POOL, MAX_POOL = 3, 13
MAX_STAGES = 64
VARIANTS = ("pool_conv", "conv_pool")


def window_size(op: str, name: str, value: Any) -> int:
    """An odd integer in [3, 13]."""
    size = check.integer(op, name, value, MIN_POOL, MAX_POOL)
    if size % 2 == 0:
        raise ValueError(f"{op}: {name} must be odd, got {size}")
    return size


def max_pool2d_same(x: Tensor, kernel_size: int = 5) -> Tensor:
    r"""Max pooling with stride 1 that keeps the size.

    ``F.max_pool2d(x, kernel_size, stride=1, padding=kernel_size // 2)``, to the letter: of equal
    maxima the first one in row-major order gets the gradient, -0 and 0 being equal; a NaN in the
    window makes the result NaN, and the last one gets the gradient; in a window of -inf alone it is
    the first element.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides; N may be 0.
        kernel_size: Odd, 3 to 13.

    Returns:
        (N, C, H, W) of the dtype of ``x`` (under autocast too), channels_last where torch takes
        ``x`` as such, contiguous otherwise. Bitwise the same on every CPU, for any number of
        threads, and on CUDA. Backward gathers, without atomics, in one order; 16-bit gradients are
        summed in float32 and rounded once.

    Raises:
        ValueError: A shape or size out of range.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a CUDA device; a tangent:
            there is no forward-mode derivative (``torch.func.jvp``).

    Memory: the result, on the CPU some rows per thread, and a contiguous copy of a tensor whose
    pixels do not lie side by side. Saved for backward where ``x`` requires a gradient: one byte for
    each element, the row and column of its maximum in the window; neither ``x`` nor int64 indices.
    (A program that was exported without gradients saves ``x`` instead, and looks for the maxima
    again.) Second derivatives go through ``torch.gather`` and its int64 indices.

    Source: ATen's ``max_pool2d_with_indices``.

    Example:
        >>> import torch
        >>> from pydense.ops import max_pool2d_same
        >>> max_pool2d_same(torch.tensor([[[[0.0, 4.0, 1.0, 2.0]]]]), 3)
        tensor([[[[4., 4., 4., 2.]]]])
    """
    op = "max_pool2d_same"
    arguments.picture(op, "x", x)
    size = window_size(op, "kernel_size", kernel_size)
    if x.requires_grad and torch.is_grad_enabled():
        return pools.max_pool2d_same_with_offsets(x, size)[0]
    return pools.max_pool2d_same(x, size)


def chained_residual_pool(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    variant: str = "pool_conv",
    pool_size: int = 5,
) -> Tensor:
    r"""RefineNet's chained residual pooling: the input plus the results of a chain of stages.

    .. math:: t_0 = x, \qquad \mathrm{out} = x + \sum_{i=1}^{n} t_i, \qquad
              t_i = \begin{cases} w_i * \mathrm{pool}(t_{i-1}) + b_i & \text{pool\_conv} \\
              \mathrm{pool}(w_i * t_{i-1} + b_i) & \text{conv\_pool} \end{cases}

    with the pool of :func:`max_pool2d_same`. The ReLU that RefineNet has before the block is not
    part of it.

    1x1 convolutions (Light-Weight RefineNet) are one operator: on the CPU the pooled tile goes from
    the pool into the matrix product without reaching memory, on CUDA the product is a kernel of its
    own, and the residuals are added on the way out. 3x3 convolutions are those of
    :func:`atrous_conv2d` (Winograd's algorithm on the CPU in float32 with many channels, else
    torch's most often), around the pool.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides; N may be 0.
        weights: 1 to 64 tensors (C, C, k, k) with k = 1 or 3, the same for all.
        biases: As many tensors (C,), or None. RefineNet has none.
        variant: ``"pool_conv"``: the CVPR paper, its PyTorch port and Light-Weight RefineNet;
            ``"conv_pool"``: the improved RefineNet of the authors' later models.
        pool_size: Odd, 3 to 13.

    Returns:
        (N, C, H, W), channels_last where torch takes ``x`` as such, contiguous otherwise; of the
        dtype of ``x``, or under autocast of autocast's dtype (float64 stays). 16-bit tensors are
        multiplied and summed in float32, each :math:`t_i` is rounded once. CPUs with instructions
        for products of bfloat16 (``avx512_bf16``) take subnormal numbers for 0 there, as torch's
        convolutions do, and differ by rounding from CPUs without. The 1x1 form is bitwise
        the same for any number of threads, and so is its backward. Its backward in bfloat16 on CPUs
        with AMX uses torch's convolutions, and so may the 3x3 form: they are so at a fixed number
        of threads only. On CUDA the 1x1 form is bitwise the same from run to run, and float32 is
        never rounded to TF32; its backward leaves both to torch's matrix products. Rounding and
        infinities of the 3x3 form are those of :func:`atrous_conv2d`: Winograd's algorithm makes
        NaN of infinities, in all of a tile.

    Raises:
        ValueError: A shape, size or word out of range.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a CUDA device; a tangent.
        RuntimeError: A second derivative of the 1x1 form.

    Memory: 1x1: the result, every :math:`t_i` but the last, and half a megabyte per thread or, on
    CUDA, one pooled picture. Saved for backward, for each stage: one byte for each element (where
    pools found their maxima), and the input of the convolution where a weight requires a gradient.
    torch saves the pool's input and int64 indices besides. 3x3: as :func:`atrous_conv2d`, with
    those bytes instead of the pool's input and indices.

    Source: G. Lin et al., *RefineNet*, CVPR 2017; V. Nekrasov et al., *Light-Weight RefineNet*,
    BMVC 2018 (code: refinenet, refinenet-pytorch, light-weight-refinenet).

    Example:
        >>> import torch
        >>> from pydense.ops import chained_residual_pool
        >>> x = torch.rand(1, 8, 16, 16)
        >>> chained_residual_pool(x, [torch.rand(8, 8, 1, 1) for _ in range(4)]).shape
        torch.Size([1, 8, 16, 16])
    """
    op = "chained_residual_pool"
    arguments.picture(op, "x", x)
    check.choice(op, "variant", variant, VARIANTS)
    size = window_size(op, "pool_size", pool_size)
    row = tensors(op, "weights", weights, MAX_STAGES)
    shifts = [] if biases is None else tensors(op, "biases", biases, MAX_STAGES)
    if shifts and len(shifts) != len(row):
        raise ValueError(f"{op}: biases must be {len(row)} as the weights, got {len(shifts)}")
    x, (row, shifts) = as_convolution(x, row, shifts)
    _check_shapes(op, x, row, shifts)
    if row[0].shape[2] == 3:
        return _stage_by_stage(x, row, shifts, variant == "pool_conv", size)
    recorded = torch.is_grad_enabled()
    save_inputs = recorded and any(w.requires_grad for w in row)
    save_offsets = recorded and any(t.requires_grad for t in (x, *row, *shifts))
    return operators.chained_residual_pool(
        x, row, shifts, variant == "pool_conv", size, save_inputs, save_offsets
    )[0]


def _check_shapes(op: str, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    channels = x.shape[1]
    kernel = weights[0].shape[-1] if weights[0].dim() == 4 else 0
    if kernel not in (1, 3):
        raise ValueError(
            f"{op}: weights must have shape (C, C, 1, 1) or (C, C, 3, 3), "
            f"got {check.shape(weights[0])}"
        )
    wanted = (channels, channels, kernel, kernel)
    for name, row, shape in (("weights", weights, wanted), ("biases", biases, (channels,))):
        for i, tensor in enumerate(row):
            parameter(op, f"{name}[{i}]", tensor, x, shape)


def _stage_by_stage(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], pool_first: bool, size: int
) -> Tensor:
    top, total = x, x
    for i, weight in enumerate(weights):
        bias = biases[i] if biases else None
        if pool_first:
            top = atrous_conv2d(max_pool2d_same(top, size), weight, bias, padding=1)
        else:
            top = max_pool2d_same(atrous_conv2d(top, weight, bias, padding=1), size)
        # The first sum is new memory, and no derivative needs a sum.
        total = total + top if i == 0 else total.add_(top)
    return total
