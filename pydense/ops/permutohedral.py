# SPDX-License-Identifier: Apache-2.0
"""Gaussian filtering in a feature space of any dimension, on the permutohedral lattice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydense import _library

from . import _crf_arguments as check
from ._crf_autograd import needs_gradient
from ._crf_features import as_picture, check_features
from ._forward_ad import refuse_tangent

_library.load()


def permutohedral_filter(
    values: Tensor,
    features: Tensor,
    *,
    normalization: str | None = None,
    self_term: bool = True,
    reverse: bool = False,
    feature_gradient: str = "filter",
) -> Tensor:
    r"""Filter ``values`` with a Gaussian kernel between all pairs of points.

    .. math:: \mathrm{out}_{ci} = \sum_j \hat K_{ij}\,\mathrm{values}_{cj}, \qquad
              K_{ij} \approx s\,\exp\bigl(-|f_i - f_j|^2 / 2\bigr)

    evaluated on a permutohedral lattice: values are splatted to the d + 1 vertices of each point's
    simplex, blurred along the d + 1 axes and sliced back, in time linear in the number of points.
    The lattice approximates the kernel up to a factor s that depends on d, and with an error of
    some percent; with a normalisation s does not matter. ``exact_gaussian_filter`` has no such
    error and takes quadratic time.

    Args:
        values: (N, C, *spatial) with one (points), two (image) or three (volume) spatial axes;
            float32, float64, float16 or bfloat16, any strides. The kernel is computed in float64
            for float64 and in float32 otherwise.
        features: (N or 1, d, *spatial), d from 1 to 32, divided by their standard deviations; any
            real dtype, any strides, cast to the dtype of the computation. One set of features
            serves the whole batch.
        normalization: With :math:`n = K 1`: ``None`` for :math:`\hat K = K`, ``"after"`` for
            :math:`n^{-1} K` (a weighted mean), ``"before"`` for :math:`K n^{-1}`, ``"symmetric"``
            for :math:`n^{-1/2} K n^{-1/2}`.
        self_term: False takes the weight of each point with itself out of K, and thereby out of n.
        reverse: Apply the transpose of :math:`\hat K` instead. The lattice's blur is not quite
            symmetric, so this is not the same filter.
        feature_gradient: How backward differentiates by the features: ``"filter"`` or
            ``"lattice"`` (with ``self_term=True`` only), see ``dense_crf``. The gradient of the
            values is exact, and has gradients of its own.

    Returns:
        (N, C, *spatial), contiguous, of the dtype of ``values``. Bitwise the same from run to run
        and for any number of threads (``torch.set_num_threads``), and for an image alone and in a
        batch. NaN and infinities in ``values`` spread to the points around.

    Raises:
        ValueError: Shapes that do not fit, an unknown ``normalization``, features that are not
            finite or beyond the range of the lattice's integer coordinates.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (cuda); in
            ``backward`` of the gradient of the features.

    Memory: the lattice with 6 to 8 (d + 1) bytes per point (float64: 10 to 12) and as much per
    vertex, rows of 4 bytes per vertex and channel (float64: 8; at most 32 channels at a time), and
    the result. Saved for backward: the lattice and, where features need a gradient, those and the
    values.

    Source: A. Adams, J. Baek, M. A. Davis, *Fast High-Dimensional Filtering Using the Permutohedral
    Lattice*, Eurographics 2010; spacing and blur as in pydensecrf.

    Example:
        Smooth a noisy plane across an image without crossing its edges:

        >>> import torch
        >>> from pydense.ops import permutohedral_filter
        >>> image = (torch.arange(40) >= 20).float().expand(1, 1, 30, 40)
        >>> noisy = image + 0.3 * torch.randn(1, 1, 30, 40)
        >>> y, x = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
        >>> features = torch.stack([x / 5, y / 5, image[0, 0] / 0.1]).unsqueeze(0)
        >>> smooth = permutohedral_filter(noisy, features, normalization="after")
        >>> bool((smooth - image).abs().max() < (noisy - image).abs().max())
        True
    """
    op = "permutohedral_filter"
    check.choice(op, "normalization", normalization, check.NORMALIZATIONS)
    check.flag(op, "self_term", self_term)
    check.flag(op, "reverse", reverse)
    check.choice(op, "feature_gradient", feature_gradient, ("filter", "lattice"))
    if feature_gradient == "lattice" and not self_term:
        raise ValueError(f"{op}: feature_gradient must be 'filter' with self_term=False")
    check.floating(op, "values", values, devices=check.DEVICES)
    check_features(op, "features", features, "values", values)
    wide = values.to(check.compute_dtype(values.dtype))
    lattice = torch.ops.pydense.dense_crf_lattice(
        as_picture(features.detach().to(wide.dtype)), normalization or "none", self_term
    )
    values_picture, tracked = as_picture(wide), None
    if needs_gradient([features]):
        tracked = as_picture(features.to(wide.dtype))
    out = filter_with_gradient(values_picture, lattice, tracked, reverse, feature_gradient)
    return out.view(values.shape).to(values.dtype)


def _fake_lattice(features: Tensor, normalization: str, self_term: bool) -> Tensor:
    if features.dim() != 4:
        raise ValueError(f"dense_crf_lattice: features must be 4-dimensional, got {features.shape}")
    # How many vertices the points touch depends on where they lie.
    size = torch.library.get_ctx().new_dynamic_size()
    return features.new_empty([size], dtype=torch.uint8)


def _fake_filter(values: Tensor, lattice: Tensor, reverse: bool) -> Tensor:
    if values.dim() != 4:
        raise ValueError(f"permutohedral_filter: values must be 4-dimensional, got {values.shape}")
    return values.new_empty(values.shape)


torch.library.register_fake("pydense::dense_crf_lattice")(_fake_lattice)
torch.library.register_fake("pydense::permutohedral_filter")(_fake_filter)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, lattice, ctx.reverse = inputs
    ctx.save_for_backward(lattice)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Linear in the values: backward is the transposed filter, whose backward is the filter."""
    refuse_tangent("permutohedral_filter (backward)", "grad", grad)
    (lattice,) = ctx.saved_tensors
    return torch.ops.pydense.permutohedral_filter(grad, lattice, not ctx.reverse), None, None


torch.library.register_autograd("pydense::permutohedral_filter", _backward, setup_context=_setup)


def filter_with_gradient(
    values: Tensor, lattice: Tensor, features: Tensor | None, reverse: bool, mode: str
) -> Tensor:
    """The filter on pictures, differentiable by the features too unless those are None."""
    result: Tensor
    if features is None:
        result = torch.ops.pydense.permutohedral_filter(values, lattice, reverse)
    else:
        result = torch.ops.pydense.permutohedral_filter_of(values, lattice, features, reverse, mode)
    return result


@torch.library.custom_op("pydense::permutohedral_filter_of", mutates_args=())
def _filter_of(
    values: Tensor, lattice: Tensor, features: Tensor, reverse: bool, mode: str
) -> Tensor:
    result: Tensor = torch.ops.pydense.permutohedral_filter(values, lattice, reverse)
    return result


@_filter_of.register_fake
def _(values: Tensor, lattice: Tensor, features: Tensor, reverse: bool, mode: str) -> Tensor:
    return _fake_filter(values, lattice, reverse)


def _setup_of(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, lattice, features, ctx.reverse, ctx.mode = inputs
    ctx.save_for_backward(values, lattice, features)


def _backward_of(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    refuse_tangent("permutohedral_filter (backward)", "grad", grad)
    values, lattice, features = ctx.saved_tensors
    grad_values = grad_features = None
    if ctx.needs_input_grad[0]:
        # It depends on the features as well.
        grad_values = torch.ops.pydense.permutohedral_filter_of(
            grad, lattice, features, not ctx.reverse, ctx.mode
        )
    if ctx.needs_input_grad[2]:
        a, b = (values, grad) if ctx.reverse else (grad, values)
        grad_features = torch.ops.pydense.dense_crf_feature_gradient(
            features, lattice, a, b, None, ctx.mode
        )
    return grad_values, None, grad_features, None, None


_filter_of.register_autograd(_backward_of, setup_context=_setup_of)
