# SPDX-License-Identifier: Apache-2.0
"""Which kernels run an atrous convolution: the rule, and its reasons in words.

It knows no size of a map: a graph that is exported for maps of any size holds one choice. Outside
of traced code ``atrous_conv2d`` leaves to torch what is too small (``_atrous_plan.py``).

On the CPU torch leaves taps beside the map out as well, where tensors are channels_last and the CPU
has instructions for their dtype; there pydense's kernels are as fast, within some percent, and
torch's stay. Contiguous tensors of large rates it multiplies with their padding, and 16-bit ones
for which the CPU has no instructions it convolves pixel by pixel where they are dilated.
In float32, Winograd's algorithm (``_winograd.py``) comes first, in either format and at any rate,
for torch multiplies all nine taps at rate 1, too.
Where the CPU multiplies pairs of bfloat16 and has no tiles (AMX) for it, torch loses time on sums
over thousands of channels, and in the gradient of every 3x3 weight; there pydense's kernels take
that part of a convolution (:func:`own_weight_gradient`).

On CUDA pydense's dense kernels are for tensor cores: bfloat16, float16, and float32 where torch
multiplies convolutions in TF32. Nothing says that cuDNN leaves taps beside the map out; where rates
are large, that is what they gain. All else is cuDNN's: float64 and full float32, strides, groups,
small rates, of which few taps lie beside the map, and few channels or outputs, of which a tile of
128 pixels and 128 outputs would be mostly empty. So far this is derived from counts alone: no GPU
has run the kernels.
Depthwise convolutions of stride 1 run pydense's kernels there where they are 3x3 or dilated.
``benchmarks/bench_atrous_conv_models.py`` measures what the rule makes of the convolutions of
published networks.
"""

from __future__ import annotations

import os
from enum import Enum
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from ._winograd import winograd_wins

# From this rate on, maps of the sizes of published networks leave out enough taps, and torch's
# kernels for contiguous tensors change to slower ones; those for 16-bit tensors later.
LEAST_RATE = 8
LEAST_RATE_NARROW = 16
LEAST_RATE_NARROW_MANY = 12  # with as many channels as this
MANY_CHANNELS = 768
# With fewer, laying out the operands takes as long as the product saves.
LEAST_CHANNELS = 128
# Undilated 3x3 convolutions in pairs of bfloat16: from so many channels on pydense's kernels are
# faster; torch loses more where it lays contiguous maps out.
LEAST_CHANNELS_DEEP = {False: 2048, True: 4096}  # by whether x is channels_last
# For the gradient of such a weight, of channels and of outputs, and of multiplications: with fewer,
# calling a kernel of one's own takes as long as it saves.
LEAST_CHANNELS_GRADIENT = 64
LEAST_PRODUCTS_GRADIENT = 2**30
# On CUDA: the smallest rate of the published pyramids, half a tile of outputs, two steps of
# channels; a kernel of 7 has up to 225 rectangles of outputs with the same taps.
LEAST_RATE_CUDA = 6
LEAST_OUTPUTS_CUDA = 64
LEAST_CHANNELS_CUDA = 64
MOST_KERNEL_CUDA = 7


class Kernels(Enum):
    """Who computes, as ``pydense.explain`` says it."""

    DEPTHWISE = "pydense's depthwise kernels"
    DENSE = "pydense's dense kernels"
    WINOGRAD = "pydense's Winograd kernels"
    TORCH = "torch's convolution"


class Call(NamedTuple):
    """What of a call the rule looks at."""

    device: str
    dtype: torch.dtype
    channels_last: bool
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


@cache
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's convolutions have instructions of this CPU for the dtype."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    ask = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(getattr(torch.ops.mkldnn, ask)())


# Asked here, so that a graph that is traced holds the answer.
NARROW_WITHOUT_INSTRUCTIONS = frozenset(
    dtype for dtype in (torch.bfloat16, torch.float16) if not torch_multiplies(dtype)
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_pairs() -> bool:
    """Whether the CPU has instructions for pairs of bfloat16, and none for tiles."""
    return str(torch.ops.pydense._cpu_capability()) == "avx512_bf16"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def tf32_is_allowed() -> bool:
    """Whether torch lets cuDNN multiply float32 convolutions in TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # convolutions and recurrent layers differ
        return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def experimental_kernels() -> bool:
    """Whether kernels may run that no GPU has shown to be faster, or right."""
    return os.environ.get("PYDENSE_EXPERIMENTAL_KERNELS") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def tf32_products_are_allowed() -> bool:
    """Whether torch lets cuBLAS multiply float32 matrices in TF32."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set through the newer names
        return bool(torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32")


def choose(call: Call) -> Choice:
    """The rule."""
    if call.device == "cuda":
        return _choose_on_cuda(call)
    if call.device != "cpu":
        return _torchs(f"x is on {call.device}, pydense's kernels are for the CPU and CUDA")
    if call.stride != (1, 1):
        return _torchs(f"its stride is {call.stride}, pydense's kernels have stride 1")
    if call.groups == call.channels == call.outputs:
        return Choice(
            Kernels.DEPTHWISE, "it is depthwise (groups = C = O) with stride 1, on the CPU"
        )
    if call.groups != 1:
        return _torchs(
            f"it is grouped (groups {call.groups}, {call.channels} channels to {call.outputs}); "
            "pydense's kernels are for groups 1, and for groups = C = O"
        )
    rate = max(d if k > 1 else 1 for d, k in zip(call.dilation, call.kernel, strict=True))
    if (
        rate == 1
        and _in_pairs_3x3(call)
        and call.channels >= LEAST_CHANNELS_DEEP[call.channels_last]
    ):
        return Choice(
            Kernels.DENSE,
            f"it is 3x3, of bfloat16, which this CPU multiplies in pairs, and of {call.channels} "
            "channels",
        )
    if rate == 1:
        return _torchs("it is not dilated")
    name = str(call.dtype).removeprefix("torch.")
    if call.dtype in NARROW_WITHOUT_INSTRUCTIONS:
        return Choice(
            Kernels.DENSE,
            f"it is dilated and of {name}, for which torch's convolution has no instructions of "
            "this CPU: pydense's kernels compute in float32",
        )
    if call.channels_last:
        return _torchs(
            "x is channels_last, where torch's kernels leave taps beside the map out, too"
        )
    least = LEAST_RATE
    if call.dtype in (torch.bfloat16, torch.float16):
        least = LEAST_RATE_NARROW_MANY if call.channels >= MANY_CHANNELS else LEAST_RATE_NARROW
    if rate < least or call.channels < LEAST_CHANNELS:
        return _torchs(
            f"it has rate {rate} and {call.channels} channels: in {name}, pydense's kernels gain "
            f"from rate {least} and {LEAST_CHANNELS} channels on"
        )
    return Choice(
        Kernels.DENSE,
        f"it has rate {rate}, {call.channels} channels and stride 1, x is contiguous and on the "
        "CPU: taps beside the map are left out",
    )


@lru_cache(maxsize=4096)
def known_choice(call: Call) -> Choice:
    """:func:`choose`, remembered; for the CPU, whose instructions stay the same."""
    return choose(call)


def own_weight_gradient(call: Call, products: int | None = None) -> str | None:
    """Why pydense's kernels make the weight's gradient whoever convolves; None where not so.

    Who makes that of x is what :func:`choose` says of it. Of calls that Winograd's algorithm and
    depthwise kernels do not serve: they have gradients of their own, as dense kernels have where
    they convolve at a rate.

    Args:
        call: As of :func:`choose`.
        products: Multiplications for the result; None where sizes are not known.
    """
    if call.device != "cpu" or call.stride != (1, 1) or call.groups != 1:
        return None
    rate = max(d if k > 1 else 1 for d, k in zip(call.dilation, call.kernel, strict=True))
    if rate > 1 or max(call.kernel) > 3:
        if call.dtype == torch.bfloat16 and choose(call).kernels is not Kernels.DENSE:
            # Seen with torch 2.13, channels_last.
            return "torch's may leave memory unwritten where taps are apart or kernels are wide"
        return None
    many = products is None or products >= LEAST_PRODUCTS_GRADIENT
    least = min(call.channels, call.outputs)
    if many and least >= LEAST_CHANNELS_GRADIENT and _in_pairs_3x3(call):
        return "this CPU multiplies bfloat16 in pairs"
    return None


def _in_pairs_3x3(call: Call) -> bool:
    """Whether pydense's kernels multiply a 3x3 in pairs of bfloat16 and torch's do no better."""
    return call.dtype == torch.bfloat16 and call.kernel == (3, 3) and multiplies_pairs()


def choose_winograd(
    call: Call, before: tuple[int, int], after: tuple[int, int], tile: int | None
) -> Choice | None:
    """Winograd's algorithm with tiles up to ``tile``, or None: what :func:`choose` says.

    Args:
        call: As of :func:`choose`.
        before: Padding above and on the left.
        after: Padding below and on the right.
        tile: 2, 3 or 4; None for none.
    """
    rate = call.dilation[0]
    same = call.dilation == before == after == (rate, rate)
    plain = call.groups == 1 and call.stride == (1, 1) and call.kernel == (3, 3)
    if tile is None or call.device != "cpu" or not (same and plain):
        return None
    wins, reason = winograd_wins(call.channels, call.outputs, rate, call.dtype, tile)
    return Choice(Kernels.WINOGRAD, reason) if wins else None


def _choose_on_cuda(call: Call) -> Choice:
    name = str(call.dtype).removeprefix("torch.")
    rate = max(d if k > 1 else 1 for d, k in zip(call.dilation, call.kernel, strict=True))
    if call.stride != (1, 1):
        return _torchs(f"its stride is {call.stride}, pydense's kernels have stride 1")
    if call.groups == call.channels == call.outputs:
        return _choose_depthwise_on_cuda(call)
    if call.groups != 1:
        return _torchs(
            f"it is grouped (groups {call.groups}, {call.channels} channels to {call.outputs}); "
            "pydense's kernels for CUDA are for groups 1, and for groups = C = O"
        )
    if call.dtype == torch.float32 and not tf32_is_allowed():
        return _torchs(
            "it is of float32 and torch.backends.cudnn does not allow TF32, in which pydense's "
            "kernels for CUDA multiply it"
        )
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return _torchs(
            f"it is of {name}; pydense's kernels for CUDA are for bfloat16, float16 and TF32"
        )
    if max(call.kernel) > MOST_KERNEL_CUDA:
        return _torchs(
            f"its kernel is {call.kernel}; pydense's kernels for CUDA are for up to "
            f"{MOST_KERNEL_CUDA} taps along an axis"
        )
    if rate < LEAST_RATE_CUDA:
        return _torchs(
            f"it has rate {rate}: pydense's kernels for CUDA gain from rate {LEAST_RATE_CUDA} on, "
            "with more taps beside the map"
        )
    if call.channels < LEAST_CHANNELS_CUDA or call.outputs < LEAST_OUTPUTS_CUDA:
        return _torchs(
            f"it has {call.channels} channels and {call.outputs} outputs: pydense's kernels for "
            f"CUDA are for {LEAST_CHANNELS_CUDA} and {LEAST_OUTPUTS_CUDA} at least"
        )
    return Choice(
        Kernels.DENSE,
        f"it is on CUDA, of {'TF32' if call.dtype == torch.float32 else name} with rate {rate}, "
        f"{call.channels} channels, {call.outputs} outputs and stride 1: taps beside the map are "
        "left out",
    )


def _choose_depthwise_on_cuda(call: Call) -> Choice:
    """Of torch, cuDNN skips no padding, and torch's own depthwise kernels read every tap."""
    if call.kernel == (3, 3):
        return Choice(
            Kernels.DEPTHWISE,
            "it is depthwise (groups = C = O), 3x3 and of stride 1, on cuda: a thread reads a row "
            "once for the three outputs that it is a tap of",
        )
    if call.dilation != (1, 1):
        return Choice(
            Kernels.DEPTHWISE,
            "it is depthwise (groups = C = O), dilated and of stride 1, on cuda: taps beside the "
            "map are left out",
        )
    return _torchs("it is depthwise, not 3x3 and not dilated, on cuda")


def _torchs(reason: str) -> Choice:
    return Choice(Kernels.TORCH, reason)
