# SPDX-License-Identifier: Apache-2.0
"""Atrous (dilated) convolution."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn.functional import conv2d, pad

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments
from ._atrous_dispatch import Kernels, choose
from ._atrous_plan import Pair, Plan, known_plans, plan_of
from ._convolution_arguments import as_convolution

_library.load()

from ._atrous_autograd import depthwise_atrous_conv2d  # noqa: E402
from ._dense_autograd import dense_atrous_conv2d  # noqa: E402
from ._mixed_autograd import mixed_conv2d  # noqa: E402
from ._winograd_autograd import winograd_atrous_conv2d  # noqa: E402


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
    without AMX), 3x3 convolutions of 64 channels or more, and of some size, have pydense's gradient
    of the weight and torch's of ``x``, and those of thousands of channels run pydense's dense
    kernels forward.
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
            no Winograd. Maps too small for their rate are convolved directly.

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
    options = (stride, padding, dilation, groups, activation, winograd_tile)
    given = weight  # what the cache knows
    key = known_plans.key(x, weight, bias, *options)
    plan = known_plans.get(key)
    if plan is None:
        x, weight, bias = _checked(x, weight, bias)
        plan = plan_of(x, weight, bias, *options)
        known_plans.keep(key, plan)
    relu = activation == "relu"
    kernels = plan.choice.kernels
    if plan.own_gradient is not None and _trains(x, weight):
        geometry = (*plan.size, *plan.dilation, *plan.before)
        return mixed_conv2d(_evenly_padded(x, plan), weight, bias, *geometry, False, relu)
    if kernels is Kernels.TORCH:
        return _with_torchs(x, weight, bias, plan, relu)
    if kernels is Kernels.WINOGRAD:
        rate = plan.dilation[0]
        return winograd_atrous_conv2d(x, weight, bias, rate, relu, False, winograd_tile)
    geometry = (*plan.size, *plan.dilation, *plan.before)
    if kernels is Kernels.DEPTHWISE:
        return depthwise_atrous_conv2d(x, weight, bias, *geometry, False, relu)
    packed = None if cache is None else cache.get(given, x.dtype)
    return dense_atrous_conv2d(x, weight, packed, bias, *geometry, False, relu)


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors, in autocast's dtype."""
    op = "atrous_conv2d"
    check.any_tensor(op, "x", x)
    arguments.picture(op, "x", x, (x.device.type,))
    check.any_tensor(op, "weight", weight)
    biases = [] if bias is None else [check.any_tensor(op, "bias", bias)]
    x, (weights, biases) = as_convolution(x, [weight], biases)
    return x, weights[0], biases[0] if biases else None


def _trains(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight gets a gradient, and not by a functional transform."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    wrapped = _functorch.is_functorch_wrapped_tensor
    return torch.compiler.is_compiling() or not (wrapped(x) or wrapped(weight))


def _evenly_padded(x: Tensor, plan: Plan) -> Tensor:
    """With what stands below and on the right more than above and on the left."""
    return x if plan.uneven is None else pad(x, plan.uneven)


def _with_torchs(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, relu: bool) -> Tensor:
    out = conv2d(
        _evenly_padded(x, plan),
        weight,
        bias,
        stride=plan.stride,
        padding=plan.before,
        dilation=plan.dilation,
        groups=plan.groups,
    )
    return out.relu_() if relu else out


def explain_atrous_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> str:
    """What ``pydense.explain`` says."""
    x, weight, bias = _checked(x, weight, bias)
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
