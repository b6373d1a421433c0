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
from ._crf_autograd import needs_gradient
from ._lattice_cache import LATTICES, is_eager
from ._memory_format import suggested


class Kernel(NamedTuple):
    """One pairwise term."""

    compat: Tensor  # (), (L,) or (L, L)
    features: Callable[[], Tensor]  # makes (B or 1, d, H, W) when asked: they need not stay
    sxy: tuple[float, ...] = ()  # of a Gaussian kernel, whose features nothing else decides
    tracked: Tensor | None = None  # the features, where autograd follows what they are made of


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
    precision: str = "accurate"  # of the exact backend

    @property
    def tracked(self) -> list[Tensor]:
        """Features that autograd follows."""
        return [kernel.tracked for kernel in self.kernels if kernel.tracked is not None]


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
    precision: str = "accurate",
) -> Model:
    """Check the arguments that all dense CRF functions share, and build the features.

    ``devices`` are those that the function has kernels for.
    """
    check.choice(op, "normalization", normalization, check.NORMALIZATIONS)
    check.backend(op, backend, precision)
    check.choice(op, "unary_type", unary_type, ("logits", "probabilities", "energy"))
    check.flag(op, "self_term", self_term)
    check.floating(op, "unary", unary, devices=devices)
    place = (unary.device.type,)
    if unary.shape[1] > check.MAX_LABELS:
        raise ValueError(
            f"{op}: unary must have at most {check.MAX_LABELS} labels, got {unary.shape[1]}"
        )
    picture = as_picture(unary)
    wide = picture.to(check.compute_dtype(unary.dtype))
    like = wide.detach()
    kernels: list[Kernel] = []
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
    for index, item in enumerate(check.sequence(op, "features", features, "dicts")):
        name = f"features[{index}]"
        term = check.kernel(op, name, item, ("features", "compat"))
        tensor = check_features(op, f"{name}['features']", term["features"], "unary", unary)
        compat = check.compatibility(op, f"{name}['compat']", term["compat"], unary.shape[1], like)
        tracked = as_picture(tensor.to(like.dtype)) if needs_gradient([tensor]) else None
        kernels.append(
            Kernel(compat, partial(_given_features, tensor, like.dtype), tracked=tracked)
        )
    if unary_type == "probabilities":
        wide = _log(wide)
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
        precision,
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
            _stream(model.unary.device),
        )
        return LATTICES.get(key, build)
    return build()


def _stream(device: torch.device) -> int:
    """Of a GPU: another stream could see a lattice before it is built, and after it is freed."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _log(p: Tensor) -> Tensor:
    """log, with a derivative of 0 instead of NaN where a label is forbidden."""
    if not needs_gradient([p]):
        return p.log()
    zero = p == 0
    return p.masked_fill(zero, 1).log().masked_fill(zero, -torch.inf)


# Standard deviations, one per axis or channel: numbers, or a tensor that autograd may follow.
_Sigmas = tuple[float, ...] | Tensor


def _sigmas(op: str, name: str, value: Any, count: int, like: Tensor) -> _Sigmas:
    if not isinstance(value, Tensor):
        return check.scales(op, name, value, count)
    tensor = check.real(op, name, value, check.DEVICES)
    if tuple(tensor.shape) not in ((), (count,)):
        raise ValueError(
            f"{op}: {name} must be a number or {count} numbers, got shape {check.shape(tensor)}"
        )
    if is_eager(tensor) and not bool(((tensor > 0) & tensor.isfinite()).all()):
        raise ValueError(f"{op}: {name} must be positive and finite, got {tensor.tolist()}")
    return tensor.to(like).expand(count)


def _gaussian(op: str, term: Any, unary: Tensor, like: Tensor) -> Kernel:
    check.kernel(op, "gaussian", term, ("sxy", "compat"))
    if unary.dim() == 3:
        raise ValueError(f"{op}: gaussian must be None for point sets: give features instead")
    sxy = _sigmas(op, "gaussian['sxy']", term["sxy"], unary.dim() - 2, like)
    labels = unary.shape[1]
    compat = check.compatibility(op, "gaussian['compat']", term["compat"], labels, like)
    if isinstance(sxy, Tensor):
        return _tracking(compat, as_picture(_positions(unary.shape[2:], sxy).unsqueeze(0)))
    return Kernel(compat, partial(_gaussian_features, tuple(unary.shape[2:]), sxy, like), sxy)


def _bilateral(op: str, term: Any, unary: Tensor, image: Tensor | None, like: Tensor) -> Kernel:
    check.kernel(op, "bilateral", term, ("sxy", "srgb", "compat"))
    if unary.dim() == 3:
        raise ValueError(f"{op}: bilateral must be None for point sets: give features instead")
    if image is None:
        raise ValueError(f"{op}: image must be given for a bilateral kernel, got None")
    axes = unary.dim() - 2
    sxy = _sigmas(op, "bilateral['sxy']", term["sxy"], axes, like)
    if axes + image.shape[1] > check.MAX_DIMS:
        raise ValueError(
            f"{op}: image must have at most {check.MAX_DIMS - axes} channels, got {image.shape[1]}"
        )
    srgb = _sigmas(op, "bilateral['srgb']", term["srgb"], image.shape[1], like)
    labels = unary.shape[1]
    compat = check.compatibility(op, "bilateral['compat']", term["compat"], labels, like)
    if needs_gradient([image]) or isinstance(sxy, Tensor) or isinstance(srgb, Tensor):
        place, shade = (s if isinstance(s, Tensor) else like.new_tensor(s) for s in (sxy, srgb))
        positions = _positions(unary.shape[2:], place).expand(image.shape[0], *[-1] * (axes + 1))
        colours = image.to(like.dtype) / shade.view(-1, *[1] * axes)
        return _tracking(compat, as_picture(torch.cat([positions, colours], 1)))
    return Kernel(compat, partial(_bilateral_features, image.detach(), sxy, srgb, like))


def _tracking(compat: Tensor, features: Tensor) -> Kernel:
    return Kernel(compat, features.detach, tracked=features if needs_gradient([features]) else None)


def _positions(spatial: Sequence[int], sigmas: Tensor) -> Tensor:
    """What ``write_positions`` writes, (d, *spatial), as a function of the standard deviations."""
    rows = []
    for row in range(len(spatial)):
        axis = len(spatial) - 1 - row
        steps = torch.arange(spatial[axis], dtype=sigmas.dtype, device=sigmas.device)
        lying = [1] * len(spatial)
        lying[axis] = spatial[axis]
        rows.append((steps / sigmas[row]).view(lying).expand(*spatial))
    return torch.stack(rows)


def _scratch(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised memory; where it is large, what kernels need next has the same pages."""
    if like.device.type == "cpu" and is_eager(like):
        result: Tensor = torch.ops.pydense._scratch(like, shape)
        return result
    return like.new_empty(shape)


def _gaussian_features(spatial: tuple[int, ...], sxy: tuple[float, ...], like: Tensor) -> Tensor:
    features = _scratch(like, (1, len(sxy), *spatial))
    write_positions(features, sxy)
    return as_picture(features)


def _bilateral_features(
    image: Tensor, sxy: tuple[float, ...], srgb: tuple[float, ...], like: Tensor
) -> Tensor:
    # Written in place: at this size every temporary counts.
    spatial = image.shape[2:]
    features = _scratch(like, (image.shape[0], len(sxy) + image.shape[1], *spatial))
    write_positions(features, sxy)
    sigmas = torch.tensor(srgb, dtype=like.dtype, device=like.device)
    features[:, len(sxy) :].copy_(image).div_(sigmas.view(-1, *[1] * len(sxy)))
    return as_picture(features)


def _given_features(features: Tensor, dtype: torch.dtype) -> Tensor:
    return as_picture(features.detach().to(dtype))
