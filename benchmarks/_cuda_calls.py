# SPDX-License-Identifier: Apache-2.0
"""What the cases of CUDA kernels share: a pair of calls, maps on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Calls(NamedTuple):
    """Calls of the same work: pydense's, the best that torch has for it, and torch.compile's."""

    ours: Callable[[], object]
    rival: Callable[[], object] | None = None
    compiled: Callable[[], object] | None = None
    environment: Mapping[str, str] = {}  # to be set while they are timed


# The kernels that only a switch chooses, on cards that have them.
TWIN = {"PYDENSE_EXPERIMENTAL_KERNELS": "1"}


def switched(case: Callable[[], Calls]) -> Callable[[], Calls]:
    """The case with such kernels."""
    return lambda: case()._replace(environment=TWIN)


def pictures(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=form)
