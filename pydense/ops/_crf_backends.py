# SPDX-License-Identifier: Apache-2.0
"""Mean field and free energy of a checked model on either backend, and what torch must know.

The lattice backend is two operators: one builds a lattice (its size depends on the data), the other
iterates on the lattices of all kernels. A lattice travels as one byte tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pydense import _library

from ._crf_autograd import run_mean_field
from ._crf_features import Model, lattices
from ._exact import ExactKernel, apply_compat, check_precision
from ._gradient import register_missing_gradient
from ._lattice_cache import is_eager
from ._memory_format import suggested
from .permutohedral import filter_with_gradient

_library.load()

# (iterations, marginals to start from, output) -> (B, L, H, W) or, for labels, (B, H, W)
MeanField = Callable[[int, Tensor | None, str], Tensor]


def mean_field(
    model: Model, feature_gradient: str = "filter", recompute: bool = False
) -> MeanField:
    """Builds what iterating needs, once. The options say how lattices are differentiated."""
    if model.backend == "exact":
        return _exact_mean_field(model)
    built = lattices(model)
    compats = [kernel.compat for kernel in model.kernels]
    tracked = [kernel.tracked for kernel in model.kernels]

    def run(iterations: int, q: Tensor | None, output: str) -> Tensor:
        return run_mean_field(
            model.unary, built, compats, iterations, model.energies, q, output,
            tracked, feature_gradient, recompute,
        )  # fmt: skip

    return run


def pairwise_message(model: Model, q: Tensor, feature_gradient: str = "filter") -> Tensor:
    """Sum of C_k (K_k q), (B, L, H, W), as a function that autograd follows."""
    if model.backend == "exact":
        return _exact_message(model, _exact_kernels(model), q)
    message = torch.zeros_like(q)
    for kernel, lattice in zip(model.kernels, lattices(model), strict=True):
        filtered = filter_with_gradient(q, lattice, kernel.tracked, False, feature_gradient)
        message = message + apply_compat(kernel.compat, filtered.flatten(2)).view(q.shape)
    return message


def free_energy(model: Model, q: Tensor) -> Tensor:
    """(B, 3) float64: sum Q log Q, sum U Q, and -sum Q C (K Q) without the 1/2."""
    if model.backend == "exact":
        return _exact_free_energy(model, q)
    result: Tensor = torch.ops.pydense.dense_crf_free_energy(
        model.unary, lattices(model), [k.compat for k in model.kernels], model.energies, q
    )
    return result


# The exact backend: torch's arithmetic around the filter, and the mean-field operator without any
# kernel for the softmax, which checks the energies and has the same bits for any number of threads.


def _exact_mean_field(model: Model) -> MeanField:
    kernels = _exact_kernels(model)
    layout = suggested(model.unary)
    logits = -model.unary if model.energies else model.unary

    def finish(z: Tensor, output: str) -> Tensor:
        z = z.contiguous(memory_format=layout)
        return run_mean_field(z, [], [], 0, False, None, output)

    def run(iterations: int, q: Tensor | None, output: str) -> Tensor:
        z = logits
        for _ in range(iterations):
            q = finish(z, "probabilities") if q is None else q
            z = logits + _exact_message(model, kernels, q)
            q = None
        return finish(z, output)

    return run


def _exact_free_energy(model: Model, q: Tensor) -> Tensor:
    def sums(unary: Tensor, energies: bool) -> Tensor:
        result: Tensor = torch.ops.pydense.dense_crf_free_energy(unary, [], [], energies, q)
        return result

    parts = sums(model.unary, model.energies)
    message = _exact_message(model, _exact_kernels(model), q)
    return torch.stack([parts[:, 0], parts[:, 1], sums(message, False)[:, 1]], 1)


def _exact_kernels(model: Model) -> list[ExactKernel]:
    kernels = []
    for kernel in model.kernels:
        features = kernel.features() if kernel.tracked is None else kernel.tracked
        # On a GPU this would wait for it.
        on_cpu = features.device.type == "cpu"
        if on_cpu and is_eager(features) and not bool(features.isfinite().all()):
            raise ValueError("dense_crf: features must be finite, got NaN or inf among them")
        skipped = check_precision("dense_crf", model.precision)
        kernels.append(
            ExactKernel(
                features.flatten(2), model.normalization, model.self_term, model.precision, skipped
            )
        )
    return kernels


def _exact_message(model: Model, kernels: list[ExactKernel], q: Tensor) -> Tensor:
    """Sum of C_k (K_k Q), (B, L, H, W)."""
    message = torch.zeros_like(q)
    for kernel, filtered in zip(model.kernels, kernels, strict=True):
        term = apply_compat(kernel.compat, filtered.filter(q.flatten(2)))
        message = message + term.view(q.shape)
    return message


def _fake_mean_field(
    unary: Tensor,
    lattices: list[Tensor],
    compats: list[Tensor],
    iterations: int,
    energies: bool,
    q: Tensor | None,
    output: str,
) -> Tensor:
    if unary.dim() != 4:
        raise ValueError(f"dense_crf_mean_field: unary must be 4-dimensional, got {unary.shape}")
    if output == "labels":
        batch, _, height, width = unary.shape
        return unary.new_empty((batch, height, width), dtype=torch.int64)
    return torch.empty_like(unary, memory_format=suggested(unary))


def _fake_free_energy(
    unary: Tensor, lattices: list[Tensor], compats: list[Tensor], energies: bool, q: Tensor
) -> Tensor:
    if unary.dim() != 4:
        raise ValueError(f"dense_crf_free_energy: unary must be 4-dimensional, got {unary.shape}")
    return unary.new_empty((unary.shape[0], 3), dtype=torch.float64)


torch.library.register_fake("pydense::dense_crf_mean_field")(_fake_mean_field)
torch.library.register_fake("pydense::dense_crf_free_energy")(_fake_free_energy)
register_missing_gradient("dense_crf_mean_field")
register_missing_gradient("dense_crf_free_energy")
