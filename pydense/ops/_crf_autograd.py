# SPDX-License-Identifier: Apache-2.0
"""What torch has to know to train through the mean field on lattices: fakes and derivatives.

Three operators: the forward pass that keeps Q_0 to Q_(T - 1); the walk back over them, which
filters once per kernel and step with the blur's axes in reversed order; and, where features need a
gradient, the derivative of a bilinear form a^T K(f) b by f for every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pydense import _library

from ._forward_ad import refuse_tangent
from ._gradient import register_missing_gradient
from ._memory_format import suggested

_library.load()

_OPS = torch.ops.pydense


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd follows one of these now."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def run_mean_field(
    unary: Tensor,
    lattices: Sequence[Tensor],
    compats: Sequence[Tensor],
    iterations: int,
    energies: bool,
    q: Tensor | None,
    output: str,
    tracked: Sequence[Tensor | None] = (),
    feature_gradient: str = "filter",
    recompute: bool = False,
) -> Tensor:
    """The mean-field operator that fits: the one that keeps marginals only where they are needed.

    ``tracked`` are the features that the lattices were built from, None where they are constants.
    """
    result: Tensor
    followed = output != "labels" and needs_gradient([unary, q, *compats, *tracked])
    if followed:
        features = [unary.new_empty(0) if x is None else x for x in tracked]
        # An exported program is for inference, most often: it should not keep what it never uses.
        recompute = recompute or torch.compiler.is_exporting()
        result, _ = _OPS.dense_crf_mean_field_training(
            unary, lattices, compats, features, iterations, energies, q, output,
            feature_gradient, recompute,
        )  # fmt: skip
        return result
    result = _OPS.dense_crf_mean_field(unary, lattices, compats, iterations, energies, q, output)
    return result


def _row_values(labels: int) -> int:
    """Values in a row of marginals, as the kernels pad them."""
    if labels <= 4:
        return 2 if labels <= 2 else 4
    return (labels + 7) // 8 * 8 if labels <= 32 else (labels + 15) // 16 * 16


def _fake_training(
    unary: Tensor,
    lattices: list[Tensor],
    compats: list[Tensor],
    features: list[Tensor],
    iterations: int,
    energies: bool,
    q: Tensor | None,
    output: str,
    feature_gradient: str,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    batch, labels, height, width = unary.shape
    kept = (batch, 0 if recompute else iterations, height * width, _row_values(labels))
    return torch.empty_like(unary, memory_format=suggested(unary)), unary.new_empty(kept)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    unary, lattices, compats, features, iterations, energies, q, kind, mode, recompute = inputs
    result, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # else zeros of the size of all marginals, for nobody
    ctx.options = iterations, energies, kind, mode
    ctx.count = len(lattices)
    ctx.from_q = q is not None
    ctx.channels_last = suggested(unary) == torch.channels_last
    again = recompute and iterations > 0
    ctx.save_for_backward(
        unary if again else None,
        q if again else None,
        result if kind == "probabilities" else None,
        kept,
        *lattices,
        *compats,
        *features,
    )


def _backward(ctx: Any, grad: Tensor | None, _kept: Tensor | None) -> tuple[Any, ...]:
    count = ctx.count
    if grad is None:
        tracked = [None] * len(ctx.needs_input_grad[3] or [])
        return None, [None] * count, [None] * count, tracked, *[None] * 6
    refuse_tangent("dense_crf (backward)", "grad", grad)
    iterations, energies, _, mode = ctx.options
    unary, q, result, kept, *lists = ctx.saved_tensors
    lattices, compats, features = (lists[i * count : (i + 1) * count] for i in range(3))
    needed_features = list(ctx.needs_input_grad[3]) or [False] * count
    grad_unary, grad_q, steps, again, *grad_compats = _OPS.dense_crf_mean_field_backward(
        grad, unary, result, kept, lattices, compats, iterations, energies, q, ctx.from_q,
        ctx.channels_last, any(needed_features),
    )  # fmt: skip
    marginals = kept if kept.shape[1] == iterations else again
    grad_features = [
        _feature_gradient(grad, marginals, steps, lattices[k], compats[k], features[k], mode)
        if needed
        else None
        for k, needed in enumerate(needed_features)
    ]
    need = ctx.needs_input_grad
    return (
        grad_unary if need[0] else None,
        [None] * count,
        [g if n else None for g, n in zip(grad_compats, need[2], strict=True)],
        grad_features if features else [],
        None,
        None,
        grad_q if ctx.from_q and need[6] else None,
        *[None] * 3,
    )


def _feature_gradient(
    like: Tensor,
    marginals: Tensor,
    steps: Tensor,
    lattice: Tensor,
    compat: Tensor,
    features: Tensor,
    mode: str,
) -> Tensor:
    batch, labels, height, width = like.shape
    total = torch.zeros_like(features)
    for t in range(marginals.shape[1]):
        one, other = (
            rows[:, t].view(batch, height, width, -1)[..., :labels].permute(0, 3, 1, 2)
            for rows in (steps, marginals)
        )
        total = total + _OPS.dense_crf_feature_gradient(features, lattice, one, other, compat, mode)
    return total


def _fake_backward(
    grad: Tensor,
    unary: Tensor | None,
    result: Tensor | None,
    kept: Tensor,
    lattices: list[Tensor],
    compats: list[Tensor],
    iterations: int,
    energies: bool,
    q: Tensor | None,
    from_q: bool,
    channels_last: bool,
    keep: bool,
) -> list[Tensor]:
    form = torch.channels_last if channels_last else torch.contiguous_format
    batch, labels, height, width = grad.shape
    rows = (batch, iterations, height * width, _row_values(labels))
    again = iterations > 0 and kept.shape[1] == 0
    nothing = (0,)

    def picture() -> Tensor:
        return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=form)

    return [
        picture(),
        picture() if from_q else grad.new_empty(nothing),
        grad.new_empty(rows if keep else nothing),
        grad.new_empty(rows if keep and again else nothing),
        *[compat.new_empty(compat.shape) for compat in compats],
    ]


torch.library.register_fake("pydense::dense_crf_mean_field_training")(_fake_training)
torch.library.register_fake("pydense::dense_crf_mean_field_backward")(_fake_backward)
torch.library.register_autograd(
    "pydense::dense_crf_mean_field_training", _backward, setup_context=_setup
)
register_missing_gradient("dense_crf_mean_field_backward")


def _fake_feature_gradient(
    features: Tensor, lattice: Tensor, a: Tensor, b: Tensor, compat: Tensor | None, mode: str
) -> Tensor:
    return features.new_empty(features.shape)


torch.library.register_fake("pydense::dense_crf_feature_gradient")(_fake_feature_gradient)
register_missing_gradient("dense_crf_feature_gradient")
