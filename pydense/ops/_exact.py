# SPDX-License-Identifier: Apache-2.0
"""The Gaussian filter by brute force: the oracle of the lattice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pydense import _library

from . import _crf_arguments as check
from ._forward_ad import refuse_tangent

_library.load()

# Of a row sum without the point itself: far from all others nothing is left of it.
_FLOOR = 1e-20


def exact_gaussian_filter(
    values: Tensor,
    features: Tensor,
    *,
    normalization: str | None = None,
    self_term: bool = True,
) -> Tensor:
    r"""Filter ``values`` with a Gaussian kernel between all pairs of points, exactly.

    .. math:: \mathrm{out}_{ci} = \sum_j \hat K_{ij}\,\mathrm{values}_{cj}, \qquad
              K_{ij} = \exp\bigl(-|f_i - f_j|^2 / 2\bigr)

    by brute force: time is quadratic in the number of points P, about P^2 / 10^9 seconds per image
    on one AVX-512 core for 21 channels and 5 dimensions. ``permutohedral_filter`` approximates
    this in linear time.

    Args:
        values: (N, C, *spatial) with one (points), two (image) or three (volume) spatial axes;
            float32, float64, float16 or bfloat16, any strides. The kernel is computed in float64
            for float64 and in float32 otherwise.
        features: (N or 1, d, *spatial), d from 1 to 4096, divided by their standard deviations;
            any real dtype, any strides, cast to the dtype of the computation. One set of features
            serves the whole batch, and its kernel is then computed once for all images.
        normalization: With :math:`n = K 1`: ``None`` for :math:`\hat K = K`, ``"after"`` for
            :math:`n^{-1} K` (a weighted mean), ``"before"`` for :math:`K n^{-1}`, ``"symmetric"``
            for :math:`n^{-1/2} K n^{-1/2}`.
        self_term: False takes the weight of each point with itself, which is 1, out of K, and
            thereby out of n; n is then taken as at least 1e-20.

    Returns:
        (N, C, *spatial), contiguous, of the dtype of ``values``. Bitwise the same from run to run,
        for any number of threads (``torch.set_num_threads``), for an image alone and in a batch,
        and on all CPUs with fused multiply-add (not on baseline x86, which rounds more often).

        Differences are squared and summed without :math:`|a|^2 + |b|^2 - 2ab`, so features may
        lie far from the origin. Kernel values below the smallest normal number are 0. NaN and
        infinities are taken as in any sum: in the values they reach all points of their channel; a
        NaN in the features reaches all points of its image; an infinite feature takes its point
        out of the sums of all others, and the point itself becomes NaN (with ``self_term=False``
        and without normalisation, 0).

    Raises:
        ValueError: Shapes that do not fit, an unknown ``normalization``.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are not on the CPU.

    Memory: the result and, for a normalisation, n and one tensor like ``values``; up to about
    1 MB per thread for d up to 32. Gradients of any order, by the values and the features; the
    features are saved for backward, and the values where the features need a gradient, which takes
    d + 1 times the channels.

    Example:
        Every point becomes the mean of its surroundings, near ones counting more:

        >>> import torch
        >>> from pydense.ops import exact_gaussian_filter
        >>> values = torch.tensor([[[0.0, 0.0, 6.0, 0.0, 0.0]]])
        >>> positions = torch.arange(5.0).view(1, 1, 5)
        >>> exact_gaussian_filter(values, positions, normalization="after").round(decimals=2)
        tensor([[[0.4600, 1.5400, 2.4200, 1.5400, 0.4600]]])
    """
    op = "exact_gaussian_filter"
    check.choice(op, "normalization", normalization, check.NORMALIZATIONS)
    check.flag(op, "self_term", self_term)
    check.floating(op, "values", values)
    check.real(op, "features", features)
    check.like_unary(op, "features", features, "values", values)
    wide = values.to(check.compute_dtype(values.dtype))
    kernel = ExactKernel(features.flatten(2).to(wide.dtype), normalization, self_term)
    return kernel.filter(wide.flatten(2)).view(values.shape).to(values.dtype)


class ExactKernel:
    """K of ``exact_gaussian_filter``, with its normalisers.

    Args:
        features: (B or 1, d, P), float32 or float64.
        normalization: "symmetric", "before", "after" or None.
        self_term: See ``exact_gaussian_filter``.
    """

    def __init__(self, features: Tensor, normalization: str | None, self_term: bool) -> None:
        self._features = features
        self._self_term = self_term
        self._before: Tensor | None = None
        self._after: Tensor | None = None
        if normalization is None:
            return
        ones = features.new_ones(features.shape[0], 1, features.shape[2])
        mass = torch.ops.pydense.exact_gaussian_filter(ones, features, self_term)
        if not self_term:
            mass = mass.clamp(min=_FLOOR)
        if normalization == "symmetric":
            self._before = self._after = mass.rsqrt()
        elif normalization == "before":
            self._before = mass.reciprocal()
        else:
            self._after = mass.reciprocal()

    def filter(self, values: Tensor) -> Tensor:
        """Filters (B, C, P) values; contiguous."""
        if self._before is not None:
            values = values * self._before
        result: Tensor = torch.ops.pydense.exact_gaussian_filter(
            values, self._features, self._self_term
        )
        return result if self._after is None else result * self._after


def apply_compat(compat: Tensor, message: Tensor) -> Tensor:
    """C m on the label axis of (B, L, P) messages."""
    if compat.dim() == 0:
        return compat * message
    if compat.dim() == 1:
        return compat.view(-1, 1) * message
    # Products and sums one by one: the bits of torch's matrix product depend on the batch size,
    # and autocast would compute it in 16 bits.
    columns = compat.unbind(1)
    total = columns[0].view(-1, 1) * message[:, :1]
    for label in range(1, len(columns)):
        total = total + columns[label].view(-1, 1) * message[:, label : label + 1]
    return total


def _fake(values: Tensor, features: Tensor, self_term: bool) -> Tensor:
    fits = values.dim() == 3 and features.dim() == 3 and values.dtype == features.dtype
    torch._check(fits)  # type: ignore[no-untyped-call]
    torch._check(values.shape[2] == features.shape[2])  # type: ignore[no-untyped-call]
    return values.new_empty(values.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, features, ctx.self_term = inputs
    ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, features)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """K is symmetric, so its transpose is itself. The derivative by the features is the true one.

    It is a_i (K(b f) - f K b)_i, with a the gradient and b the values, and the same exchanged.
    """
    refuse_tangent("exact_gaussian_filter (backward)", "grad", grad)
    values, features = ctx.saved_tensors
    need_values, need_features, _ = ctx.needs_input_grad
    grad_values = grad_features = None
    if need_values and not need_features:
        grad_values = torch.ops.pydense.exact_gaussian_filter(grad, features, ctx.self_term)
    if need_features:
        near = features - features[:, :, :1]  # differences alone count: keep what cancels small
        one = _with_features(grad, features, near, ctx.self_term)
        other = _with_features(values, features, near, ctx.self_term)
        rows = []
        for k in range(features.shape[1]):
            f = near[:, k : k + 1]
            pull = grad * (other[k + 1] - f * other[0]) + values * (one[k + 1] - f * one[0])
            rows.append(pull.sum(1))
        total = torch.stack(rows, 1)
        grad_features = total.sum(0, keepdim=True) if features.shape[0] == 1 else total
        grad_values = one[0] if need_values else None
    return grad_values, grad_features, None


def _with_features(
    values: Tensor, features: Tensor, near: Tensor, self_term: bool
) -> tuple[Tensor, ...]:
    """K v, K(v f_1), K(v f_2), ..., all with one pass over the pairs of points."""
    rows = [values, *[values * near[:, k : k + 1] for k in range(near.shape[1])]]
    out: Tensor = torch.ops.pydense.exact_gaussian_filter(torch.cat(rows, 1), features, self_term)
    return out.chunk(near.shape[1] + 1, 1)


torch.library.register_fake("pydense::exact_gaussian_filter")(_fake)
torch.library.register_autograd("pydense::exact_gaussian_filter", _backward, setup_context=_setup)


@register_flop_formula(torch.ops.pydense.exact_gaussian_filter)
def _flops(
    values: Sequence[int], features: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Per pair of points 3 d for the distance and 1 for exp, and 2 per channel for the sum."""
    batch, channels, points = values
    images, dims, _points = features
    return points * points * (images * (3 * dims + 1) + batch * channels * 2)
