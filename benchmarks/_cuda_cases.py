# SPDX-License-Identifier: Apache-2.0
"""How each CUDA kernel is reached from Python at the shape of its prediction.

A key is ``kernel|shape`` as in ``benchmarks/cuda/counts.json``; a value makes the inputs on the GPU
and returns the call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def _selftest() -> Callable[[], object]:
    x = torch.ones(1 << 26, device="cuda")
    return lambda: torch.ops.pydense._selftest(x)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "selftest_kernel|2^26 floats": _selftest,
}
