# SPDX-License-Identifier: Apache-2.0
"""Atrous spatial pyramid pooling: parallel atrous convolutions of one map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments
from ._aspp_products import own_products
from ._convolution_arguments import as_convolution, parameter, tensors

_library.load()

from . import _aspp_autograd as operators  # noqa: E402  registers

MAX_BRANCHES = 64
MAX_RATE = 2**31 - 1


def aspp_sum(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    rates: Sequence[int],
) -> Tensor:
    r"""DeepLab v2's atrous spatial pyramid pooling: the sum of 3x3 convolutions of several rates.

    .. math:: \mathrm{out} = \sum_i \left( w_i *_{r_i} x + b_i \right)

    where :math:`*_r` is a convolution with dilation r and padding r: ``sum(F.conv2d(x, w, b,
    padding=r, dilation=r) for ...)``. Nothing may stand between the branches and the sum; the VGG
    nets of DeepLab have a ReLU there.

    What each tap makes of every pixel is one matrix product for all branches, whose centre taps
    are one matrix, the sum of theirs; then one pass adds the maps of the taps, each shifted to its
    place. Taps that no pixel of the map reaches, at rates of its size and more, are left out, and
    so is what a tap would make of rows that it does not read.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides; N may be 0.
        weights: 1 to 64 tensors (O, C, 3, 3).
        biases: As many tensors (O,), or None.
        rates: As many integers, 1 or more; the same one may come twice.

    Returns:
        (N, O, H, W), channels_last where torch takes ``x`` as such, contiguous otherwise; of the
        dtype of ``x``, or under autocast of autocast's dtype (float64 stays). Padding is not
        multiplied: an infinite weight makes no NaN with it. bfloat16 is multiplied as such where
        the CPU has instructions for it (AVX-512 BF16 or AMX), which rounds the sums of weights to
        bfloat16; elsewhere, and for float16, the product is one of float32. What the taps make is
        summed in float32, and rounded once. The same bits from run to run and for any number of
        threads, but for bfloat16 on a CPU with AMX: there products are torch's, bitwise the same
        at a fixed number of threads, and round what every tap makes to bfloat16. On a GPU the
        product is torch's (cuBLAS): it multiplies 16-bit numbers as such, rounds what every tap
        makes to the dtype of ``x``, and takes TF32 where ``torch.backends.cuda.matmul.allow_tf32``
        is set; what is added around it has one order, and the same bits from run to run.

    Raises:
        ValueError: A shape, number or count out of range.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a CUDA device; a tangent.
        RuntimeError: A second derivative.

    Memory: the result; what the taps make, in float32, for as many outputs and pictures as 64 MiB
    hold (at least one output of one picture: 8 numbers for each branch and pixel); two copies of
    the weights; a copy of a picture whose pixels do not lie evenly in memory. Backward makes
    shifted gradients by blocks that stay in the cache, a few MiB for each thread (where products
    are torch's, up to 64 MiB). A GPU keeps what the taps make, and shifted gradients, in the dtype
    of ``x``, up to 64 MiB of each, and contiguous or channels_last as ``x`` is: a picture is
    neither transposed nor copied. Saved for backward: ``x`` where a weight requires a gradient, and
    the weights where ``x`` does.

    Source: L.-C. Chen et al., *DeepLab*, TPAMI 2018 (code: deeplab-public-ver2, the layers
    ``fc1_voc12_c0`` to ``c3``).

    Example:
        >>> import torch
        >>> from pydense.ops import aspp_sum
        >>> x, weights = torch.rand(1, 8, 17, 17), [torch.rand(3, 8, 3, 3) for _ in range(4)]
        >>> aspp_sum(x, weights, rates=(6, 12, 18, 24)).shape
        torch.Size([1, 3, 17, 17])
    """
    x, row, shifts, numbers = _checked(x, weights, biases, rates)
    return operators.aspp_sum(x, row, shifts, numbers)


def explain_aspp_sum(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    rates: Sequence[int],
) -> str:
    """What ``pydense.explain`` says."""
    x, *_ = _checked(x, weights, biases, rates)
    if x.device.type == "cuda":
        return (
            "torch's product, pydense's kernels around it: x is on cuda, one product for the taps "
            "of all branches, whose maps are shifted and added in the memory format of x"
        )
    if own_products(x.dtype):
        return "pydense's kernels: x is on the CPU, products and shifts by blocks"
    return (
        "torch's product, pydense's kernels around it: x is of bfloat16, for which torch uses this "
        "CPU's AMX"
    )


def _checked(
    x: Tensor, weights: Any, biases: Any, rates: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[int]]:
    op = "aspp_sum"
    arguments.picture(op, "x", x)
    row = tensors(op, "weights", weights, MAX_BRANCHES)
    shifts = [] if biases is None else tensors(op, "biases", biases, MAX_BRANCHES)
    wanted = check.sequence(op, "rates", rates, "integers")
    for name, given in (("biases", shifts), ("rates", wanted)):
        if len(given) != len(row) and (given or name == "rates"):
            raise ValueError(f"{op}: {name} must be {len(row)} as the weights, got {len(given)}")
    numbers = [check.integer(op, f"rates[{i}]", r, 1, MAX_RATE) for i, r in enumerate(wanted)]
    x, (row, shifts) = as_convolution(x, row, shifts)
    _check_parameters(op, x, row, shifts)
    return x, row, shifts, numbers


def _check_parameters(op: str, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    first = weights[0]
    if first.dim() != 4 or first.shape[0] < 1:
        raise ValueError(
            f"{op}: weights[0] must have shape (O, {x.shape[1]}, 3, 3) with O >= 1, "
            f"got {check.shape(first)}"
        )
    outputs = first.shape[0]
    kinds: tuple[tuple[str, list[Tensor], tuple[Any, ...]], ...] = (
        ("weights", weights, (outputs, x.shape[1], 3, 3)),
        ("biases", biases, (outputs,)),
    )
    for name, row, shape in kinds:
        for i, tensor in enumerate(row):
            parameter(op, f"{name}[{i}]", tensor, x, shape)
