# SPDX-License-Identifier: Apache-2.0
"""Mean field of the fully connected CRF (Kraehenbuehl and Koltun, 2011) in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pydense.reference._kernel import Kernel, check_features, check_normalization, computing_dtype
from pydense.reference.exact import ExactKernel
from pydense.reference.permutohedral import PermutohedralLattice

_BACKENDS: Mapping[str, type[ExactKernel] | type[PermutohedralLattice]] = {
    "lattice": PermutohedralLattice,
    "exact": ExactKernel,
}
_UNARY_TYPES = ("logits", "probabilities", "energy")
_OUTPUTS = ("probabilities", "logits", "labels")


@dataclass(frozen=True)
class _Model:
    """Logits (N, P, L) and, per kernel, the filter and the compatibility, (), (L,) or (L, L)."""

    logits: Tensor
    terms: Sequence[tuple[Kernel, Tensor]]

    def update(self, logits: Tensor) -> Tensor:
        """One step for all points at once: logits_0 + sum_k C_k (K_k softmax(logits))."""
        q = torch.softmax(logits, dim=2)
        result = self.logits
        # Autocast would compute the product of a full matrix in 16 bits.
        with torch.autocast(logits.device.type, enabled=False):
            for kernel, compat in self.terms:
                message = kernel.filter(q)
                if compat.dim() == 2:
                    result = result + message @ compat.T
                else:
                    result = torch.addcmul(result, message, compat)
        return result


def dense_crf(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    gaussian: Mapping[str, Any] | None = None,
    bilateral: Mapping[str, Any] | None = None,
    features: Sequence[Mapping[str, Any]] = (),
    iterations: int = 10,
    normalization: str | None = "symmetric",
    self_term: bool = True,
    backend: str = "lattice",
    unary_type: str = "logits",
    output: str = "probabilities",
) -> Tensor:
    """Mean-field inference of a dense CRF.

    Repeats ``iterations`` times, for all points at once,

        logits = logits_0 + sum_k C_k (K_k softmax(logits)).

    K_k is a normalised Gaussian kernel on the features of kernel k; C_k is its label compatibility,
    which acts on the label axis: new[l] += sum_m C[l, m] (K q)[m]. **Positive attracts** in all
    three forms of it, so w, diag(w, .., w) and w I are the same.

    Args:
        unary: (N, L, H, W), (N, L, D, H, W) or, with ``features`` kernels only, (N, L, P).
            float64 is computed in float64, everything else in float32.
        image: (N or 1, channels, *spatial), any real dtype; for ``bilateral``.
        gaussian: ``sxy``, standard deviation in pixels: a number or one per axis in the order x, y,
            z; and ``compat``: a number, (L,) or (L, L). Features (x / sx, y / sy[, z / sz]).
        bilateral: ``sxy``, ``compat`` and ``srgb``, the standard deviation of the channels: a
            number or one per channel. Features (x / sx, y / sy[, z / sz], channels / s).
        features: One mapping per further kernel: ``features``, (N or 1, d, *spatial), divided by
            their standard deviations, and ``compat``.
        iterations: Number of updates; no early stop.
        normalization: "symmetric", "before", "after" or None, see :class:`Kernel`.
        self_term: False leaves each point's own value out of its messages, as in the paper.
        backend: "lattice" (permutohedral) or "exact" (brute force).
        unary_type: What ``unary`` is: "logits", "probabilities" or "energy" (negative logits).
        output: "probabilities", "logits" or "labels": the most probable, the lowest of equals.

    Returns:
        Same shape and dtype as ``unary``, contiguous; labels: int64 (N, *spatial).

    Raises:
        ValueError: A shape, a size or a name is wrong.
        TypeError: ``unary`` is not of floating-point type, or a kernel lacks an entry.
    """
    op = "dense_crf"
    model = _prepare(
        op, unary, image, gaussian, bilateral, features, normalization, self_term, backend,
        unary_type,
    )  # fmt: skip
    _check_choice(op, "output", output, _OUTPUTS)
    _check_iterations(op, iterations)
    logits = model.logits
    for _ in range(iterations):
        logits = model.update(logits)
    return _result(logits, unary, output)


def dense_crf_steps(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    gaussian: Mapping[str, Any] | None = None,
    bilateral: Mapping[str, Any] | None = None,
    features: Sequence[Mapping[str, Any]] = (),
    iterations: int | None = 10,
    normalization: str | None = "symmetric",
    self_term: bool = True,
    backend: str = "lattice",
    unary_type: str = "logits",
) -> Iterator[Tensor]:
    """The probabilities after 1, 2, 3, ... updates; see :func:`dense_crf`.

    The kernels are built once, by this call. ``iterations`` is the number of tensors; None gives
    them without end.
    """
    model = _prepare(
        "dense_crf_steps", unary, image, gaussian, bilateral, features, normalization, self_term,
        backend, unary_type,
    )  # fmt: skip

    _check_iterations("dense_crf_steps", 0 if iterations is None else iterations)

    def steps() -> Iterator[Tensor]:
        logits = model.logits
        for _ in count() if iterations is None else range(iterations):
            logits = model.update(logits)
            yield _result(logits, unary, "probabilities")

    return steps()


def _result(logits: Tensor, unary: Tensor, output: str) -> Tensor:
    if output == "labels":
        return logits.argmax(dim=2).view(unary.shape[0], *unary.shape[2:])
    values = logits if output == "logits" else torch.softmax(logits, dim=2)
    return values.transpose(1, 2).reshape(unary.shape).to(unary.dtype)


def _prepare(
    op: str,
    unary: Tensor,
    image: Tensor | None,
    gaussian: Mapping[str, Any] | None,
    bilateral: Mapping[str, Any] | None,
    features: Sequence[Mapping[str, Any]],
    normalization: str | None,
    self_term: bool,
    backend: str,
    unary_type: str,
) -> _Model:
    dtype = computing_dtype(op, "unary", unary)
    if unary.dim() < 3 or unary.shape[1] < 1:
        raise ValueError(f"{op}: unary must be (N, L, *spatial), got {tuple(unary.shape)}")
    check_normalization(op, normalization)
    _check_choice(op, "unary_type", unary_type, _UNARY_TYPES)
    _check_choice(op, "backend", backend, tuple(_BACKENDS))
    images, labels, spatial = unary.shape[0], unary.shape[1], unary.shape[2:]

    logits = unary.flatten(2).transpose(1, 2).to(dtype).contiguous()
    if unary_type == "probabilities":
        logits = logits.log()
    elif unary_type == "energy":
        logits = -logits
    if logits.numel() == 0:
        return _Model(logits, ())

    found: list[tuple[Tensor, Any]] = []
    if gaussian is not None:
        sxy, compat = _entries(op, "gaussian", gaussian, ("sxy", "compat"))
        place = _positions(op, "gaussian['sxy']", sxy, spatial, logits)
        found.append((place[None], compat))
    if bilateral is not None:
        sxy, srgb, compat = _entries(op, "bilateral", bilateral, ("sxy", "srgb", "compat"))
        if image is None:
            raise ValueError(f"{op}: image must be given for the bilateral kernel, got None")
        check_features(op, "image", image, images, spatial)
        place = _positions(op, "bilateral['sxy']", sxy, spatial, logits)
        sigmas = _sigmas(op, "bilateral['srgb']", srgb, image.shape[1], logits)
        colour = image.flatten(2).to(dtype) / sigmas[:, None]
        found.append((torch.cat([place.expand(len(colour), -1, -1), colour], dim=1), compat))
    for number, kernel in enumerate(features):
        name = f"features[{number}]"
        tensor, compat = _entries(op, name, kernel, ("features", "compat"))
        check_features(op, f"{name}['features']", tensor, images, spatial)
        found.append((tensor.flatten(2).to(dtype), compat))
    make = _BACKENDS[backend]
    terms = [
        (make(f, normalization, self_term), _compatibility(op, compat, labels, logits))
        for f, compat in found
    ]
    return _Model(logits, terms)


def _check_iterations(op: str, iterations: object) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"{op}: iterations must be an integer of at least 0, got {iterations!r}")


def _check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def _entries(op: str, name: str, kernel: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    if set(kernel) != set(keys):
        wanted = ", ".join(keys)
        raise TypeError(f"{op}: {name} must have the entries {wanted}, got {sorted(kernel)}")
    return [kernel[key] for key in keys]


def _sigmas(op: str, name: str, sigma: Any, count: int, like: Tensor) -> Tensor:
    """(count,) standard deviations from a number or ``count`` of them."""
    sigmas = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    if sigmas.dim() == 0:
        sigmas = sigmas.expand(count)
    if sigmas.shape != (count,) or not bool(((sigmas > 0) & sigmas.isfinite()).all()):
        raise ValueError(f"{op}: {name} must be positive, one or {count} numbers, got {sigma!r}")
    return sigmas


def _positions(op: str, name: str, sxy: Any, spatial: Sequence[int], like: Tensor) -> Tensor:
    """(d, P) coordinates / sigma in the order x, y, z, that is the last spatial axis first."""
    if len(spatial) < 2:
        raise ValueError(f"{op}: points have no grid: only features kernels work on (N, L, P)")
    sigmas = _sigmas(op, name, sxy, len(spatial), like)
    steps = [torch.arange(size, dtype=like.dtype, device=like.device) for size in spatial[::-1]]
    steps = [step / sigma for step, sigma in zip(steps, sigmas, strict=True)]
    grid = torch.meshgrid(*steps[::-1], indexing="ij")[::-1]
    return torch.stack(grid).flatten(1)


def _compatibility(op: str, compat: Any, labels: int, like: Tensor) -> Tensor:
    matrix = torch.as_tensor(compat, dtype=like.dtype, device=like.device)
    if matrix.dim() > 2 or any(size != labels for size in matrix.shape):
        raise ValueError(
            f"{op}: compat must be a number, ({labels},) or ({labels}, {labels}), "
            f"got the shape {tuple(matrix.shape)}"
        )
    return matrix
