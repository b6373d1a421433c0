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


def _cross_entropy(layout: str = "", gradient: bool = True) -> Calls:
    from torch.nn.functional import cross_entropy

    from pydense.ops import upsample_cross_entropy

    x = torch.randn(1, 19, 256, 512, device="cuda", requires_grad=gradient)
    if layout:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_(gradient)
    target = torch.randint(19, (1, 1024, 2048), device="cuda")

    def ours() -> object:
        loss = upsample_cross_entropy(x, target)
        return torch.autograd.grad(loss, x) if gradient else loss

    def theirs() -> object:
        full = torch.nn.functional.interpolate(x, (1024, 2048), mode="bilinear")
        loss = cross_entropy(full, target)
        return torch.autograd.grad(loss, x) if gradient else loss

    return Calls(ours, theirs)


CROSS_ENTROPY = "1x19x256x512 to 1024x2048"


CASES: dict[str, Callable[[], Calls]] = {
    f"cross_entropy_kernel|{CROSS_ENTROPY}": _cross_entropy,
    f"cross_entropy_finish_kernel|{CROSS_ENTROPY}": _cross_entropy,
    f"cross_entropy_kernel|{CROSS_ENTROPY}, channels last": lambda: _cross_entropy("channels last"),
    f"cross_entropy_finish_kernel|{CROSS_ENTROPY}, channels last": (
        lambda: _cross_entropy("channels last")
    ),
    f"cross_entropy_kernel|{CROSS_ENTROPY}, no gradient": lambda: _cross_entropy(gradient=False),
    f"cross_entropy_finish_kernel|{CROSS_ENTROPY}, no gradient": (
        lambda: _cross_entropy(gradient=False)
    ),
    "selftest_kernel|2^26 floats": _selftest,
}
