# SPDX-License-Identifier: Apache-2.0
"""Loss functions of dense prediction; those that are modules are in ``pydense.nn``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pydense.ops import _crf_arguments as check
from pydense.ops._crf_backends import pairwise_message
from pydense.ops._crf_features import as_picture, make_model

__all__ = ["dense_crf_loss"]


def dense_crf_loss(
    scores: Tensor,
    image: Tensor | None = None,
    *,
    gaussian: Mapping[str, Any] | None = None,
    bilateral: Mapping[str, Any] | None = None,
    features: Sequence[Mapping[str, Any]] = (),
    mask: Tensor | None = None,
    normalization: str | None = None,
    self_term: bool = True,
    backend: str = "lattice",
    scores_type: str = "logits",
    reduction: str = "mean",
    feature_gradient: str = "filter",
) -> Tensor:
    r"""Regularised loss of a dense CRF: penalises neighbours that look alike and disagree.

    .. math:: -\sum_k \sum_l S_l^T\, (C_k \hat K_k S)_l, \qquad S = m\,\mathrm{softmax}(z)

    for weakly supervised training, beside a cross-entropy on the few labels there are. No mean
    field is run: the loss acts on the network's own probabilities.

    Args:
        scores: (N, L, H, W), (N, L, D, H, W) or (N, L, P), floating point, any strides: logits, or
            probabilities by ``scores_type``.
        image: See :func:`pydense.ops.dense_crf`, as for ``gaussian``, ``bilateral``, ``features``
            (with ``compat``, of which **positive attracts**), ``self_term`` and ``backend``.
        gaussian: ``dict(sxy=..., compat=...)``.
        bilateral: ``dict(sxy=..., srgb=..., compat=...)``. rloss uses sxy 100 and srgb 15 for
            pictures of full size, and a weight of 2e-9 for its sum.
        features: Further kernels.
        mask: (N, *spatial), any real dtype: m, 0 for points that do not count (padding, crops).
        normalization: Of the kernels; None as in rloss.
        self_term: False leaves out the constant-sum part of a point with itself.
        backend: ``"lattice"`` or ``"exact"``.
        scores_type: ``"logits"`` or ``"probabilities"`` (taken as they are).
        reduction: ``"sum"``; ``"mean"``, divided by the number N P of points; ``"none"``, a sum per
            image.
        feature_gradient: See ``dense_crf``: for an image or features that require a gradient.

    Returns:
        0-dimensional, or (N,); float32, and float64 for float64. The gradient by S is exact,
        :math:`-(C \hat K + C^T \hat K^T) S`: on the lattice, which is not quite symmetric, that is
        not :math:`-2 K S`. It has gradients of its own where the features need none.

    Raises:
        ValueError: Shapes that do not fit, no kernel, an unknown word; see ``dense_crf``.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (cuda).

    Memory: per kernel a lattice (see ``dense_crf``) and the message, like S; both and S are saved
    for backward.

    Source: M. Tang et al., *On Regularized Losses for Weakly-supervised CNN Segmentation*, ECCV
    2018 (rloss).

    Example:
        >>> import torch
        >>> from pydense.losses import dense_crf_loss
        >>> logits = torch.randn(1, 3, 20, 30, requires_grad=True)
        >>> image = torch.randint(256, (1, 3, 20, 30))
        >>> loss = dense_crf_loss(logits, image, bilateral=dict(sxy=20, srgb=15, compat=1))
        >>> loss.backward()
    """
    op = "dense_crf_loss"
    check.choice(op, "scores_type", scores_type, ("logits", "probabilities"))
    check.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    check.choice(op, "feature_gradient", feature_gradient, ("filter", "lattice"))
    if feature_gradient == "lattice" and not self_term:
        raise ValueError(f"{op}: feature_gradient must be 'filter' with self_term=False")
    model = make_model(
        op,
        scores,
        image,
        gaussian=gaussian,
        bilateral=bilateral,
        features=features,
        normalization=normalization,
        self_term=self_term,
        backend=backend,
        unary_type="logits",
        devices=check.DEVICES,
    )
    if not model.kernels:
        raise ValueError(f"{op}: gaussian, bilateral or features must be given, got none")
    s = model.unary.softmax(1) if scores_type == "logits" else model.unary
    if mask is not None:
        check.real(op, "mask", mask, (scores.device.type,))
        if mask.shape != (scores.shape[0], *scores.shape[2:]):
            wanted = (scores.shape[0], *scores.shape[2:])
            raise ValueError(f"{op}: mask must have shape {wanted}, got {check.shape(mask)}")
        s = s * as_picture(mask.unsqueeze(1)).to(s.dtype)
    with torch.autocast(s.device.type, enabled=False):
        message = pairwise_message(model, s, feature_gradient)
        # Label by label first: the bits of such a sum do not depend on the number of threads.
        loss = -(s * message).sum(1).sum(2).sum(1)
    if reduction == "none":
        return loss
    total = loss.sum()
    points = scores.shape[0] * s.shape[2] * s.shape[3]
    return total / max(points, 1) if reduction == "mean" else total
