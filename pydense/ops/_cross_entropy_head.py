# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of upsampled logits, without logits of full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pydense import _library

from . import _crf_arguments as check
from . import _segmentation_arguments as arguments
from ._gradient import missing_gradient
from ._memory_format import empty_picture
from ._operator import Differentiable

_library.load()


class CrossEntropy(NamedTuple):
    """A loss, and two int64 scalars that count pixels.

    ``valid`` pixels are not ignored; of these, the target of ``correct`` ones has the largest
    logit: ``correct / valid`` is the pixel accuracy.
    """

    loss: Tensor
    correct: Tensor
    valid: Tensor


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    align_corners: bool = False,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    pixel_weight: Tensor | None = None,
    return_counts: bool = False,
) -> Tensor | CrossEntropy:
    r"""Cross-entropy of bilinearly upsampled logits.

    The same as ``F.cross_entropy(F.interpolate(logits, target.shape[1:], mode="bilinear"), target,
    ...)``, forward and backward, but neither the upsampled logits nor their gradient exist. With p
    the softmax of the upsampled logits of a pixel, t its target, w the class weights, s the
    smoothing and a the pixel's weight (all weights 1 where they are not given):

    .. math:: \ell = -a\,\Bigl((1 - s)\,w_t \log p_t + \frac{s}{C} \sum_c w_c \log p_c\Bigr)

    and 0 where the pixel is ignored, whatever its logits.

    Args:
        logits: (N, C, h, w), float32, float64, float16 or bfloat16, any strides. Computed in
            float64 for float64 and in float32 otherwise, under autocast too.
        target: (N, H, W), labels from 0 to C - 1 or ``ignore_index``, of any integer dtype, any
            strides.
        size: None, or the (H, W) of the target: other sizes are refused.
        align_corners: As in ``F.interpolate``.
        weight: (C,), weights of the classes.
        ignore_index: Label of pixels that take no part.
        label_smoothing: s, from 0 to 1.
        reduction: ``"none"`` for l of each pixel; ``"sum"``; ``"mean"`` for
            :math:`\sum \ell / \sum a\,w_t` over pixels that are not ignored, torch's mean and NaN
            where all are ignored; ``"mean_all"`` for the sum divided by N H W, ignored pixels
            included, as mmsegmentation does by default.
        pixel_weight: a, (N, H, W), any strides. It may require grad with ``reduction="none"``.
        return_counts: Also count the pixels whose target has the largest logit (ties count), which
            costs next to nothing.

    Returns:
        The loss, () or (N, H, W), float64 for float64 logits and float32 otherwise; with
        ``return_counts`` a :class:`CrossEntropy`. Safe for logits of any finite magnitude. Bitwise
        the same from run to run and for any number of threads, and so is the gradient.

    Raises:
        ValueError: Shapes or devices that do not fit, a target on the CPU that is no class and not
            ignored, an unknown ``reduction``.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (cuda), weights that
            require grad, forward-mode differentiation; later, a second derivative.

    On a GPU nothing waits for the kernels, so that calls can be captured in a CUDA graph. Hence a
    target that is no class and not ignored raises nothing there: the pixel's loss is NaN, and with
    it the scalar losses and the gradients of the logits that the pixel lies between.

    Memory: with a scalar loss the forward pass computes the gradient as well, in the same pass,
    unless the logits need none: one float32 (float64) tensor of the shape and memory format of the
    logits, which is what is saved for backward. ``reduction="none"`` saves logits, target and
    weight, and computes again in backward. Beside that, on the CPU up to about 1 MB per thread
    (C <= 150; more where the size shrinks much), and on a GPU a part of the gradient that tiles
    share: a tenth to a third of it on large maps, up to about three times it on small ones.

    Source: the mean over all pixels is that of mmsegmentation's ``CrossEntropyLoss``; the formula
    is torch's.

    Example:
        >>> import torch
        >>> from pydense.ops import upsample_cross_entropy
        >>> logits = torch.zeros(1, 4, 3, 3, requires_grad=True)
        >>> target = torch.randint(4, (1, 12, 12), dtype=torch.uint8)
        >>> loss = upsample_cross_entropy(logits, target, ignore_index=255)
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad.shape  # log 4
        (1.3863, torch.Size([1, 4, 3, 3]))
    """
    op = "upsample_cross_entropy"
    scores = arguments.logits(op, logits)
    labels = arguments.target(op, target, scores)
    if size is not None and arguments.size(op, size) != tuple(labels.shape[1:]):
        raise ValueError(
            f"{op}: size must be None or that of the target, {check.shape(labels)[1:]}, got {size}"
        )
    check.flag(op, "align_corners", align_corners)
    check.flag(op, "return_counts", return_counts)
    check.choice(op, "reduction", reduction, arguments.REDUCTIONS)
    ignored = check.integer(
        op, "ignore_index", ignore_index, -arguments.MAX_INDEX, arguments.MAX_INDEX
    )
    smoothing = arguments.probability(op, "label_smoothing", label_smoothing)
    if weight is not None:
        weight = arguments.constant(op, "weight", weight, (scores.shape[1],), scores)
    factor = None
    if pixel_weight is not None and reduction == "none":
        factor = check.real(op, "pixel_weight", pixel_weight, arguments.DEVICES)
        pixel_weight = None
        if factor.shape != labels.shape:
            raise ValueError(
                f"{op}: pixel_weight must have shape {check.shape(labels)}, got "
                f"{check.shape(factor)}"
            )
    elif pixel_weight is not None:
        pixel_weight = arguments.constant(op, "pixel_weight", pixel_weight, labels.shape, scores)
    gradient = reduction != "none" and scores.requires_grad and torch.is_grad_enabled()
    loss, _, _, counts = _cross_entropy(
        scores,
        labels,
        weight,
        pixel_weight,
        align_corners,
        ignored,
        smoothing,
        reduction,
        gradient,
        return_counts,
    )
    if factor is not None:
        # 0 where the pixel is ignored, whatever its weight.
        loss = loss * factor.to(loss.dtype).where(arguments.differs(labels, ignored), 0)
    return CrossEntropy(loss, counts[0], counts[1]) if return_counts else loss


# ---- fakes ----


def _fake_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    align_corners: bool,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    gradient: bool,
    count_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = check.compute_dtype(logits.dtype)
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    if gradient:
        falls = empty_picture(logits, logits.shape[2], logits.shape[3], dtype)
    else:
        falls = logits.new_empty((0,), dtype=dtype)
    scale = logits.new_empty((), dtype=torch.float64)
    return loss, falls, scale, logits.new_empty((2,), dtype=torch.int64)


torch.library.register_fake("pydense::upsample_cross_entropy")(_fake_cross_entropy)


# ---- autograd ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight = inputs[:3]
    _, gradient, scale, counts = output
    ctx.set_materialize_grads(False)
    # The scale, whose derivative is 0, is what a second derivative meets in backward; the loss, if
    # it were saved for that, could not be changed in place.
    ctx.mark_non_differentiable(gradient, counts)
    ctx.dtype = logits.dtype
    ctx.arguments = inputs[4:7]
    ctx.per_pixel, ctx.has_gradient = inputs[7] == "none", inputs[8]
    if ctx.per_pixel:
        ctx.save_for_backward(logits, target, weight)
    else:
        ctx.save_for_backward(gradient, scale)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    none = (None,) * 9
    if grad is None or not ctx.needs_input_grad[0]:
        return None, *none
    if ctx.per_pixel:
        source, target, weight = ctx.saved_tensors
        falls = _cross_entropy(source, target, weight, grad, *ctx.arguments, "sum", True, False)[1]
    elif ctx.has_gradient:
        falls, source = ctx.saved_tensors
        falls = falls * (grad * source.detach()).to(falls.dtype)
    else:
        raise RuntimeError(
            "pydense::upsample_cross_entropy: gradient must be True where logits require grad, "
            "got False"
        )
    # What depends on the logits here is out of autograd's sight: tell it.
    name = "upsample_cross_entropy's second derivative"
    return missing_gradient(name, falls.to(ctx.dtype), (source, grad)), *none


_cross_entropy: Differentiable[tuple[Tensor, ...]] = Differentiable(
    "upsample_cross_entropy", _setup, _backward
)


# ---- FLOP ----


@register_flop_formula(torch.ops.pydense.upsample_cross_entropy)
def _flops_cross_entropy(
    logits: Sequence[int], target: Sequence[int], *rest: Any, out_shape: Any = None, **__: Any
) -> int:
    """Per class and pixel 3 for the interpolation, 1 for exp, 1 for the sum, 4 for the gradient."""
    gradient = bool(rest[6]) if len(rest) > 6 else False
    return logits[0] * logits[1] * target[1] * target[2] * (9 if gradient else 5)
