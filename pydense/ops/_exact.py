# SPDX-License-Identifier: Apache-2.0
"""The Gaussian filter by brute force: the oracle of the lattice."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pydense import _library

from . import _crf_arguments as check
from ._forward_ad import refuse_tangent

_library.load()

# Of the fast mode: dimensions it takes, and kernel values that it may leave out.
_FAST_DIMS = 10
_SKIP_TOLERANCE = 1e-4
_TILE = 128
# Of a row sum without the point itself: far from all others nothing is left of it.
_FLOOR = 1e-20


def exact_gaussian_filter(
    values: Tensor,
    features: Tensor,
    *,
    normalization: str | None = None,
    self_term: bool = True,
    precision: str = "accurate",
    skip_tolerance: float | None = None,
) -> Tensor:
    r"""Filter ``values`` with a Gaussian kernel between all pairs of points, exactly.

    .. math:: \mathrm{out}_{ci} = \sum_j \hat K_{ij}\,\mathrm{values}_{cj}, \qquad
              K_{ij} = \exp\bigl(-|f_i - f_j|^2 / 2\bigr)

    by brute force: time is quadratic in the number of points P, about P^2 / 10^9 seconds per image
    on one AVX-512 core for 21 channels and 5 dimensions (predicted for a GPU: P^2 / (5 * 10^11) on
    an H200). ``permutohedral_filter`` approximates this in linear time.

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
        precision: ``"accurate"``: float32 (float64) throughout. ``"fast"``: on a GPU, tensor cores
            for float32 and d up to 10, with a relative L2 error of one pass of at most 1e-3 for
            values of one sign; for all else what ``"accurate"`` gives. Kernel values come from
            features split into two or three numbers of bfloat16, about the middle of 128
            neighbours in a k-d tree, or, where these lie farther than 32 from it, from differences
            in float32, which is slower; they and the values are rounded to TF32 and summed in
            float32.
        skip_tolerance: Runs of points that are so far apart that all kernel values between them
            are below this are left out, in fast mode alone: an output is then wrong by less than
            it times the sum of the values' magnitudes. None is 1e-4 there; 0 leaves out nothing,
            and is all that accurate mode takes.

    Returns:
        (N, C, *spatial), contiguous, of the dtype of ``values``. Bitwise the same from run to run,
        for any number of threads (``torch.set_num_threads``), for an image alone and in a batch,
        and on all CPUs with fused multiply-add (not on baseline x86, which rounds more often). A
        GPU agrees with them to rounding: one pass differs from float64 by a relative L2 error of at
        most 1e-5 in float32.

        Differences are squared and summed without :math:`|a|^2 + |b|^2 - 2ab`, so features may
        lie far from the origin. Kernel values below the smallest normal number are 0. NaN and
        infinities are taken as in any sum: in the values they reach all points of their channel; a
        NaN in the features reaches all points of its image; an infinite feature takes its point
        out of the sums of all others, and the point itself becomes NaN (with ``self_term=False``
        and without normalisation, 0). On a GPU, in fast mode, those in the values do not pass pairs
        of points that are left out (``skip_tolerance``), and features are to be finite: others make
        NaN, of neighbouring points too, or drop out.

    Raises:
        ValueError: Shapes that do not fit, an unknown ``normalization`` or ``precision``, a
            ``skip_tolerance`` outside [0, 1) or without fast mode.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (cuda).

    Memory: the result and, for a normalisation, n and one tensor like ``values``; up to about
    1 MB per thread for d up to 32; on a GPU up to 32 results of up to 8,192 points, fewer of more
    points, and none from 135,168 points on. Gradients of any order, by the values and the features;
    the features are saved for backward, and the values where the features need a gradient, which
    takes d + 1 times the channels. In fast mode gradients by the values are fast too, those by the
    features accurate; its order of the points takes 26 bytes per point (48 above d = 5), and a
    filter a copy of the values.

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
    check.floating(op, "values", values, devices=check.DEVICES)
    check.real(op, "features", features, (values.device.type,))
    check.like_unary(op, "features", features, "values", values)
    wide = values.to(check.compute_dtype(values.dtype))
    skipped = check_precision(op, precision, skip_tolerance)
    kernel = ExactKernel(
        features.flatten(2).to(wide.dtype), normalization, self_term, precision, skipped
    )
    return kernel.filter(wide.flatten(2)).view(values.shape).to(values.dtype)


def check_precision(op: str, precision: str, skip_tolerance: float | None = None) -> float:
    """The tolerance that is meant."""
    check.choice(op, "precision", precision, check.PRECISIONS)
    if skip_tolerance is None:
        return _SKIP_TOLERANCE if precision == "fast" else 0.0
    if not isinstance(skip_tolerance, Real):
        raise TypeError(f"{op}: skip_tolerance must be a number, got {check.kind(skip_tolerance)}")
    if not 0 <= skip_tolerance < 1:
        raise ValueError(f"{op}: skip_tolerance must be in [0, 1), got {skip_tolerance}")
    if skip_tolerance != 0 and precision != "fast":
        raise ValueError(
            f"{op}: skip_tolerance must be 0 with precision='accurate', got {skip_tolerance}"
        )
    return float(skip_tolerance)


class ExactKernel:
    """K of ``exact_gaussian_filter``, with its normalisers.

    Args:
        features: (B or 1, d, P), float32 or float64.
        normalization: "symmetric", "before", "after" or None.
        self_term: See ``exact_gaussian_filter``.
        precision: "accurate" or "fast".
        skip_tolerance: Of fast mode.
    """

    def __init__(
        self,
        features: Tensor,
        normalization: str | None,
        self_term: bool,
        precision: str = "accurate",
        skip_tolerance: float = 0.0,
    ) -> None:
        self._features = features
        self._self_term = self_term
        self._skip_tolerance = skip_tolerance
        self._order: Tensor | None = None
        wide = features.dtype != torch.float32 or features.shape[1] > _FAST_DIMS
        if precision == "fast" and not wide:
            self._order = torch.ops.pydense.exact_gaussian_order(features.detach())
        self._before: Tensor | None = None
        self._after: Tensor | None = None
        if normalization is None:
            return
        ones = features.new_ones(features.shape[0], 1, features.shape[2])
        mass = self._sums(ones)
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
        result = self._sums(values)
        return result if self._after is None else result * self._after

    def _sums(self, values: Tensor) -> Tensor:
        result: Tensor
        if self._order is None:
            result = torch.ops.pydense.exact_gaussian_filter(
                values, self._features, self._self_term
            )
        else:
            result = torch.ops.pydense.exact_gaussian_filter_fast(
                values, self._features, self._order, self._self_term, self._skip_tolerance
            )
        return result


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
    """K is symmetric, so its transpose is itself. By the features it is the true derivative."""
    refuse_tangent("exact_gaussian_filter (backward)", "grad", grad)
    values, features = ctx.saved_tensors
    need_values, need_features, _ = ctx.needs_input_grad
    if not need_features:
        filtered = torch.ops.pydense.exact_gaussian_filter(grad, features, ctx.self_term)
        return filtered if need_values else None, None, None
    grad_values, grad_features = _by_features(grad, values, features, ctx.self_term)
    return grad_values if need_values else None, grad_features, None


def _by_features(
    grad: Tensor, values: Tensor, features: Tensor, self_term: bool
) -> tuple[Tensor, Tensor]:
    """K a and a_i (K(b f) - f K b)_i, with a the gradient and b the values, and exchanged."""
    near = features - features[:, :, :1]  # differences alone count: keep what cancels small
    one = _with_features(grad, features, near, self_term)
    other = _with_features(values, features, near, self_term)
    rows = []
    for k in range(features.shape[1]):
        f = near[:, k : k + 1]
        pull = grad * (other[k + 1] - f * other[0]) + values * (one[k + 1] - f * one[0])
        rows.append(pull.sum(1))
    total = torch.stack(rows, 1)
    return one[0], total.sum(0, keepdim=True) if features.shape[0] == 1 else total


def _with_features(
    values: Tensor, features: Tensor, near: Tensor, self_term: bool
) -> tuple[Tensor, ...]:
    """K v, K(v f_1), K(v f_2), ..., all with one pass over the pairs of points."""
    rows = [values, *[values * near[:, k : k + 1] for k in range(near.shape[1])]]
    out: Tensor = torch.ops.pydense.exact_gaussian_filter(torch.cat(rows, 1), features, self_term)
    return out.chunk(near.shape[1] + 1, 1)


def _fake_order(features: Tensor) -> Tensor:
    if features.device.type == "cpu":
        return features.new_empty((0, 0, 0), dtype=torch.int32)
    images, dims, points = features.shape
    words = _TILE + (_TILE + 12) * (5 if dims <= 5 else 10)
    return features.new_empty((images, (points + _TILE - 1) // _TILE, words), dtype=torch.int32)


def _fake_fast(
    values: Tensor, features: Tensor, order: Tensor, self_term: bool, skip_tolerance: float
) -> Tensor:
    return _fake(values, features, self_term)


def _setup_fast(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, features, order, ctx.self_term, ctx.skip_tolerance = inputs
    ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, features, order)


def _backward_fast(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By the features it is a small difference of large sums, for which fast mode is too rough."""
    refuse_tangent("exact_gaussian_filter (backward)", "grad", grad)
    values, features, order = ctx.saved_tensors
    need_values, need_features = ctx.needs_input_grad[:2]
    grad_values = grad_features = None
    if need_values:
        grad_values = torch.ops.pydense.exact_gaussian_filter_fast(
            grad, features, order, ctx.self_term, ctx.skip_tolerance
        )
    if need_features:
        _, grad_features = _by_features(grad, values, features, ctx.self_term)
    return grad_values, grad_features, None, None, None


torch.library.register_fake("pydense::exact_gaussian_order")(_fake_order)
torch.library.register_fake("pydense::exact_gaussian_filter_fast")(_fake_fast)
torch.library.register_autograd(
    "pydense::exact_gaussian_filter_fast", _backward_fast, setup_context=_setup_fast
)
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


register_flop_formula(torch.ops.pydense.exact_gaussian_filter_fast)(_flops)
