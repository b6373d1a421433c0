# SPDX-License-Identifier: Apache-2.0
"""Atrous spatial pyramid pooling in plain torch, from the definition."""

from __future__ import annotations

from collections.abc import Sequence

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
