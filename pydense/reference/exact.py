# SPDX-License-Identifier: Apache-2.0
"""The Gaussian kernel by brute force, a block of rows of the kernel matrix at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from pydense.reference._kernel import Kernel, filter_values, scales

_BLOCK = 1 << 22  # entries of the kernel matrix that are in memory at once
_FLOOR = 1e-20  # of a row sum without the point itself, which may be 0


class ExactKernel(Kernel):
    """K_ij = exp(-|f_i - f_j|^2 / 2) within each image.

    Args:
        features: (B, d, P).
        normalization: See :class:`Kernel`.
        self_term: False sets K_ii to 0.
    """

    def __init__(self, features: Tensor, normalization: str | None, self_term: bool) -> None:
        self.images = features.shape[0]
        self._features = features
        self._self_term = self_term
        self._before = self._after = features.new_ones(())
        if normalization is not None:
            row_sums = self._multiply(torch.ones_like(features[:, :1]).transpose(1, 2))
            self._before, self._after = scales(row_sums.clamp(min=_FLOOR), normalization)

    def _multiply(self, values: Tensor) -> Tensor:
        images, dims, points = self._features.shape
        height = max(1, _BLOCK // (images * points))
        blocks = []
        for start in range(0, points, height):
            rows = self._features[:, :, start : start + height]
            # Differences first: |a|^2 + |b|^2 - 2 a b would cancel away from the origin.
            squares = torch.zeros((), dtype=values.dtype, device=values.device)
            for k in range(dims):
                squares = squares + (rows[:, k, :, None] - self._features[:, k, None, :]) ** 2
            kernel = torch.exp(-0.5 * squares)
            if not self._self_term:
                here = torch.arange(start, start + rows.shape[2], device=kernel.device)
                itself = here[:, None] == torch.arange(points, device=kernel.device)
                kernel = kernel.masked_fill(itself, 0.0)
            blocks.append(kernel @ values)
        return torch.cat(blocks, dim=1)

    def _apply(self, values: Tensor, reverse: bool) -> Tensor:
        # K is symmetric: only the factors change sides.
        first, last = (self._after, self._before) if reverse else (self._before, self._after)
        return self._multiply(values * first) * last


def exact_gaussian_filter(
    values: Tensor,
    features: Tensor,
    *,
    normalization: str | None = None,
    self_term: bool = True,
) -> Tensor:
    """Filter ``values`` with the Gaussian exp(-|f_i - f_j|^2 / 2), exactly, in O(P^2).

    Args:
        values: (N, C, *spatial), P = the product of ``spatial``. float64 is computed in float64,
            everything else in float32.
        features: (N or 1, d, *spatial), divided by the standard deviations.
        normalization: None, "before", "after" or "symmetric", with the row sums of the kernel, at
            least 1e-20, as normaliser.
        self_term: False leaves out j = i, in the normaliser too.

    Returns:
        Same shape and dtype as ``values``.

    Raises:
        ValueError: A shape or ``normalization`` is wrong.
        TypeError: ``values`` is not of floating-point type.
    """
    return filter_values(
        "exact_gaussian_filter",
        values,
        features,
        normalization,
        lambda f: ExactKernel(f, normalization, self_term),
    )
