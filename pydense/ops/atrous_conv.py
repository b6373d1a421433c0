# SPDX-License-Identifier: Apache-2.0
"""Atrous (dilated) convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn.functional import conv2d, pad

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments
from ._atrous_dispatch import (
    Call,
    Choice,
    Kernels,
    choose,
    choose_winograd,
    own_weight_gradient,
)
from ._convolution_arguments import as_convolution, padding_of, parameter
from ._memory_format import suggested
from ._winograd import TILES

_library.load()

from . import _atrous_autograd as _atrous_autograd  # noqa: E402  registers
from . import _dense_autograd as _dense_autograd  # noqa: E402  registers
from . import _mixed_autograd as _mixed_autograd  # noqa: E402  registers
from . import _winograd_autograd as _winograd_autograd  # noqa: E402  registers

ACTIVATIONS = (None, "relu")
_MAX = 2**31 - 65
_OPS = torch.ops.pydense

Pair = int | Sequence[int]


class Plan(NamedTuple):
    """A checked call, and which kernels run it."""

    bias: Tensor | None
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    before: tuple[int, int]
    """Padding above and on the left."""
    after: tuple[int, int]
    """Padding below and on the right."""
    choice: Choice
    winograd_tile: int | None
    own_gradient: str | None
    """Why the weight's gradient is pydense's whoever convolves; None where it is who convolves."""
    call: Call


def atrous_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = "same",
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    winograd_tile: int | None = 2,
) -> Tensor:
    r"""``F.conv2d``, with kernels of its own where torch's are slow, as at dilated convolutions.

    .. math:: \mathrm{out}(o, y, x) = f\Big(b_o + \sum_{c, i, j} w_{o c i j} \,
              \mathrm{in}(c, y s + i d - p, x s + j d - p)\Big)

    With stride 1 on the CPU, depthwise convolutions (``groups`` = C = O) of any rate run pydense's
    kernels, and so do those dense ones (``groups`` 1) that torch multiplies with their padding
    (contiguous, of large rates) or pixel by pixel (dilated, in a 16-bit dtype for which the CPU has
    no instructions): taps beside the map are left out, so that large rates cost less. Dense 3x3
    convolutions in float32 whose padding is the rate (1 included) run Winograd's algorithm on the
    phase grids of the rate, F(2x2, 3x3) with 16 multiplications instead of 36, where maps are large
    enough for it and channels many enough. Where the CPU multiplies pairs of bfloat16 (AVX-512 BF16
    without AMX), 3x3 convolutions of 64 channels or more have pydense's gradient of the weight and
    torch's of ``x``, and those of thousands of channels run pydense's dense kernels forward.
    bfloat16 weights that are dilated or larger than 3x3 (``groups`` 1) have pydense's gradient
    on every CPU: torch 2.13 leaves parts of theirs unwritten.
    On CUDA, dense convolutions with stride 1 and a rate of 6 or more run pydense's kernels for
    tensor cores in bfloat16, float16 and, where ``torch.backends.cudnn`` allows TF32, float32; they
    leave taps beside the map out, too; depthwise ones with stride 1 that are 3x3 or dilated run
    pydense's kernels in every dtype. All others are ``F.conv2d`` (and ``relu``), on every device.
    ``pydense.explain("atrous_conv2d", x, weight, ...)`` says which of them a call takes and why.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides; N may be 0.
        weight: (O, C / groups, kH, kW).
        bias: (O,), or None.
        stride: One number or (y, x).
        padding: One number or (y, x); ``"same"``, with stride 1, for an output of the size of
            ``x``, an odd padding having its larger part below and on the right; ``"valid"`` for 0.
        dilation: The rate; one number or (y, x).
        groups: As of ``F.conv2d``.
        activation: None, or ``"relu"`` of the result.
        winograd_tile: The largest tile of Winograd's algorithm: 2, whose error (rms) is at most
            2.5 times a direct convolution's; 3 or 4, faster, for at most 8 or 14 times it; None for
            no Winograd. On maps too small for their rate the operator leaves it by itself.

    Returns:
        (N, O, H', W'), of the dtype of ``x``, or under autocast of autocast's dtype (float64
        stays). pydense's kernels keep the memory format of ``x``; they sum in float32 for 16-bit
        tensors and round once, do not multiply padding (an infinite weight makes no NaN with it;
        Winograd's algorithm makes NaN of infinities, in all of a tile), and are bitwise the same
        for any number of threads, forward and backward; so are float32 and float64 results on every
        CPU with fused multiply-add. (Where the CPU multiplies pairs of bfloat16, dense results in
        it differ by rounding, and subnormal numbers count as 0.) What ``F.conv2d`` computes is
        torch's in all of that, also where Winograd's operator takes it.

    Raises:
        ValueError: A shape or number out of range.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: A tangent.

    Memory: pydense's depthwise kernels need the result, and per thread as many rows of a channel as
    the dilated kernel is high or, for channels_last, a copy of the weight (64 for its gradient); on
    CUDA the result alone, and up to 256 copies of the weight for its gradient.
    The dense ones need a copy of the weight and, of contiguous maps, of ``x``; for the weight's
    gradient, copies of one picture and of its gradient, and the weight in float32. Winograd's
    algorithm needs the transformed weights (16 / 9 of them; 25 / 9 or 4 times with larger tiles),
    about 16 MiB and, of contiguous maps, copies of ``x`` and of the result. The kernels for CUDA
    need a copy of ``x`` unless it is channels_last with whole vectors of 16 bytes in a pixel, one
    of the weight unless it is, and float32 sums of parts where a map is too small for the card (for
    the weight's gradient, always). Saved for backward: ``x`` where the weight requires a gradient,
    the weight where ``x`` does; the result, with an activation.

    Source: ``torch.nn.functional.conv2d``.

    Example:
        >>> import torch
        >>> from pydense.ops import atrous_conv2d
        >>> x, weight = torch.rand(1, 8, 17, 17), torch.rand(8, 1, 3, 3)
        >>> atrous_conv2d(x, weight, dilation=6, groups=8).shape
        torch.Size([1, 8, 17, 17])
    """
    return convolve(
        x, weight, bias, stride, padding, dilation, groups, activation, winograd_tile, None
    )


class WeightCache(Protocol):
    """Keeps a weight as the dense kernels read it, from call to call."""

    def get(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weight, packed in this dtype, or None."""


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    activation: str | None,
    winograd_tile: int | None,
    cache: WeightCache | None,
) -> Tensor:
    """``atrous_conv2d`` with a weight that may be packed before."""
    op = "atrous_conv2d"
    check.any_tensor(op, "x", x)
    arguments.picture(op, "x", x, (x.device.type,))
    check.any_tensor(op, "weight", weight)
    biases = [] if bias is None else [check.any_tensor(op, "bias", bias)]
    x, (row, biases) = as_convolution(x, [weight], biases)
    plan = plan_of(
        x,
        row[0],
        biases[0] if biases else None,
        stride,
        padding,
        dilation,
        groups,
        activation,
        winograd_tile,
    )
    if plan.own_gradient is not None and _trains(x, row[0]):
        return _with_mixed_gradients(x, row[0], plan, activation)
    if plan.choice.kernels is Kernels.TORCH:
        return _with_torchs(x, row[0], plan, activation)
    packed = None
    if cache is not None and plan.choice.kernels is Kernels.DENSE:
        packed = cache.get(weight, x.dtype)
    return _with_own_kernels(x, row[0], plan, activation, packed)


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
    """Checks a call and chooses its kernels; sizes of the map do not count."""
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
    choice = choose_winograd(call, before, after, winograd_tile) or choose(call)
    mixes = choice.kernels in (Kernels.TORCH, Kernels.DENSE)
    why = own_weight_gradient(call) if mixes else None
    return Plan(bias, strides, rates, groups, before, after, choice, winograd_tile, why, call)


def _trains(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight gets a gradient, and not by a functional transform."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    wrapped = _functorch.is_functorch_wrapped_tensor
    return torch.compiler.is_compiling() or not (wrapped(x) or wrapped(weight))


def _with_own_kernels(
    x: Tensor, weight: Tensor, plan: Plan, activation: str | None, packed: Tensor | None
) -> Tensor:
    relu = activation == "relu"
    geometry = _geometry(x, weight, plan)
    result: Tensor
    if plan.choice.kernels is Kernels.WINOGRAD:
        result = _OPS.winograd_atrous_conv2d(
            x, weight, plan.bias, plan.dilation[0], relu, False, plan.winograd_tile
        )
    elif plan.choice.kernels is Kernels.DEPTHWISE:
        result = _OPS.depthwise_atrous_conv2d(x, weight, plan.bias, *geometry, False, relu)
    else:
        result = _OPS.dense_atrous_conv2d(x, weight, packed, plan.bias, *geometry, False, relu)
    return result


def _geometry(x: Tensor, weight: Tensor, plan: Plan) -> list[Any]:
    """Size of the result, dilation, and padding above and on the left."""
    size = [
        size + low + high - d * (k - 1)
        for size, low, high, d, k in zip(
            x.shape[2:], plan.before, plan.after, plan.dilation, weight.shape[2:], strict=True
        )
    ]
    return [*size, *plan.dilation, *plan.before]


def _evenly_padded(x: Tensor, plan: Plan) -> Tensor:
    """With what stands below and on the right more than above and on the left."""
    if plan.before == plan.after:
        return x
    more = [high - low for low, high in zip(plan.before, plan.after, strict=True)]
    return pad(x, (0, more[1], 0, more[0]))


def _with_mixed_gradients(x: Tensor, weight: Tensor, plan: Plan, activation: str | None) -> Tensor:
    relu, geometry = activation == "relu", _geometry(x, weight, plan)
    out: Tensor = _OPS.mixed_conv2d(
        _evenly_padded(x, plan), weight, plan.bias, *geometry, False, relu
    )
    return out


def _with_torchs(x: Tensor, weight: Tensor, plan: Plan, activation: str | None) -> Tensor:
    out = conv2d(
        _evenly_padded(x, plan),
        weight,
        plan.bias,
        stride=plan.stride,
        padding=plan.before,
        dilation=plan.dilation,
        groups=plan.groups,
    )
    return out.relu_() if activation == "relu" else out


def explain_atrous_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> str:
    """What ``pydense.explain`` says."""
    plan = plan_of(x, weight, bias, **options)
    said = f"{plan.choice.kernels.value}: {plan.choice.reason}"
    if plan.own_gradient is None:
        return said
    call = plan.call
    of_x = choose(call._replace(channels=call.outputs, outputs=call.channels)).kernels
    whose = "pydense's" if of_x is Kernels.DENSE else "torch's"
    return (
        f"{said}; the gradient of the weight is pydense's ({plan.own_gradient}), that of x {whose}"
    )
