# SPDX-License-Identifier: Apache-2.0
"""What ends a segmentation network in inference: argmax, softmax and sums of sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pydense import _library

from . import _crf_arguments as check
from . import _segmentation_arguments as arguments
from ._gradient import missing_gradient, register_missing_gradient
from ._memory_format import empty_picture

_library.load()

_LABELS = {torch.int64: "int64", torch.int32: "int32", torch.uint8: "uint8"}
_NAMES = {name: dtype for dtype, name in _LABELS.items()}


class Prediction(NamedTuple):
    """Labels and how sure they are, both (N, H, W)."""

    labels: Tensor
    confidence: Tensor


def upsample_argmax(
    logits: Tensor,
    size: int | Sequence[int],
    align_corners: bool = False,
    *,
    dtype: torch.dtype = torch.int64,
    return_confidence: bool = False,
) -> Tensor | Prediction:
    """Labels of bilinearly upsampled logits.

    The same as ``F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    .argmax(1)``, but the upsampled logits do not exist: where the four taps of a pixel have one and
    the same argmax, so has the pixel, and elsewhere the classes are compared in registers.

    Args:
        logits: (N, C, h, w), float32, float64, float16 or bfloat16, any strides. 16-bit logits are
            interpolated in float32, not rounded to 16 bits in between.
        size: (H, W) of the labels, or one number for both.
        align_corners: As in ``F.interpolate``.
        dtype: torch.int64, torch.int32 or torch.uint8 (for up to 256 classes).
        return_confidence: Also return the softmax of the label; every pixel is then computed.

    Returns:
        Labels (N, H, W), contiguous. They are torch's wherever the two largest upsampled logits of
        a pixel differ by more than the rounding of an interpolation (float32: about 1e-6 of the
        logits); equal logits give the first class. NaN counts as largest, as in ``torch.argmax``,
        and infinities follow the formula of the interpolation (0 * inf is NaN).

        With ``return_confidence`` a :class:`Prediction`, whose ``confidence`` is float32 (float64
        for float64 logits) and differentiable nowhere.

        Bitwise the same from run to run and for any number of threads. A GPU's labels are those of
        the CPU but for the rounding above.

    Raises:
        ValueError: A size that is not positive, more classes than ``dtype`` holds.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (CUDA).

    Memory: the result, and on the CPU up to 700 KB per thread (C <= 150, no downsampling). Nothing
    is saved for backward.

    Example:
        >>> import torch
        >>> from pydense.ops import upsample_argmax
        >>> logits = torch.tensor([[[[4.0, 0.0]], [[0.0, 2.0]]]])  # two classes, two pixels
        >>> upsample_argmax(logits, (1, 8))
        tensor([[[0, 0, 0, 0, 0, 1, 1, 1]]])
    """
    op = "upsample_argmax"
    scores = arguments.logits(op, logits)
    height, width = arguments.size(op, size)
    check.flag(op, "align_corners", align_corners)
    check.flag(op, "return_confidence", return_confidence)
    if dtype not in _LABELS:
        raise ValueError(
            f"{op}: dtype must be torch.int64, torch.int32 or torch.uint8, got {dtype}"
        )
    if dtype == torch.uint8 and scores.shape[1] > 256:
        raise ValueError(f"{op}: dtype must hold {scores.shape[1]} classes, got torch.uint8")
    labels, confidence = torch.ops.pydense.upsample_argmax(
        scores.detach(), height, width, align_corners, _LABELS[dtype], return_confidence
    )
    return Prediction(labels, confidence) if return_confidence else labels


def upsample_softmax(
    logits: Tensor, size: int | Sequence[int], align_corners: bool = False
) -> Tensor:
    """Softmax of bilinearly upsampled logits, written once.

    The same as ``F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    .softmax(1)``, forward and backward, but the upsampled logits do not exist.

    Args:
        logits: (N, C, h, w), float32, float64, float16 or bfloat16, any strides. Computed in
            float64 for float64 and in float32 otherwise; only the result is rounded to 16 bits.
        size: (H, W), or one number for both.
        align_corners: As in ``F.interpolate``.

    Returns:
        (N, C, H, W) of the dtype and memory format of ``logits`` (channels_last is kept,
        everything else becomes contiguous). Safe for logits of any finite magnitude. Bitwise the
        same from run to run and for any number of threads, and so is the gradient.

    Raises:
        ValueError: A size that is not positive.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (CUDA), forward-mode
            differentiation; later, a second derivative.

    Probabilities below 1e-30 (float64: 1e-300) may be 0. On the CPU logits are multiplied with
    log2(e) before they are interpolated, so that large ones (1e4) have a few times the rounding
    error of torch.

    Memory: the result, and on the CPU up to about 1 MB per thread (C <= 150; more where the size
    shrinks much). Backward needs the logits, which are saved, and computes the softmax again; the
    result need not be kept. On a GPU backward also takes about twice the size of the logits in
    float32 (float64 for float64).

    Example:
        >>> import torch
        >>> from pydense.ops import upsample_softmax
        >>> upsample_softmax(torch.zeros(1, 4, 2, 3), (8, 12)).unique()
        tensor([0.2500])
    """
    op = "upsample_softmax"
    scores = arguments.logits(op, logits)
    height, width = arguments.size(op, size)
    check.flag(op, "align_corners", align_corners)
    result: Tensor = torch.ops.pydense.upsample_softmax(scores, height, width, align_corners)
    return result


def upsample_accumulate(
    dst: Tensor,
    logits: Tensor,
    y0: int,
    x0: int,
    size: int | Sequence[int],
    align_corners: bool = False,
    *,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Add bilinearly upsampled logits of a sliding window to a map, in place.

    ``dst[:, :, y0:y0 + H, x0:x0 + W] += weight * F.interpolate(logits, (H, W), mode="bilinear")``:
    nothing of the window's size is allocated, and nothing outside it is touched.

    Args:
        dst: (N, C, height, width), float32 (float64 for float64 logits), positive strides from
            which it can be seen that no two elements are one; its range in memory is apart from
            those of ``logits`` and ``weight``. Sums over many windows are not kept in 16 bits.
        logits: (N, C, h, w) of the window, float32, float64, float16 or bfloat16, any strides.
        y0: First row of the window.
        x0: First column of the window.
        size: (H, W) of the window, or one number for both; it lies within ``dst``.
        align_corners: As in ``F.interpolate``.
        weight: A number or (H, W), for example high in the middle of a window.

    Returns:
        ``dst``.

    Raises:
        ValueError: Shapes or devices that do not fit, a window that is not inside ``dst``.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (CUDA), or that
            require grad, forward-mode differentiation.

    Memory: on the CPU up to about 1 MB per thread (C <= 150; more where the size shrinks much).

    Example:
        >>> import torch
        >>> from pydense.ops import upsample_accumulate
        >>> total = torch.zeros(1, 2, 4, 6)
        >>> for x0 in (0, 2):
        ...     total = upsample_accumulate(total, torch.ones(1, 2, 2, 2), 0, x0, (4, 4))
        >>> total[0, 0, 0]
        tensor([1., 1., 2., 2., 1., 1.])
    """
    op = "upsample_accumulate"
    scores = arguments.logits(op, logits)
    height, width = arguments.size(op, size)
    check.flag(op, "align_corners", align_corners)
    total = check.floating(op, "dst", dst, (4,), arguments.DEVICES)
    arguments.same_device(op, "dst", total, scores)
    dtype = check.compute_dtype(scores.dtype)
    if total.dtype != dtype:
        raise TypeError(f"{op}: dst must be of dtype {dtype}, got {total.dtype}")
    if total.shape[:2] != scores.shape[:2]:
        raise ValueError(
            f"{op}: dst must have shape (N, C, height, width) with N, C = "
            f"{check.shape(scores)[:2]}, got {check.shape(total)}"
        )
    corner: list[int] = []
    for name, first, length, whole in (
        ("y0", y0, height, total.shape[2]),
        ("x0", x0, width, total.shape[3]),
    ):
        start = arguments.whole_number(op, name, first)
        if start < 0 or start + length > whole:
            raise ValueError(
                f"{op}: {name} must leave the window of {length} inside dst's {whole}, got {first}"
            )
        corner.append(start)
    if isinstance(weight, Tensor):
        factor = arguments.constant(op, "weight", weight, (height, width), scores)
    elif isinstance(weight, Real) and not isinstance(weight, bool):
        factor = torch.full((), float(weight), dtype=dtype, device=scores.device)
        factor = factor.expand(height, width)
    else:
        raise TypeError(f"{op}: weight must be a number or a tensor, got {check.kind(weight)}")
    if torch.is_grad_enabled() and (total.requires_grad or scores.requires_grad):
        raise NotImplementedError(
            f"{op}: dst and logits must not require grad: run under torch.no_grad()"
        )
    torch.ops.pydense.upsample_accumulate(
        total, scores, *corner, height, width, align_corners, factor
    )
    return total


# ---- fakes ----


def _fake_argmax(
    logits: Tensor, height: int, width: int, align_corners: bool, dtype: str, confidence: bool
) -> tuple[Tensor, Tensor]:
    images = logits.shape[0]
    labels = logits.new_empty((images, height, width), dtype=_NAMES[dtype])
    sure = (images if confidence else 0, height, width)
    return labels, logits.new_empty(sure, dtype=check.compute_dtype(logits.dtype))


def _fake_softmax(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return empty_picture(logits, height, width, logits.dtype)


def _fake_softmax_backward(gradient: Tensor, logits: Tensor, align_corners: bool) -> Tensor:
    dtype = check.compute_dtype(logits.dtype)
    return empty_picture(logits, logits.shape[2], logits.shape[3], dtype)


def _fake_accumulate(
    dst: Tensor,
    logits: Tensor,
    y0: int,
    x0: int,
    height: int,
    width: int,
    align_corners: bool,
    weight: Tensor,
) -> None:
    return None


torch.library.register_fake("pydense::upsample_argmax")(_fake_argmax)
torch.library.register_fake("pydense::upsample_softmax")(_fake_softmax)
torch.library.register_fake("pydense::upsample_softmax_backward")(_fake_softmax_backward)
torch.library.register_fake("pydense::upsample_accumulate")(_fake_accumulate)


# ---- in place ----

# Registrations live as long as this does.
_IN_PLACE = torch.library.Library("pydense", "IMPL")  # type: ignore[no-untyped-call]


def _accumulate_in_place(keys: Any, dst: Tensor, *rest: Any) -> None:
    """Tell autograd that ``dst`` has changed, as torch's own operators do at this dispatch key."""
    torch.autograd.graph.increment_version(dst)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.pydense.upsample_accumulate.default.redispatch(
            keys & torch._C._after_ADInplaceOrView_keyset, dst, *rest
        )


_IN_PLACE.impl(  # type: ignore[no-untyped-call]
    "upsample_accumulate", _accumulate_in_place, "ADInplaceOrView", with_keyset=True
)


# ---- autograd ----


def _setup_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, _, ctx.align_corners = inputs
    ctx.save_for_backward(logits)


def _backward_softmax(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (logits,) = ctx.saved_tensors
    falls = torch.ops.pydense.upsample_softmax_backward(
        grad.detach(), logits.detach(), ctx.align_corners
    )
    name = "upsample_softmax's second derivative"
    return missing_gradient(name, falls.to(logits.dtype), (logits, grad)), None, None, None


torch.library.register_autograd(
    "pydense::upsample_softmax", _backward_softmax, setup_context=_setup_softmax
)
register_missing_gradient("upsample_softmax_backward")


# ---- FLOP ----


@register_flop_formula(torch.ops.pydense.upsample_argmax)
def _flops_argmax(
    logits: Sequence[int], height: int, width: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Per class and pixel 3 for the interpolation and 1 for the comparison."""
    return logits[0] * logits[1] * height * width * 4


@register_flop_formula(torch.ops.pydense.upsample_softmax)
def _flops_softmax(
    logits: Sequence[int], height: int, width: int, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Per class and pixel 3 for the interpolation, 1 for exp, 1 for the sum, 1 for the quotient."""
    return logits[0] * logits[1] * height * width * 6


@register_flop_formula(torch.ops.pydense.upsample_softmax_backward)
def _flops_softmax_backward(
    gradient: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Per class and pixel 5 for the softmax, 4 for its derivative, 4 for the way to the source."""
    return gradient[0] * gradient[1] * gradient[2] * gradient[3] * 13


@register_flop_formula(torch.ops.pydense.upsample_accumulate)
def _flops_accumulate(
    dst: Sequence[int],
    logits: Sequence[int],
    y0: int,
    x0: int,
    height: int,
    width: int,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """Per class and pixel 3 for the interpolation and 2 for the weighted sum."""
    return logits[0] * logits[1] * height * width * 5
