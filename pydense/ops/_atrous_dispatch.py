# SPDX-License-Identifier: Apache-2.0
"""Which kernels run an atrous convolution: the rule, and its reasons in words.

It knows no size of a map: a graph that is exported for maps of any size holds one choice. Figures
are those of ``benchmarks/bench_atrous_conv_models.py``.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

# From this rate on, on maps of the sizes of published networks, so many taps lie beside the map
# that leaving them out pays for what torch's kernels have ahead of pydense's on dense maps.
LEAST_RATE = 6
# Below, the product's operands cost as much as the product.
LEAST_CHANNELS = 64
LEAST_OUTPUTS = 16


class Kernels(Enum):
    """Who computes, as ``pydense.explain`` says it."""

    DEPTHWISE = "pydense's depthwise kernels"
    DENSE = "pydense's dense kernels"
    TORCH = "torch's convolution"


class Call(NamedTuple):
    """What of a call the rule looks at."""

    device: str
    dtype: torch.dtype
    channels: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]


class Choice(NamedTuple):
    """Kernels, and why."""

    kernels: Kernels
    reason: str


def choose(call: Call) -> Choice:
    """The rule."""
    if call.device != "cpu":
        return _torchs(f"x is on {call.device}, pydense's kernels are for the CPU so far")
    depthwise = call.groups == call.channels == call.outputs
    if call.stride != (1, 1):
        return _torchs(f"its stride is {call.stride}, pydense's kernels have stride 1")
    if depthwise:
        return Choice(
            Kernels.DEPTHWISE, "it is depthwise (groups = C = O) with stride 1, on the CPU"
        )
    if call.groups != 1:
        return _torchs(
            f"it is grouped (groups {call.groups}, {call.channels} channels to {call.outputs}); "
            "pydense's kernels are for groups 1, and for groups = C = O"
        )
    rate = _rate(call)
    if rate < LEAST_RATE:
        return _torchs(
            f"its rate is {rate}: torch's kernels are as fast below {LEAST_RATE}, where most taps "
            "read the map"
        )
    if call.channels < LEAST_CHANNELS or call.outputs < LEAST_OUTPUTS:
        return _torchs(
            f"it has {call.channels} channels and {call.outputs} outputs: torch's kernels are as "
            f"fast below {LEAST_CHANNELS} channels or {LEAST_OUTPUTS} outputs"
        )
    return Choice(
        Kernels.DENSE,
        f"it has rate {rate}, {LEAST_RATE} or more, and stride 1, on the CPU: taps beside the map "
        "are left out",
    )


def _rate(call: Call) -> int:
    """The largest distance of neighbouring taps; 1 for a kernel of one tap."""
    return max(d if k > 1 else 1 for d, k in zip(call.dilation, call.kernel, strict=True))


def _torchs(reason: str) -> Choice:
    return Choice(Kernels.TORCH, reason)
