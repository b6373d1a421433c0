# SPDX-License-Identifier: Apache-2.0
"""Bilinear upsampling: F.interpolate's, Caffe's Deconvolution + Crop, sums of upsampled maps."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pydense import _library

from . import _crf_arguments as check
from . import _upsample_arguments as arguments

_library.load()

from . import _upsample_autograd as operators  # noqa: E402  registers


def upsample_bilinear(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
) -> Tensor:
    r"""Resize pictures bilinearly, as ``F.interpolate(mode="bilinear")`` does.

    .. math:: \mathrm{out}(y) = (1 - t)\,x_i + t\,x_{i+1}, \qquad i = \lfloor s\rfloor, \; t = s - i

    along each axis, with indices held within the picture and the source coordinate s of output y

    - ``align_corners=False``: :math:`s = \max(0, (y + 1/2)\,r - 1/2)`, r = in / out or, where a
      ``scale_factor`` is given, 1 / scale_factor;
    - ``align_corners=True``: :math:`s = y\,(\mathrm{in} - 1) / (\mathrm{out} - 1)`.

    Coordinates and weights of float32 and 16-bit tensors are computed in float32 with the very
    roundings of torch's kernels on CPUs with fused multiply-add, so results differ from torch's
    only in the last bits of the sums. Up and down scaling, the latter without antialiasing filter.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides, on the CPU or a GPU
            (cuda); N may be 0.
        size: Output (height, width), or one number for both.
        scale_factor: Instead of ``size``: the output has floor(H * scale) rows, and the given
            factor enters the formula, also where H * scale is no integer. A number or (y, x).
        align_corners: See above.

    Returns:
        (N, C, height, width) of the dtype of ``x`` (under autocast too), channels_last where torch
        takes ``x`` as such, contiguous otherwise. 16-bit input is summed in float32 and rounded
        once. Bitwise the same from run to run, for any number of threads
        (``torch.set_num_threads``), and on a GPU as on CPUs with fused multiply-add; the gradient
        too where memory is contiguous (for channels_last it is summed in another order on the CPU,
        and on a GPU in the contiguous one). NaN and infinities do what w0 a + w1 b does with them;
        in backward too, but where both taps of an output are one input, their weights are added
        first.

    Raises:
        ValueError: A shape, size or scale factor out of range; both or neither of ``size`` and
            ``scale_factor``.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors on other devices; a tangent: there is no forward-mode
            derivative (``torch.func.jvp``).

    Memory: the result and, on the CPU, the taps of every row and column; a contiguous copy of a
    tensor (in backward of the gradient) whose pixels do not lie side by side, as of an expanded
    one. Nothing is saved for backward but sizes; it gathers, without atomics, and has its own
    backward, to any order. (``torch.func.grad`` and ``jacrev`` refuse operators of torch.library.)

    Source: ATen's ``upsample_bilinear2d``.

    Example:
        >>> import torch
        >>> from pydense.ops import upsample_bilinear
        >>> x = torch.tensor([[[[0.0, 4.0]]]])
        >>> upsample_bilinear(x, size=(1, 4))
        tensor([[[[0., 1., 3., 4.]]]])
    """
    op = "upsample_bilinear"
    arguments.picture(op, "x", x)
    check.flag(op, "align_corners", align_corners)
    if (size is None) == (scale_factor is None):
        raise ValueError(f"{op}: one of size and scale_factor must be given, got both or neither")
    scales = (0.0, 0.0)
    if scale_factor is None:
        height, width = arguments.size(op, "size", size)
    else:
        scales = arguments.scale_factors(op, scale_factor)
        height, width = (
            torch.sym_int(n * scale)  # type: ignore[no-untyped-call]
            for n, scale in zip(x.shape[2:], scales, strict=True)
        )
        if height < 1 or width < 1:
            raise ValueError(
                f"{op}: scale_factor must give a size of at least 1, got {scale_factor!r} for "
                f"shape {check.shape(x)}"
            )
    return operators.upsample_bilinear(x, height, width, align_corners, *scales)


def upsample_crop(
    x: Tensor,
    *,
    stride: int | Sequence[int],
    kernel_size: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    offset: float | Fraction | Sequence[float | Fraction] = 0,
    size: int | Sequence[int],
    border: str = "zeros",
) -> Tensor:
    r"""Caffe's Deconvolution with the bilinear filter, then Crop, evaluated inside the crop alone.

    This is how FCN, HED and their descendants upsample. With the bilinear filter of size k and
    stride s, where k is 2 s or 2 s - 1, an output depends on two inputs per axis:

    .. math:: s_y = \bigl(y + \mathrm{offset} + \mathrm{padding} - (k - 1) / 2\bigr) / s, \qquad
              \mathrm{out}(y) = (1 - t)\,x_i + t\,x_{i+1}, \quad i = \lfloor s_y\rfloor, \;
              t = s_y - i

    with x = 0 beyond the picture. The deconvolution's full output never exists.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, any strides, on the CPU or a GPU
            (cuda); N may be 0.
        stride: Of the deconvolution, s; a number or (y, x), as are the next three.
        kernel_size: Of the deconvolution, 2 s or 2 s - 1. With other sizes the filter's shifted
            copies do not add up to 1, and this is no interpolation: use ``F.conv_transpose2d``.
        padding: Of the deconvolution.
        offset: Of the crop; an integer as in Caffe, or any real number: ``crop_offset`` computes
            it, also for networks whose exact offset Caffe refuses. Fractions are taken exactly.
            It may be negative, and the crop may leave the deconvolution's output: what it finds
            there is the output with padding 0, which padding only shifts, and zeros around that.
        size: Output (height, width), that of the reference blob.
        border: ``"zeros"`` as Caffe, or ``"clamp"``: the picture's edge continues.

    Returns:
        (N, C, height, width), dtype, memory format and determinism as ``upsample_bilinear``.
        Which inputs an output lies between is decided in integers: exact for any size. An input
        that has no weight takes no part: it may be infinite or NaN.

    Raises:
        ValueError: A shape or number out of range; a kernel size that does not fit the stride.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors on other devices; a tangent.

    Memory: as ``upsample_bilinear``.

    Source: J. Long, E. Shelhamer, T. Darrell, *Fully Convolutional Networks for Semantic
    Segmentation*, CVPR 2015, and Caffe's layers.

    Example:
        FCN-32s on a 500 x 500 image: a 16 x 16 score map, back to the image.

        >>> import torch
        >>> from pydense.ops import upsample_crop
        >>> score = torch.randn(1, 21, 16, 16)
        >>> upsample_crop(score, stride=32, kernel_size=64, offset=19, size=(500, 500)).shape
        torch.Size([1, 21, 500, 500])
    """
    op = "upsample_crop"
    arguments.picture(op, "x", x)
    check.choice(op, "border", border, ("zeros", "clamp"))
    strides = arguments.pair(op, "stride", stride, 1)
    totals = arguments.crop_shifts(op, strides, kernel_size, padding, offset)
    height, width = arguments.size(op, "size", size)
    return operators.upsample_crop(x, height, width, *strides, *totals, border)


def fuse_sum_upsample(
    inputs: Sequence[Tensor],
    size: int | Sequence[int] | None = None,
    relu: bool = False,
    align_corners: bool = False,
    mode: str = "bilinear",
) -> Tensor:
    r"""Upsample maps of several resolutions to one size and add them, in one pass.

    .. math:: \mathrm{out} = \mathrm{act}\Bigl(\sum_k U_k x_k\Bigr)

    with :math:`U_k` the upsampling of ``F.interpolate`` to ``size`` (the identity for maps that
    have it) and act the identity or ReLU. The upsampled maps never exist. HRNet's exchange units
    are this with ``relu=True``, RefineNet's fusion blocks without.

    Args:
        inputs: 1 to 16 tensors (N, C, H_k, W_k) of one dtype (float32, float64, bfloat16, float16),
            device (the CPU or a GPU), batch and channels, any strides, in any order.
        size: Output (height, width) or a number for both; the size of the first map if left out.
        relu: Clamp the sum at 0. NaN stays NaN.
        align_corners: As in ``upsample_bilinear``; must be False for ``"nearest"``.
        mode: ``"bilinear"`` or ``"nearest"``, both as ``F.interpolate`` with a size.

    Returns:
        (N, C, height, width), dtype and determinism as ``upsample_bilinear``; memory format of the
        first map. Sums go through the maps of the output's size first, then through the others, in
        their order; 16-bit maps are summed in float32 and rounded once.

    Raises:
        ValueError: A shape, size or word out of range; maps that differ in batch, channels or
            device.
        TypeError: An argument of the wrong type or dtype; maps that differ in dtype.
        NotImplementedError: Tensors on other devices; a tangent.

    Memory: the result, on the CPU a few rows per thread, and copies as ``upsample_bilinear``, here
    also of maps in another memory format than the first one's (in backward: the result in another
    one than the gradient's). Saved for backward: with ``relu`` the result,
    else only sizes. Maps of the output's size share one gradient. On the CPU, backward makes the
    gradients of all maps in one pass over the result's gradient, on a GPU in one pass for each map
    of another size.

    Source: K. Sun et al., *Deep High-Resolution Representation Learning for Visual Recognition*,
    2019 (code: HRNet-Semantic-Segmentation); G. Lin et al., *RefineNet*, CVPR 2017.

    Example:
        >>> import torch
        >>> from pydense.ops import fuse_sum_upsample
        >>> maps = [torch.ones(1, 48, 64 >> k, 64 >> k) for k in range(4)]
        >>> y = fuse_sum_upsample(maps, relu=True)
        >>> y.shape, float(y.max())
        (torch.Size([1, 48, 64, 64]), 4.0)
    """
    op = "fuse_sum_upsample"
    maps = arguments.pictures(op, inputs)
    check.flag(op, "relu", relu)
    check.flag(op, "align_corners", align_corners)
    check.choice(op, "mode", mode, ("bilinear", "nearest"))
    if align_corners and mode == "nearest":
        raise ValueError(f"{op}: align_corners must be False for mode='nearest', got True")
    height, width = arguments.size(op, "size", tuple(maps[0].shape[2:]) if size is None else size)
    return operators.fuse_sum_upsample(maps, height, width, mode, align_corners, relu)


def bilinear_filler(
    channels: int,
    kernel_size: int | Sequence[int],
    *,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""The bilinear filter as a weight of ``nn.ConvTranspose2d(channels, channels, ...)``.

    .. math:: w_{c,c,i,j} = f(i)\,f(j), \qquad f(i) = 1 - |i - m| / \lceil k / 2\rceil, \quad
              m = \lceil k / 2\rceil - (1 \text{ for odd } k,\ 1/2 \text{ for even } k)

    and 0 between different channels: FCN's ``surgery.upsample_filt`` and, since October 2017,
    Caffe's ``bilinear`` filler. (The filler before that was shifted for k = 3, 6, 7, 63, ...)

    Args:
        channels: Of input and output.
        kernel_size: k, or (rows, columns).
        groups: 1 for the dense weight that FCN stores, ``channels`` for the depthwise one.
        dtype: torch's default if left out.
        device: torch's default if left out.

    Returns:
        (channels, channels / groups, rows, columns).

    Raises:
        ValueError: Numbers out of range, or ``groups`` that do not divide ``channels``.
        TypeError: An argument of the wrong type.

    Example:
        >>> from pydense.ops import bilinear_filler
        >>> bilinear_filler(1, (1, 4))
        tensor([[[[0.2500, 0.7500, 0.7500, 0.2500]]]])
    """
    op = "bilinear_filler"
    count = check.integer(op, "channels", channels, 1, check.MAX_LABELS)
    parts = check.integer(op, "groups", groups, 1, count)
    if count % parts:
        raise ValueError(f"{op}: groups must divide channels = {count}, got {groups}")
    rows, columns = (
        _tent(k, dtype, device) for k in arguments.pair(op, "kernel_size", kernel_size, 1)
    )
    weight: Any = torch.zeros(
        count, count // parts, len(rows), len(columns), dtype=rows.dtype, device=rows.device
    )
    own = torch.arange(count, device=rows.device)
    weight[own, own % (count // parts)] = torch.outer(rows, columns)
    filled: Tensor = weight
    return filled


def _tent(k: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    half = (k + 1) // 2
    middle = half - (1.0 if k % 2 else 0.5)
    distance = (torch.arange(k, dtype=torch.float64) - middle).abs()
    return (1 - distance / half).to(device=device, dtype=dtype or torch.get_default_dtype())
