# SPDX-License-Identifier: Apache-2.0
"""What mean field minimises: the free energy of marginals, and the energy of a labelling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _crf_arguments as check
from ._crf_backends import free_energy
from ._crf_features import Model, as_picture, make_model
from ._gradient import missing_gradient
from ._lattice_cache import is_eager


class FreeEnergy(NamedTuple):
    r"""The parts of the variational free energy of marginals Q, per image, summed over its points.

    All are (N,) float64, in nats. With U = -z the unary energies and :math:`\hat K`, C as in
    ``dense_crf``:
    """

    negative_entropy: Tensor
    r""":math:`\sum Q \log Q`, with 0 log 0 = 0."""
    unary: Tensor
    r""":math:`\sum U Q`; a forbidden label adds nothing where its Q is 0."""
    pairwise: Tensor
    r""":math:`-\sum_k \sum Q\,(C_k \hat K_k Q)`: **every pair of points counted twice**."""

    @property
    def kl(self) -> Tensor:
        """``negative_entropy + unary + pairwise / 2``: KL(Q || P) up to the constant log Z.

        What mean field minimises for symmetric kernels and compatibilities. The 1/2 counts every
        pair once, as the energy of the CRF does. The updates are made in parallel for all points,
        so it need not fall in every step.
        """
        return self.negative_entropy + self.unary + self.pairwise / 2

    @property
    def pydensecrf_kl(self) -> Tensor:
        """``negative_entropy + unary + pairwise``: what pydensecrf's ``klDivergence`` returns."""
        return self.negative_entropy + self.unary + self.pairwise


def dense_crf_free_energy(
    q: Tensor,
    unary: Tensor,
    image: Tensor | None = None,
    *,
    gaussian: Mapping[str, Any] | None = None,
    bilateral: Mapping[str, Any] | None = None,
    features: Sequence[Mapping[str, Any]] = (),
    normalization: str | None = "symmetric",
    self_term: bool = True,
    backend: str = "lattice",
    unary_type: str = "logits",
) -> FreeEnergy:
    """The variational free energy of marginals ``q`` under the CRF of ``dense_crf``.

    Args:
        q: Marginals of the shape of ``unary``, usually what ``dense_crf`` returned; any floating
            dtype.
        unary: See ``dense_crf``, as for all other arguments.
        image: See ``dense_crf``.
        gaussian: See ``dense_crf``.
        bilateral: See ``dense_crf``.
        features: See ``dense_crf``.
        normalization: See ``dense_crf``.
        self_term: See ``dense_crf``. With True the constant energy of every point with itself is
            part of ``pairwise``.
        backend: See ``dense_crf``.
        unary_type: See ``dense_crf``.

    Returns:
        Its parts, per image, summed in float64 over messages of the precision of ``dense_crf``. Not
        cast to the dtype of ``unary``.

    Raises:
        ValueError: See ``dense_crf``; or ``q`` has another shape than ``unary`` or holds numbers
            that are no probabilities (not looked at under ``torch.compile`` and ``torch.export``).
        TypeError: See ``dense_crf``.
        NotImplementedError: Tensors that are not on the CPU; later, in ``backward``.

    Memory: that of one iteration of ``dense_crf``.

    Example:
        >>> import torch
        >>> from pydense.ops import dense_crf, dense_crf_free_energy
        >>> logits, model = torch.randn(1, 3, 20, 30), dict(gaussian=dict(sxy=3, compat=1))
        >>> before = dense_crf_free_energy(logits.softmax(1), logits, **model)
        >>> after = dense_crf_free_energy(dense_crf(logits, **model), logits, **model)
        >>> bool(after.kl < before.kl)
        True
    """
    op = "dense_crf_free_energy"
    model = make_model(
        op,
        unary,
        image,
        gaussian=gaussian,
        bilateral=bilateral,
        features=features,
        normalization=normalization,
        self_term=self_term,
        backend=backend,
        unary_type=unary_type,
    )
    check.floating(op, "q", q)
    if q.shape != unary.shape:
        raise ValueError(
            f"{op}: q must have the shape of unary, {check.shape(unary)}, got {check.shape(q)}"
        )
    # Where Python may look at the numbers; a traced program returns what comes out.
    if is_eager(q) and q.numel() > 0:
        lowest, highest = torch.aminmax(q.detach())
        if not (lowest >= 0 and highest <= 1.01):  # 16 bits round; False for NaN
            raise ValueError(f"{op}: q must hold probabilities, got numbers outside [0, 1] or NaN")
    return _parts(op, model, as_picture(q.to(model.unary.dtype)))


def dense_crf_energy(
    labels: Tensor,
    unary: Tensor,
    image: Tensor | None = None,
    *,
    gaussian: Mapping[str, Any] | None = None,
    bilateral: Mapping[str, Any] | None = None,
    features: Sequence[Mapping[str, Any]] = (),
    normalization: str | None = "symmetric",
    self_term: bool = True,
    backend: str = "lattice",
    unary_type: str = "logits",
) -> Tensor:
    r"""The energy of a labelling under the CRF of ``dense_crf``: -log of its probability, up to Z.

    .. math:: E(l) = \sum_i U_i(l_i) - \tfrac12 \sum_k \sum_{ij} C_k(l_i, l_j)\,\hat K_{k,ij}

    Args:
        labels: (N, *spatial), any integer dtype, from 0 to L - 1.
        unary: See ``dense_crf``, as for all other arguments.
        image: See ``dense_crf``.
        gaussian: See ``dense_crf``.
        bilateral: See ``dense_crf``.
        features: See ``dense_crf``.
        normalization: See ``dense_crf``.
        self_term: See ``dense_crf``. With True the sum includes i = j.
        backend: See ``dense_crf``.
        unary_type: See ``dense_crf``.

    Returns:
        (N,) float64: unary part plus half the pairwise part, every pair of points counted once; inf
        where a point has a forbidden label.

    Raises:
        ValueError: See ``dense_crf``; or ``labels`` has the wrong shape or is out of range (a
            RuntimeError under ``torch.compile`` and ``torch.export``).
        TypeError: See ``dense_crf``; or ``labels`` is not of an integer dtype.
        NotImplementedError: Tensors that are not on the CPU; later, in ``backward``.

    Memory: that of one iteration of ``dense_crf``, and one number per point and label.

    Example:
        >>> import torch
        >>> from pydense.ops import dense_crf, dense_crf_energy
        >>> logits, model = torch.randn(1, 3, 20, 30), dict(gaussian=dict(sxy=3, compat=2))
        >>> labels = dense_crf(logits, **model, output="labels")
        >>> before = dense_crf_energy(logits.argmax(1), logits, **model)
        >>> bool(dense_crf_energy(labels, logits, **model) < before)
        True
    """
    op = "dense_crf_energy"
    model = make_model(
        op,
        unary,
        image,
        gaussian=gaussian,
        bilateral=bilateral,
        features=features,
        normalization=normalization,
        self_term=self_term,
        backend=backend,
        unary_type=unary_type,
    )
    q = _one_hot(op, labels, unary).to(model.unary.dtype)
    parts = _parts(op, model, as_picture(q))
    return parts.unary + parts.pairwise / 2


def _parts(op: str, model: Model, q: Tensor) -> FreeEnergy:
    parts = missing_gradient(op, free_energy(model, q), model.tracked)
    return FreeEnergy(*parts.unbind(1))


def _one_hot(op: str, labels: Tensor, unary: Tensor) -> Tensor:
    """(N, L, *spatial) bool."""
    check.any_tensor(op, "labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{op}: labels must be of an integer dtype, got {labels.dtype}")
    check.on_device(op, "labels", labels, ("cpu",))
    wanted = (unary.shape[0], *unary.shape[2:])
    if tuple(labels.shape) != wanted:
        raise ValueError(f"{op}: labels must have shape {wanted}, got {check.shape(labels)}")
    count, indices = unary.shape[1], labels.long()
    # In a traced program scatter refuses them.
    if is_eager(indices) and bool(((indices < 0) | (indices >= count)).any()):
        wrong = indices[(indices < 0) | (indices >= count)][0]
        raise ValueError(f"{op}: labels must be in [0, {count - 1}], got {int(wrong)}")
    empty = torch.zeros(unary.shape, dtype=torch.bool, device=unary.device)
    return empty.scatter(1, indices.unsqueeze(1), True)
