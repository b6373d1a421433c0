# SPDX-License-Identifier: Apache-2.0
"""DeepLab v3's atrous spatial pyramid pooling: parallel branches of one map, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments
from ._atrous_dispatch import Kernels
from ._atrous_plan import ACTIVATIONS
from ._convolution_arguments import as_convolution, parameter, tensors
from .aspp import MAX_BRANCHES, MAX_RATE
from .atrous_conv import WeightCache

_library.load()

from . import _aspp_concat_autograd as operators  # noqa: E402  registers


def aspp_concat(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    *,
    pool_weight: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""DeepLab v3's branches, each written into its channels of the result.

    .. math:: \mathrm{out} = \big[ f(s_i \, (w_i *_{r_i} x) + b_i) \big]_i

    where :math:`*_r` is a convolution with dilation r and padding r (k - 1) / 2, and the last
    branch, of ``pool_weight``, is the same of the mean of all pixels, in every pixel. ``scales``
    and ``biases`` are batch normalisation with fixed statistics: :math:`s = \gamma / \sqrt{v +
    \epsilon}`, :math:`b = \beta - m s`. Nothing is concatenated.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides, on the CPU or a CUDA
            device; N may be 0.
        weights: 1 to 64 tensors (O_i, C, k, k') with odd kernels: 1 x 1 and 3 x 3 in DeepLab.
        rates: As many integers, 1 or more; that of a 1 x 1 kernel does not count.
        pool_weight: (O, C, 1, 1), or None: no such branch.
        scales: A tensor (O_i,) for each branch, the pooled one last; or None. Of the dtype of
            ``x``, or float32 with a 16-bit ``x``.
        biases: As ``scales``.
        activation: None, or ``"relu"`` of all branches.

    Returns:
        (N, sum of all O, H, W), of the memory format of ``x`` and its dtype, or under autocast of
        autocast's dtype (float64 stays; scales and biases stay what they are). Each branch has the
        kernels that :func:`pydense.ops.atrous_conv2d` with ``winograd_tile=None`` would have for
        it, forward and backward; but in bfloat16 the gradients of weights that are dilated or
        larger than 3 are always pydense's on the CPU. On CUDA, all branches but the pooled one are
        pydense's forward, in one launch, as soon as one of them is. ``pydense.explain(
        "aspp_concat", x, weights, rates, ...)`` says whose each branch is and why. pydense's sum
        16-bit tensors in float32, scale, shift and round once, straight into the result, do not
        multiply padding, and are bitwise the same for any number of threads. torch's, and the mean
        of all pixels with its product, are torch's in all of that.

    Raises:
        ValueError: A shape, number or count out of range.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: A tensor on another device; a tangent.
        RuntimeError: A second derivative.

    Memory: the result, a copy of the largest weight, and one of a contiguous ``x``; where torch
    convolves, the map of one branch twice; on CUDA, what :func:`pydense.ops.atrous_conv2d` needs
    for all branches at once. Backward has copies of one branch's gradient and of the weights. Saved
    for backward: ``x``, the weights and scales; the result, with an activation.

    Source: L.-C. Chen et al., *Rethinking Atrous Convolution for Semantic Image Segmentation*,
    2017.

    Example:
        >>> import torch
        >>> from pydense.ops import aspp_concat
        >>> x, weights = torch.rand(1, 8, 17, 17), [torch.rand(4, 8, k, k) for k in (1, 3, 3)]
        >>> aspp_concat(x, weights, (1, 6, 12), pool_weight=torch.rand(4, 8, 1, 1)).shape
        torch.Size([1, 16, 17, 17])
    """
    return concat(x, weights, rates, pool_weight, scales, biases, activation)


def concat(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    pool_weight: Tensor | None,
    scales: Sequence[Tensor] | None,
    biases: Sequence[Tensor] | None,
    activation: str | None,
    caches: Sequence[WeightCache | None] = (),
) -> Tensor:
    """``aspp_concat`` with weights that may be packed before: a cache for each of them, or none."""
    call = _checked(x, weights, rates, pool_weight, scales, biases, activation)
    packed = _packed(call.x, weights, call.rates, caches)
    return operators.aspp_concat(
        call.x,
        call.weights,
        packed,
        call.pool_weight,
        call.scales,
        call.biases,
        call.rates,
        activation == "relu",
    )


def explain_aspp_concat(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    *,
    pool_weight: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
    activation: str | None = None,
) -> str:
    """What ``pydense.explain`` says: a line for each branch."""
    call = _checked(x, weights, rates, pool_weight, scales, biases, activation)
    choices = operators.choose_branches(call.x, call.weights, call.rates)
    lines = []
    for i, (weight, rate, choice) in enumerate(zip(call.weights, call.rates, choices, strict=True)):
        height, width = weight.shape[2:]
        name = f"{height}x{width}" + (f", rate {rate}" if max(height, width) > 1 else "")
        found = operators.own_gradients(call.x, weight, rate)
        lines.append(
            f"branch {i} ({name}): {choice.kernels.value}: {choice.reason}"
            f"{_other_gradients(choice.kernels is Kernels.DENSE, *found)}"
        )
    if call.pool_weight is not None:
        lines.append(
            f"branch {len(lines)} (pooled): torch's mean of all pixels and torch's convolution: of "
            "each picture one pixel is left to convolve, and copied to all of the output"
        )
    return "\n".join(lines)


def _other_gradients(own: bool, of_x: bool, of_weight: bool) -> str:
    """The gradients that are pydense's where the branch is torch's, or the other way round."""
    others = [name for name, found in (("x", of_x), ("its weight", of_weight)) if found != own]
    if not others:
        return ""
    are = "gradient of {} is" if len(others) == 1 else "gradients of {} and {} are"
    return f"; the {are.format(*others)} {'torch' if own else 'pydense'}'s"


class _Checked(NamedTuple):
    """A call that fits, in autocast's dtype."""

    x: Tensor
    weights: list[Tensor]
    pool_weight: Tensor | None
    scales: list[Tensor]
    biases: list[Tensor]
    rates: list[int]


def _checked(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    pool_weight: Tensor | None,
    scales: Sequence[Tensor] | None,
    biases: Sequence[Tensor] | None,
    activation: str | None,
) -> _Checked:
    op = "aspp_concat"
    arguments.picture(op, "x", x, ("cpu", "cuda"))
    row = tensors(op, "weights", weights, MAX_BRANCHES)
    pool = [] if pool_weight is None else [check.any_tensor(op, "pool_weight", pool_weight)]
    wanted = check.sequence(op, "rates", rates, "integers")
    if len(wanted) != len(row):
        raise ValueError(f"{op}: rates must be {len(row)} as the weights, got {len(wanted)}")
    numbers = [check.integer(op, f"rates[{i}]", r, 1, MAX_RATE) for i, r in enumerate(wanted)]
    check.choice(op, "activation", activation, ACTIVATIONS)
    vectors = {
        name: [] if row_of is None else tensors(op, name, row_of, MAX_BRANCHES + 1)
        for name, row_of in (("scales", scales), ("biases", biases))
    }
    x, (row, pool) = as_convolution(x, row, pool)
    for i, weight in enumerate(row):
        _check_weight(op, f"weights[{i}]", weight, x)
    for weight in pool:
        _check_weight(op, "pool_weight", weight, x, pools=True)
    outputs = [weight.shape[0] for weight in (*row, *pool)]
    for name, vector in vectors.items():
        _check_vectors(op, name, vector, outputs, x)
    scale_row, bias_row = vectors.values()
    return _Checked(x, row, pool[0] if pool else None, scale_row, bias_row, numbers)


def _packed(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    caches: Sequence[WeightCache | None],
) -> list[Tensor]:
    """What the caches have of weights that pydense's kernels read, for the operator."""
    if not caches:
        return []
    owns = operators.are_own(x, weights, rates)
    found = [
        cache.get(weight, x.dtype) if own and cache is not None else None
        for weight, own, cache in zip(weights, owns, caches, strict=True)
    ]
    if all(item is None for item in found):
        return []
    return [x.new_empty(0, dtype=torch.uint8) if item is None else item for item in found]


def _check_weight(op: str, name: str, weight: Tensor, x: Tensor, pools: bool = False) -> None:
    kernel = tuple(weight.shape[2:])
    fits = weight.dim() == 4 and min(weight.shape) >= 1 and weight.shape[1] == x.shape[1]
    if not fits or (kernel != (1, 1) if pools else any(k % 2 == 0 for k in kernel)):
        wanted = "1, 1" if pools else "k, k') with odd k, k'"
        raise ValueError(
            f"{op}: {name} must have shape (O, {x.shape[1]}, {wanted}{')' if pools else ''}, "
            f"got {check.shape(weight)}"
        )
    parameter(op, name, weight, x)


def _check_vectors(
    op: str, name: str, vectors: Sequence[Tensor], outputs: Sequence[int], x: Tensor
) -> None:
    if vectors and len(vectors) != len(outputs):
        raise ValueError(f"{op}: {name} must be {len(outputs)} as the branches, got {len(vectors)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    for i, (vector, count) in enumerate(zip(vectors, outputs, strict=False)):
        like = x if vector.dtype == x.dtype else x.new_empty(0, dtype=wide)
        parameter(op, f"{name}[{i}]", vector, like, (count,))
