# SPDX-License-Identifier: Apache-2.0
"""Depthwise-separable atrous convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments
from ._atrous_dispatch import (
    LEAST_CHANNELS_CUDA,
    LEAST_OUTPUTS_CUDA,
    experimental_kernels,
    tf32_products_are_allowed,
)
from ._atrous_plan import ACTIVATIONS, Pair
from ._convolution_arguments import as_convolution, padding_of, parameter
from ._memory_format import suggested

_library.load()

from . import _separable_autograd as operators  # noqa: E402  registers
from ._atrous_autograd import depthwise_atrous_conv2d  # noqa: E402


def atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    *,
    dilation: Pair = 1,
    padding: Pair | str = "same",
    inner_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""A depthwise and a 1x1 convolution in one pass, as those of DeepLab v3+ with stride 1.

    .. math:: \mathrm{out} = g\left(b' + w' \, f(b + w *_d x)\right)

    where :math:`*_d` is the depthwise convolution with this rate, :math:`w'` the matrix of the 1x1
    convolution, and f and g are ReLU or nothing. Batch normalisation behind either of the two is a
    factor of its weight and a bias (:func:`torch.nn.utils.fusion.fuse_conv_bn_weights`).

    On the CPU, the map between the two convolutions is never in memory: a tile of it goes from the
    sums of the taps into the operand of the matrix product. On a GPU it is: pydense's depthwise
    kernel writes it (with its bias and activation), and the product is torch's (cuBLAS). A kernel
    of one pass is there, too, for tensor cores; counted instructions say that it is no faster, so
    that it runs with ``PYDENSE_EXPERIMENTAL_KERNELS=1`` alone: where no gradient is wanted, for
    3x3, 64 channels or more, 64 to 256 outputs, and bfloat16, float16, or float32 that
    ``torch.backends.cuda.matmul`` multiplies in TF32. ``pydense.explain("atrous_separable_conv2d",
    ...)`` says which. Taps beside the map are left out, so that large rates cost less.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides; N may be 0.
        depthwise_weight: (C, 1, kH, kW).
        pointwise_weight: (O, C, 1, 1).
        depthwise_bias: (C,), or None.
        pointwise_bias: (O,), or None.
        dilation: The rate of the depthwise convolution; one number or (y, x).
        padding: As of :func:`pydense.ops.atrous_conv2d`.
        inner_activation: None, or ``"relu"`` between the convolutions.
        activation: None, or ``"relu"`` of the result.

    Returns:
        (N, O, H', W'), of the memory format of ``x`` and its dtype, or under autocast of autocast's
        dtype (float64 stays). 16-bit tensors are summed in float32, which the map between the
        convolutions stays, and rounded once; but on CPUs that multiply pairs of bfloat16 (AVX-512
        BF16), it is rounded to that, as torch's own is. Padding is not multiplied (an infinite
        depthwise weight makes no NaN with it). The forward pass is bitwise the same for any number
        of threads and both memory formats, and so are float32, float64 and float16 on every CPU
        with fused multiply-add. Backward, the depthwise gradients have the same promises; the
        products of the 1x1 convolution are torch's, which are bitwise the same from run to run at
        a fixed number of threads. On a GPU the map between the convolutions is of the dtype of
        ``x``, as torch's own is; the one pass there has the same bits in every run and both memory
        formats.

    Raises:
        ValueError: A shape or number out of range.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: A tensor that is neither on the CPU nor on a CUDA device; a tangent.

    Memory: the result and a copy of the weights; per thread a tile, about 1 MB for 256 outputs.
    Backward computes the map between the convolutions again, and needs it and its gradient in
    memory. Saved for backward: ``x``, the weights and ``depthwise_bias``; the result, with an
    activation. On a GPU, also the map between the convolutions where a gradient needs it; the one
    pass there needs float32 sums of parts where a map is too small for the card.

    Source: L.-C. Chen et al., *Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation*, ECCV 2018.

    Example:
        >>> import torch
        >>> from pydense.ops import atrous_separable_conv2d
        >>> x, weight, matrix = torch.rand(1, 8, 17, 17), torch.rand(8, 1, 3, 3), torch.rand(4, 8)
        >>> atrous_separable_conv2d(x, weight, matrix[:, :, None, None], dilation=6).shape
        torch.Size([1, 4, 17, 17])
    """
    op = "atrous_separable_conv2d"
    arguments.picture(op, "x", x)
    named = {"depthwise_weight": depthwise_weight, "pointwise_weight": pointwise_weight}
    biases = {"depthwise_bias": depthwise_bias, "pointwise_bias": pointwise_bias}
    named.update({name: bias for name, bias in biases.items() if bias is not None})
    for name, tensor in named.items():
        check.any_tensor(op, name, tensor)
    x, (row,) = as_convolution(x, list(named.values()))
    named = dict(zip(named, row, strict=True))
    _check_parameters(op, x, named)
    rates = arguments.pair(op, "dilation", dilation, 1)
    for name, value in (("inner_activation", inner_activation), ("activation", activation)):
        check.choice(op, name, value, ACTIVATIONS)
    kernel = named["depthwise_weight"].shape[2:]
    reach = [d * (k - 1) for d, k in zip(rates, kernel, strict=True)]
    before, after = padding_of(op, padding, reach, (1, 1))
    height, width = (
        size + low + high - r
        for size, low, high, r in zip(x.shape[2:], before, after, reach, strict=True)
    )
    geometry = (height, width, *rates, *before)
    relus = (inner_activation == "relu", activation == "relu")
    if in_two_because(x, *named.values()) is not None:
        return _in_two(x, named, geometry, relus)
    return operators.atrous_separable_conv2d(
        x,
        named["depthwise_weight"],
        named.get("depthwise_bias"),
        named["pointwise_weight"],
        named.get("pointwise_bias"),
        *geometry,
        *relus,
    )


def explain_atrous_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *biases: Tensor | None,
    **options: Any,
) -> str:
    """What ``pydense.explain`` says; the arguments are checked when they are used."""
    arguments.picture("atrous_separable_conv2d", "x", x)
    reason = in_two_because(x, depthwise_weight, pointwise_weight, *biases)
    if reason is not None:
        return (
            "pydense's depthwise kernels, then torch's product, the map between them in memory: "
            f"{reason}"
        )
    if x.device.type == "cpu":
        return "pydense's kernels: x is on the CPU, both convolutions in one pass"
    return (
        "pydense's kernels: x is on cuda, no gradient is wanted, and tensor cores multiply what is "
        "made of the taps in the same pass"
    )


# On CUDA, the one pass makes the map between again for every 256 outputs.
_MOST_OUTPUTS_CUDA = 256


def in_two_because(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *biases: Tensor | None
) -> str | None:
    """The rule: why on a GPU it is a kernel and a product; None for one pass."""
    if x.device.type == "cpu":
        return None
    if not experimental_kernels():
        return (
            "x is on cuda, where one pass is predicted to be no faster "
            "(PYDENSE_EXPERIMENTAL_KERNELS=1 switches it on)"
        )
    given = [depthwise_weight, pointwise_weight, *(b for b in biases if b is not None)]
    x, _ = as_convolution(x, given)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *given)):
        return "x is on cuda, and a gradient needs the map between the convolutions"
    if x.dtype == torch.float32 and not tf32_products_are_allowed():
        return (
            "x is on cuda, of float32, and torch.backends.cuda.matmul does not allow TF32, in "
            "which the one pass multiplies it"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "x is on cuda, where the one pass is for bfloat16, float16 and TF32"
    kernel, outputs = tuple(depthwise_weight.shape[2:]), pointwise_weight.shape[0]
    if kernel != (3, 3):
        return f"x is on cuda, where the one pass is for kernels of 3x3, and this one is {kernel}"
    fits = LEAST_OUTPUTS_CUDA <= outputs <= _MOST_OUTPUTS_CUDA
    if not fits or x.shape[1] < LEAST_CHANNELS_CUDA:
        return (
            f"x is on cuda with {x.shape[1]} channels to {outputs} outputs, where the one pass is "
            f"for {LEAST_CHANNELS_CUDA} channels at least and {LEAST_OUTPUTS_CUDA} to "
            f"{_MOST_OUTPUTS_CUDA} outputs"
        )
    return None


def _in_two(
    x: Tensor, named: dict[str, Tensor], geometry: tuple[Any, ...], relus: tuple[bool, bool]
) -> Tensor:
    """On a GPU: the depthwise kernel, and a product of torch's in the memory format of ``x``.

    A product, not torch's convolution: cuDNN may add with atomics and round float32 to TF32.
    """
    inner = depthwise_atrous_conv2d(
        x, named["depthwise_weight"], named.get("depthwise_bias"), *geometry, False, relus[0]
    )
    matrix, bias = named["pointwise_weight"].flatten(1), named.get("pointwise_bias")
    if suggested(inner) == torch.channels_last:
        out = torch.nn.functional.linear(inner.movedim(1, -1), matrix, bias).movedim(-1, 1)
    else:
        batch, _, height, width = inner.shape
        each = matrix.expand(batch, -1, -1)
        if bias is None:
            out = torch.bmm(each, inner.flatten(2))
        else:
            out = torch.baddbmm(bias[:, None], each, inner.flatten(2))
        out = out.view(batch, matrix.shape[0], height, width)
    return out.relu_() if relus[1] else out


def _check_parameters(op: str, x: Tensor, named: dict[str, Tensor]) -> None:
    channels = x.shape[1]
    depthwise, pointwise = named["depthwise_weight"], named["pointwise_weight"]
    if (
        depthwise.dim() != 4
        or tuple(depthwise.shape[:2]) != (channels, 1)
        or min(depthwise.shape) < 1
    ):
        raise ValueError(
            f"{op}: depthwise_weight must have shape ({channels}, 1, kH, kW), "
            f"got {check.shape(depthwise)}"
        )
    if (
        pointwise.dim() != 4
        or tuple(pointwise.shape[1:]) != (channels, 1, 1)
        or pointwise.shape[0] < 1
    ):
        raise ValueError(
            f"{op}: pointwise_weight must have shape (O, {channels}, 1, 1), "
            f"got {check.shape(pointwise)}"
        )
    sizes = {"depthwise_bias": channels, "pointwise_bias": pointwise.shape[0]}
    for name, tensor in named.items():
        parameter(op, name, tensor, x, (sizes[name],) if name in sizes else None)
