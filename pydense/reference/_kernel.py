# SPDX-License-Identifier: Apache-2.0
"""What both filters share: normalisation, one kernel for a whole batch, shapes and types."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

NORMALIZATIONS = (None, "before", "after", "symmetric")


class Kernel(ABC):
    """A Gaussian kernel between the points of one or several images, normalised.

    With the kernel matrix K, without its diagonal if ``self_term`` is False, and n = K 1 the filter
    is K ("normalization" None), K n^-1 ("before"), n^-1 K ("after") or n^-1/2 K n^-1/2
    ("symmetric"), each of these numbers standing for a diagonal matrix.

    Attributes:
        images: Number of images B with features of their own; 1 serves any batch.
    """

    images: int

    @abstractmethod
    def _apply(self, values: Tensor, reverse: bool) -> Tensor:
        """The filter on (B, P, C) values."""

    def filter(self, values: Tensor, reverse: bool = False) -> Tensor:
        """Filters (N, P, C) values, N being any number if the kernel has one image."""
        images, points, channels = values.shape
        if images == self.images:
            return self._apply(values, reverse)
        # Points with the same features for the whole batch: the images are more channels.
        folded = values.transpose(0, 1).reshape(1, points, images * channels)
        result = self._apply(folded, reverse)
        return result.reshape(points, images, channels).transpose(0, 1)


def scales(row_sums: Tensor, normalization: str | None) -> tuple[Tensor, Tensor]:
    """Factors before and after the kernel matrix, each of the shape of ``row_sums``."""
    one = torch.ones_like(row_sums)
    if normalization == "symmetric":
        return row_sums.rsqrt(), row_sums.rsqrt()
    if normalization == "before":
        return row_sums.reciprocal(), one
    if normalization == "after":
        return one, row_sums.reciprocal()
    return one, one


def check_normalization(op: str, normalization: object) -> None:
    """Raises ValueError for an unknown normalisation."""
    if normalization not in NORMALIZATIONS:
        allowed = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"{op}: normalization must be one of {allowed}, got {normalization!r}")


def computing_dtype(op: str, name: str, tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for every other floating-point type."""
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be of floating-point type, got {tensor.dtype}")
    return torch.promote_types(tensor.dtype, torch.float32)


def filter_values(
    op: str,
    values: Tensor,
    features: Tensor,
    normalization: str | None,
    make_kernel: Callable[[Tensor], Kernel],
    reverse: bool = False,
) -> Tensor:
    """Checks the arguments of a public filter, builds its kernel and applies it.

    Args:
        op: Name of the filter, for error texts.
        values: (N, C, *spatial).
        features: (N or 1, d, *spatial).
        normalization: See :class:`Kernel`; checked here, used by ``make_kernel``.
        make_kernel: From (N or 1, d, P) features.
        reverse: The transposed filter.
    """
    check_normalization(op, normalization)
    dtype = computing_dtype(op, "values", values)
    if values.dim() < 3:
        raise ValueError(f"{op}: values must be (N, C, *spatial), got {tuple(values.shape)}")
    check_features(op, "features", features, values.shape[0], values.shape[2:])
    if values.numel() == 0:
        return torch.zeros_like(values)
    kernel = make_kernel(features.flatten(2).to(dtype))
    result = kernel.filter(values.flatten(2).transpose(1, 2).to(dtype), reverse)
    return result.transpose(1, 2).reshape(values.shape).to(values.dtype)


def check_features(
    op: str, name: str, features: Tensor, images: int, spatial: tuple[int, ...]
) -> None:
    """Raises ValueError unless features are (images or 1, d, *spatial) with d >= 1."""
    shape = tuple(features.shape)
    if len(shape) < 3 or shape[0] not in (1, images) or not shape[1] or shape[2:] != spatial:
        wanted = f"({images} or 1, d, {', '.join(map(str, spatial))}) with d >= 1"
        raise ValueError(f"{op}: {name} must have the shape {wanted}, got {shape}")
