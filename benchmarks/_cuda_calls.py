# SPDX-License-Identifier: Apache-2.0
"""What the cases of CUDA kernels share: a pair of calls, maps on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Calls(NamedTuple):
    """Calls of the same work: pydense's, the best that torch has for it, and torch.compile's."""

    ours: Callable[[], object]
    rival: Callable[[], object] | None = None
    compiled: Callable[[], object] | None = None


def pictures(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=form)
