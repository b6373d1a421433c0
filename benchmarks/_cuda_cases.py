# SPDX-License-Identifier: Apache-2.0
"""How each CUDA kernel is reached from Python at the shape of its prediction, and its rival.

A key is ``kernel|shape`` as in ``benchmarks/cuda/counts.json``; a value makes the inputs on the GPU
and returns the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Calls(NamedTuple):
    """Calls of the same work: pydense's, and the best that torch has for it."""

    ours: Callable[[], object]
    rival: Callable[[], object] | None = None


def _selftest() -> Calls:
    x = torch.ones(1 << 26, device="cuda")
    return Calls(lambda: torch.ops.pydense._selftest(x), lambda: x * 2 + 1)


CASES: dict[str, Callable[[], Calls]] = {
    "selftest_kernel|2^26 floats": _selftest,
}
