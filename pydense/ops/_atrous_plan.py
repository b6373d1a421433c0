# SPDX-License-Identifier: Apache-2.0
"""What a call of an atrous convolution is, checked, and which kernels run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _crf_arguments as check
from . import _upsample_arguments as arguments
from ._atrous_dispatch import (
    Call,
    Choice,
    Kernels,
    choose,
    choose_winograd,
    known_choice,
    own_weight_gradient,
)
from ._convolution_arguments import padding_of, parameter
from ._memory_format import suggested
from ._operator import are_plain, is_eager, is_traced
from ._winograd import TILES, best_tile

ACTIVATIONS = (None, "relu")
_MAX = 2**31 - 65
_MOST_KNOWN = 4096

Pair = int | Sequence[int]


class Plan(NamedTuple):
    """A checked call, and which kernels run it; all pairs are (y, x)."""

    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    before: tuple[int, int]
    """Padding above and on the left."""
    uneven: tuple[int, int, int, int] | None
    """Of ``torch.nn.functional.pad``: what stands below and on the right beyond ``before``."""
    size: tuple[int, int]
    """Of the result, where the stride is 1."""
    choice: Choice
    own_gradient: str | None
    """Why the weight's gradient is pydense's whoever convolves; None where it is who convolves."""
    call: Call


def plan_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = "same",
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    winograd_tile: int | None = 2,
) -> Plan:
    """Checks a call and chooses its kernels."""
    op = "atrous_conv2d"
    strides = arguments.pair(op, "stride", stride, 1)
    rates = arguments.pair(op, "dilation", dilation, 1)
    check.integer(op, "groups", groups, 1, _MAX)
    check.choice(op, "activation", activation, ACTIVATIONS)
    if winograd_tile is not None:
        check.integer(op, "winograd_tile", winograd_tile, TILES[0], TILES[-1])
    channels = x.shape[1]
    if weight.dim() != 4 or min(weight.shape) < 1:
        raise ValueError(
            f"{op}: weight must have shape (O, C / groups, kH, kW), got {check.shape(weight)}"
        )
    outputs = weight.shape[0]
    if channels % groups or outputs % groups or weight.shape[1] != channels // groups:
        raise ValueError(
            f"{op}: weight must have shape (O, {channels} / groups, kH, kW) with O divisible by "
            f"groups = {groups}, got {check.shape(weight)}"
        )
    parameter(op, "weight", weight, x)
    if bias is not None:
        parameter(op, "bias", bias, x, (outputs,))
    reach = [d * (k - 1) for d, k in zip(rates, weight.shape[2:], strict=True)]
    before, after = padding_of(op, padding, reach, strides)
    more = [high - low for low, high in zip(before, after, strict=True)]
    height, width = (
        size + low + high - far
        for size, low, high, far in zip(x.shape[2:], before, after, reach, strict=True)
    )
    call = Call(
        x.device.type,
        x.dtype,
        suggested(x) == torch.channels_last,
        channels,
        outputs,
        groups,
        (weight.shape[2], weight.shape[3]),
        strides,
        rates,
    )
    shape = products = None
    if not is_traced() and all(type(size) is int for size in x.shape):
        shape, products = x.shape, x.shape[0] * height * width * weight.numel()
    choice, own_gradient = _decide(call, before, after, winograd_tile, shape, products)
    return Plan(
        strides,
        rates,
        groups,
        before,
        (0, more[1], 0, more[0]) if any(more) else None,
        (height, width),
        choice,
        own_gradient,
        call,
    )


def _decide(
    call: Call,
    before: tuple[int, int],
    after: tuple[int, int],
    tile: int | None,
    shape: Sequence[int] | None,
    products: int | None,
) -> tuple[Choice, str | None]:
    """``choice`` and ``own_gradient`` of a plan.

    Args:
        call: As of :func:`choose`.
        before: Padding above and on the left.
        after: Padding below and on the right.
        tile: As of :func:`choose_winograd`.
        shape: Of the picture; None where sizes are not known.
        products: As of :func:`own_weight_gradient`.
    """
    choice = choose_winograd(call, before, after, tile) or choose(call)
    if choice.kernels is Kernels.WINOGRAD and shape is not None and tile is not None:
        batch, _, height, width = shape
        rate = call.dilation[0]
        if batch > 0 and best_tile(batch, height, width, rate, tile) is None:
            small = "the map is too small for Winograd's algorithm"
            choice = choose(call)
            choice = choice._replace(reason=f"{choice.reason}, and {small}")
            if choice.kernels is Kernels.TORCH and rate > 1:
                return choice, "torch's reads all taps"
    if choice.kernels not in (Kernels.TORCH, Kernels.DENSE):
        return choice, None
    return choice, own_weight_gradient(call, products)


class KnownPlans:
    """Plans of earlier calls, by what of a call they depend on.

    Checking a call takes five microseconds in a loop, and a hundred and fifty between the layers of
    a network; looking it up, fifteen.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def key(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
    ) -> tuple[Any, ...] | None:
        """What a plan depends on, or None where it must be made anew.

        That is in code that is traced, under transforms and autocast, for what is no plain tensor
        or not on the CPU (CUDA's rule depends on settings), and for options of other types than
        usual: 1.0 would pass for a 1.
        """
        for value in options:
            kind = type(value)
            if kind is tuple:
                if not all(type(number) is int for number in value):
                    return None
            elif not (kind is int or kind is str or value is None):
                return None
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and is_eager()):
            return None
        if not are_plain((x, weight, bias)):
            return None
        if not (x.is_cpu and weight.is_cpu) or torch.is_autocast_enabled("cpu"):
            return None
        facts = (x.shape, x.stride(), x.dtype, weight.shape, weight.dtype)
        if bias is None:
            return facts, options
        if not (isinstance(bias, Tensor) and bias.is_cpu):
            return None
        return facts, options, bias.shape, bias.dtype

    def get(self, key: tuple[Any, ...] | None) -> Plan | None:
        """The plan, or None."""
        return None if key is None else self._plans.get(key)

    def keep(self, key: tuple[Any, ...] | None, plan: Plan) -> None:
        """For calls to come."""
        if key is not None:
            if len(self._plans) >= _MOST_KNOWN:
                self._plans.clear()
            self._plans[key] = plan

    def forget(self) -> None:
        """All of them: for tests that say what the CPU can do, which else stays as it is."""
        self._plans.clear()
        known_choice.cache_clear()


known_plans = KnownPlans()
