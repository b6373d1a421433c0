# SPDX-License-Identifier: Apache-2.0
"""From the arguments of the dense CRF functions to what the operators take.

The operators know (B, L, H, W) unaries and (B, d, H, W) features. Points become a picture of height
1, the slices of a volume a picture of height D * H.

Features are divided tensor by tensor in the dtype of the computation, as ``pydense.densecrf`` does:
which simplex of the lattice a pixel falls in depends on the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _crf_arguments as check
from ._lattice_cache import LATTICES, is_eager
from ._memory_format import suggested


class Kernel(NamedTuple):
    """One pairwise term."""

    compat: Tensor  # (), (L,) or (L, L)
    features: Callable[[], Tensor]  # makes (B or 1, d, H, W) when asked: they need not stay
    sxy: tuple[float, ...] = ()  # of a Gaussian kernel, whose features nothing else decides


class Model(NamedTuple):
    """Checked arguments."""

    unary: Tensor  # (B, L, H, W), float32 or float64: logits or energies
    energies: bool
    kernels: list[Kernel]
    normalization: str | None
    self_term: bool
    backend: str
    spatial: tuple[int, ...]
    dtype: torch.dtype  # of the caller
    differentiable: list[Tensor]  # inputs of the features


def make_model(
    op: str,
    unary: Tensor,
    image: Tensor | None,
    *,
    gaussian: Mapping[str, Any] | None,
    bilateral: Mapping[str, Any] | None,
    features: Sequence[Mapping[str, Any]],
    normalization: str | None,
    self_term: bool,
    backend: str,
    unary_type: str,
    devices: Sequence[str] = ("cpu",),
) -> Model:
    """Check the arguments that all dense CRF functions share, and build the features.

    ``devices`` are those that the function has kernels for with lattices.
    """
    check.choice(op, "normalization", normalization, check.NORMALIZATIONS)
    check.choice(op, "backend", backend, check.BACKENDS)
    check.choice(op, "unary_type", unary_type, ("logits", "probabilities", "energy"))
    check.flag(op, "self_term", self_term)
    check.floating(op, "unary", unary, devices=devices if backend == "lattice" else ("cpu",))
    place = (unary.device.type,)
    if unary.shape[1] > check.MAX_LABELS:
        raise ValueError(
            f"{op}: unary must have at most {check.MAX_LABELS} labels, got {unary.shape[1]}"
        )
    picture = as_picture(unary)
    wide = picture.to(check.compute_dtype(unary.dtype))
    like = wide.detach()
    kernels: list[Kernel] = []
    differentiable: list[Tensor] = []
    points = unary.dim() == 3
    if image is not None:
        check.real(op, "image", image, place)
        if points:
            raise ValueError(f"{op}: image must be None for point sets: give features instead")
        check.like_unary(op, "image", image, "unary", unary)
    if gaussian is not None:
        kernels.append(_gaussian(op, gaussian, unary, like))
    if bilateral is not None:
        kernels.append(_bilateral(op, bilateral, unary, image, like))
        differentiable += [image] if image is not None else []
    for index, item in enumerate(check.sequence(op, "features", features, "dicts")):
        name = f"features[{index}]"
        term = check.kernel(op, name, item, ("features", "compat"))
        tensor = check_features(op, f"{name}['features']", term["features"], "unary", unary)
        compat = check.compatibility(op, f"{name}['compat']", term["compat"], unary.shape[1], like)
        kernels.append(Kernel(compat, partial(_given_features, tensor, like.dtype)))
        differentiable.append(tensor)
    if unary_type == "probabilities":
        wide = wide.log()
    if wide is not picture:  # new memory, which need not be in the order of the caller's
        wide = wide.contiguous(memory_format=suggested(picture))
    return Model(
        wide,
        unary_type == "energy",
        kernels,
        normalization,
        self_term,
        backend,
        tuple(unary.shape[2:]),
        unary.dtype,
        differentiable,
    )


def check_features(op: str, name: str, value: object, other_name: str, other: Tensor) -> Tensor:
    """A tensor of features (N or 1, d, *spatial) that fits ``other``."""
    tensor = check.real(op, name, value, (other.device.type,))
    check.like_unary(op, name, tensor, other_name, other)
    if tensor.shape[1] > check.MAX_DIMS:
        raise ValueError(
            f"{op}: {name} must have at most {check.MAX_DIMS} dimensions, got {tensor.shape[1]}"
        )
    return tensor


def as_picture(x: Tensor) -> Tensor:
    """(N, C, P), (N, C, H, W) or (N, C, D, H, W) as (N, C, H, W); a view where strides allow."""
    if x.dim() == 3:
        return x.unsqueeze(2)
    return x if x.dim() == 4 else x.flatten(2, 3)


def lattices(model: Model) -> list[Tensor]:
    """The lattice of every kernel; Gaussian ones from the cache where that is possible."""
    return [_lattice(model, kernel) for kernel in model.kernels]


def write_positions(features: Tensor, sxy: Sequence[float]) -> None:
    """First channels of (B, d, *spatial): coordinates divided by ``sxy``, last axis (x) first."""
    spatial = features.shape[2:]
    sigmas = torch.tensor(sxy, dtype=features.dtype, device=features.device)
    for row in range(len(spatial)):
        axis = len(spatial) - 1 - row
        steps = torch.arange(spatial[axis], dtype=features.dtype, device=features.device)
        lying = [1] * len(spatial)
        lying[axis] = spatial[axis]
        features[:, row] = (steps / sigmas[row]).view(lying)


def _lattice(model: Model, kernel: Kernel) -> Tensor:
    def build() -> Tensor:
        result: Tensor = torch.ops.pydense.dense_crf_lattice(
            kernel.features(), model.normalization or "none", model.self_term
        )
        return result

    if kernel.sxy and is_eager(model.unary):
        key = (
            model.spatial,
            kernel.sxy,
            model.normalization,
            model.self_term,
            model.unary.dtype,
            model.unary.device,
        )
        return LATTICES.get(key, build)
    return build()


def _gaussian(op: str, term: Any, unary: Tensor, like: Tensor) -> Kernel:
    check.kernel(op, "gaussian", term, ("sxy", "compat"))
    if unary.dim() == 3:
        raise ValueError(f"{op}: gaussian must be None for point sets: give features instead")
    sxy = check.scales(op, "gaussian['sxy']", term["sxy"], unary.dim() - 2)
    labels = unary.shape[1]
    compat = check.compatibility(op, "gaussian['compat']", term["compat"], labels, like)
    return Kernel(compat, partial(_gaussian_features, tuple(unary.shape[2:]), sxy, like), sxy)


def _bilateral(op: str, term: Any, unary: Tensor, image: Tensor | None, like: Tensor) -> Kernel:
    check.kernel(op, "bilateral", term, ("sxy", "srgb", "compat"))
    if unary.dim() == 3:
        raise ValueError(f"{op}: bilateral must be None for point sets: give features instead")
    if image is None:
        raise ValueError(f"{op}: image must be given for a bilateral kernel, got None")
    sxy = check.scales(op, "bilateral['sxy']", term["sxy"], unary.dim() - 2)
    if len(sxy) + image.shape[1] > check.MAX_DIMS:
        raise ValueError(
            f"{op}: image must have at most {check.MAX_DIMS - len(sxy)} channels, "
            f"got {image.shape[1]}"
        )
    srgb = check.scales(op, "bilateral['srgb']", term["srgb"], image.shape[1])
    labels = unary.shape[1]
    compat = check.compatibility(op, "bilateral['compat']", term["compat"], labels, like)
    return Kernel(compat, partial(_bilateral_features, image.detach(), sxy, srgb, like))


def _gaussian_features(spatial: tuple[int, ...], sxy: tuple[float, ...], like: Tensor) -> Tensor:
    features = like.new_empty((1, len(sxy), *spatial))
    write_positions(features, sxy)
    return as_picture(features)


def _bilateral_features(
    image: Tensor, sxy: tuple[float, ...], srgb: tuple[float, ...], like: Tensor
) -> Tensor:
    # Written in place: at this size every temporary counts.
    spatial = image.shape[2:]
    features = like.new_empty((image.shape[0], len(sxy) + image.shape[1], *spatial))
    write_positions(features, sxy)
    sigmas = torch.tensor(srgb, dtype=like.dtype, device=like.device)
    features[:, len(sxy) :].copy_(image).div_(sigmas.view(-1, *[1] * len(sxy)))
    return as_picture(features)


def _given_features(features: Tensor, dtype: torch.dtype) -> Tensor:
    return as_picture(features.detach().to(dtype))
