# SPDX-License-Identifier: Apache-2.0
"""Autocast of operators that are convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_convolution(x: Tensor, *rows: Sequence[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """``x`` and sequences of parameters in autocast's dtype, as torch casts for convolutions."""
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return x, [list(row) for row in rows]
    dtype = torch.get_autocast_dtype(kind)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), [[cast(t) for t in row] for row in rows]
