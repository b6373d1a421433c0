# SPDX-License-Identifier: Apache-2.0
"""Atrous spatial pyramid pooling in plain torch, from the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def aspp_sum(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    rates: Sequence[int],
) -> Tensor:
    """See :func:`pydense.ops.aspp_sum`."""
    branches = [
        conv2d(x, w, None if biases is None else biases[i], padding=rates[i], dilation=rates[i])
        for i, w in enumerate(weights)
    ]
    out = branches[0]
    for branch in branches[1:]:
        out = out + branch
    return out


def aspp_concat(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: Sequence[int],
    *,
    pool_weight: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor] | None = None,
    activation: str | None = None,
) -> Tensor:
    """See :func:`pydense.ops.aspp_concat`."""
    branches = [
        conv2d(x, w, padding="same", dilation=r) for w, r in zip(weights, rates, strict=True)
    ]
    if pool_weight is not None:
        pooled = conv2d(x.mean((2, 3), keepdim=True), pool_weight)
        branches.append(pooled.expand(-1, -1, *x.shape[2:]))
    for i, branch in enumerate(branches):
        if scales is not None:
            branch = branch * scales[i][:, None, None]
        if biases is not None:
            branch = branch + biases[i][:, None, None]
        branches[i] = branch.relu() if activation == "relu" else branch
    return torch.cat(branches, 1)
