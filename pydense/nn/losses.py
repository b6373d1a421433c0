# SPDX-License-Identifier: Apache-2.0
"""Losses of segmentation networks on logits of low resolution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pydense.ops import CrossEntropy
from pydense.ops import _crf_arguments as check
from pydense.ops import _segmentation_arguments as arguments

from ._operators import UsesOperators


class _UpsampledLoss(UsesOperators, nn.Module):
    """What the losses share: the weights of the classes and of the outputs."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | Sequence[float] | None,
        ignore_index: int,
        align_corners: bool,
        output_weights: Sequence[float] | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if weight is not None:
            weight = _class_weights(op, weight)
            if weight.dim() != 1:
                raise ValueError(f"{op}: weight must have shape (C,), got {check.shape(weight)}")
        self.register_buffer("weight", weight, persistent=False)
        check.flag(op, "align_corners", align_corners)
        if output_weights is not None:
            output_weights = _output_weights(op, output_weights)
        self.ignore_index = check.integer(
            op, "ignore_index", ignore_index, -arguments.MAX_INDEX, arguments.MAX_INDEX
        )
        self.align_corners = align_corners
        self.output_weights = output_weights

    def _outputs(self, outputs: Tensor | Sequence[Tensor]) -> list[tuple[float, Tensor]]:
        """Outputs with their weights, the last being the main one."""
        op = type(self).__name__
        row = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        weights = (1.0,) if self.output_weights is None else self.output_weights
        if len(row) != len(weights):
            raise ValueError(
                f"{op}: outputs must be {len(weights)}, one for each output weight, got {len(row)}"
            )
        return list(zip(weights, row, strict=True))

    def _cross_entropy(self, logits: Tensor, target: Tensor, **options: Any) -> Any:
        return self.operators.upsample_cross_entropy(
            logits,
            target,
            align_corners=self.align_corners,
            ignore_index=self.ignore_index,
            **options,
        )

    def extra_repr(self) -> str:
        """The arguments of the constructor that are no tensors."""
        parts = [f"ignore_index={self.ignore_index}", f"align_corners={self.align_corners}"]
        if self.output_weights is not None:
            parts.append(f"output_weights={self.output_weights}")
        return ", ".join(parts)


class SegmentationLoss(_UpsampledLoss):
    """Cross-entropy of logits that are upsampled to the size of the labels, for one or more heads.

    The sum over the outputs of ``output_weights[i] * upsample_cross_entropy(outputs[i], target)``:
    ``output_weights=(0.4, 1)`` is HRNet's OCR loss (auxiliary output first), and ``(0.5, 1)`` with
    the outputs in the order (aux, out) that of torchvision's reference training.

    Args:
        weight: Weights of the classes, or None.
        ignore_index: Label of pixels that take no part.
        align_corners: As in ``F.interpolate``.
        label_smoothing: From 0 to 1.
        reduction: ``"mean"``, ``"mean_all"`` or ``"sum"``, see
            :func:`pydense.ops.upsample_cross_entropy`.
        output_weights: One number for each output; None for a single output.

    Shape:
        - outputs: (N, C, h, w), or a sequence of such, each of any size.
        - target: (N, H, W), any integer dtype.
        - pixel_weight: (N, H, W) or None.
        - result: ().

    Raises:
        ValueError: In the constructor or the call, see ``upsample_cross_entropy``.
        TypeError: In the constructor or the call, see there.

    Memory: for each output that needs a gradient, one float32 tensor of its size.

    Example:
        >>> import torch
        >>> from pydense.nn import SegmentationLoss
        >>> loss = SegmentationLoss(ignore_index=255, output_weights=(0.4, 1.0))
        >>> auxiliary, main = torch.zeros(2, 19, 8, 8), torch.zeros(2, 19, 16, 16)
        >>> target = torch.randint(19, (2, 64, 64), dtype=torch.uint8)
        >>> round(loss((auxiliary, main), target).item(), 4)  # 1.4 log 19
        4.1222
    """

    def __init__(
        self,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        align_corners: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        output_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, align_corners, output_weights)
        op = type(self).__name__
        self.label_smoothing = arguments.probability(op, "label_smoothing", label_smoothing)
        check.choice(op, "reduction", reduction, arguments.REDUCTIONS[1:])
        self.reduction = reduction

    def forward(
        self,
        outputs: Tensor | Sequence[Tensor],
        target: Tensor,
        pixel_weight: Tensor | None = None,
        return_counts: bool = False,
    ) -> Tensor | CrossEntropy:
        """The loss; with ``return_counts`` also the counts of the last output."""
        terms: list[Tensor] = []
        for factor, logits in self._outputs(outputs):
            loss, correct, valid = self._cross_entropy(
                logits,
                target,
                weight=self.weight,
                label_smoothing=self.label_smoothing,
                reduction=self.reduction,
                pixel_weight=pixel_weight,
                return_counts=True,
            )
            terms.append(loss * factor)
        total = _sum(terms)
        return CrossEntropy(total, correct, valid) if return_counts else total

    def extra_repr(self) -> str:
        """The arguments of the constructor that are no tensors."""
        own = f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
        return f"{super().extra_repr()}, {own}"


class OhemCrossEntropy(_UpsampledLoss):
    r"""Cross-entropy of the hard pixels alone (online hard example mining).

    With :math:`p_i` the probability of pixel i's target among the n pixels that are not ignored,
    and :math:`p_{(k)}` the k-th smallest of them counted from 0, the pixels below a limit are kept.

    ``definition="hrnet"``, ``OhemCrossEntropy`` of HRNet-Semantic-Segmentation:

    .. math:: \mathrm{limit} = \max\bigl(p_{(\min(\mathrm{min\_kept},\,n - 1))},\,
              \mathrm{threshold}\bigr)

    and the loss is the plain mean of the class-weighted cross-entropies of the kept pixels. It is
    NaN, with gradient 0, where none is kept.

    ``definition="mmseg"``, ``OHEMPixelSampler`` of mmsegmentation with its ``CrossEntropyLoss``:
    ``min_kept`` counts per image (it is multiplied with N), ``threshold=None`` keeps the
    ``N * min_kept`` pixels of the largest losses instead, and the sum of the kept losses is divided
    by the number of **all** pixels, or with ``avg_non_ignore`` by the number of those that are not
    ignored. Class weights do not enter the divisor (releases before 1.0; later ones divide by the
    weights' sum).

    Args:
        threshold: Probability; 0.7 is HRNet's default, 0.9 its configurations' value. None, for
            "mmseg" alone: see above.
        min_kept: Number of pixels, at least 1.
        weight: Weights of the classes, or None.
        ignore_index: Label of pixels that take no part.
        align_corners: As in ``F.interpolate``.
        definition: "hrnet" or "mmseg".
        avg_non_ignore: For "mmseg" alone.
        output_weights: One number for each output; None for a single output. Mining is for the last
            output ("hrnet"), and the others have the sum of the class-weighted cross-entropies
            divided by the number of all pixels, ignored ones included, as in HRNet's OCR; or each
            is mined by itself, as mmsegmentation's heads ("mmseg").

    Shape:
        - outputs: (N, C, h, w), or a sequence of such, each of any size.
        - target: (N, H, W), any integer dtype.
        - result: ().

    Raises:
        ValueError: In the constructor or the call, see ``upsample_cross_entropy``.
        TypeError: In the constructor or the call, see there.

    Memory: neither logits nor probabilities of full resolution, but a few maps of the size of the
    target (losses, masks, what ``torch.topk`` works on), and per output one float32 tensor of its
    size, which is saved for backward.

    Source: K. Sun et al., *High-Resolution Representations for Labeling Pixels and Regions* and its
    code, ``lib/core/criterion.py``; mmsegmentation, ``ohem_pixel_sampler.py``; A. Shrivastava,
    A. Gupta, R. Girshick, *Training Region-based Object Detectors with Online Hard Example
    Mining*, CVPR 2016.

    Example:
        >>> import torch
        >>> from pydense.nn import OhemCrossEntropy
        >>> loss = OhemCrossEntropy(threshold=0.9, min_kept=1000, ignore_index=255)
        >>> logits = torch.randn(2, 19, 16, 16, requires_grad=True)
        >>> target = torch.randint(19, (2, 64, 64), dtype=torch.uint8)
        >>> loss(logits, target).backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 16, 16])
    """

    def __init__(
        self,
        threshold: float | None = 0.7,
        min_kept: int = 100000,
        weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        align_corners: bool = False,
        definition: str = "hrnet",
        avg_non_ignore: bool = False,
        output_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(weight, ignore_index, align_corners, output_weights)
        op = type(self).__name__
        check.choice(op, "definition", definition, ("hrnet", "mmseg"))
        check.flag(op, "avg_non_ignore", avg_non_ignore)
        if threshold is not None:
            threshold = arguments.probability(op, "threshold", threshold)
        elif definition == "hrnet":
            raise ValueError(f"{op}: threshold must be a number with definition 'hrnet', got None")
        if avg_non_ignore and definition == "hrnet":
            raise ValueError(f"{op}: avg_non_ignore must be False with definition 'hrnet'")
        self.threshold = threshold
        self.min_kept = check.integer(op, "min_kept", min_kept, 1, 2**62)
        self.definition = definition
        self.avg_non_ignore = avg_non_ignore

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss; see the class."""
        rows = self._outputs(outputs)
        terms: list[Tensor] = []
        for index, (factor, logits) in enumerate(rows):
            if self.definition == "hrnet" and index + 1 < len(rows):
                loss = self._cross_entropy(logits, target, weight=self.weight, reduction="mean_all")
            else:
                loss = self._mined(logits, target)
            terms.append(factor * loss)
        return _sum(terms)

    def _mined(self, logits: Tensor, target: Tensor) -> Tensor:
        target = arguments.target(type(self).__name__, target, logits)
        kept, valid = self._keep(logits.detach(), target)
        loss: Tensor = self._cross_entropy(
            logits, target, weight=self.weight, reduction="sum", pixel_weight=kept
        )
        if self.definition == "hrnet":
            count = kept.sum(dtype=torch.float64)
            # 0 / 0 where nothing is kept, without reaching the gradient.
            return (loss / count.clamp(min=1) + 0 / count).to(loss.dtype)
        # mmsegmentation adds an epsilon to the count: 0 where all pixels are ignored.
        return loss / (valid.sum().clamp(min=1) if self.avg_non_ignore else target.numel())

    def _keep(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which pixels are kept (1 or 0), and which are not ignored."""
        valid = arguments.differs(target, self.ignore_index)
        weight = self.weight if self.threshold is None else None
        loss = self._cross_entropy(logits, target, weight=weight, reduction="none")
        if target.numel() == 0:
            return loss, valid
        count = self.min_kept * (target.shape[0] if self.definition == "mmseg" else 1)
        if self.threshold is None:
            loss.masked_fill_(~valid, -torch.inf)
            chosen = loss.flatten().topk(min(count, loss.numel()), sorted=False).indices
            kept = loss.zero_().flatten().scatter_(0, chosen, 1.0).view(target.shape)
            return kept.mul_(valid), valid
        # Ignored pixels are last in the order, as 2: above every limit.
        probability = loss.neg_().exp_().masked_fill_(~valid, 2)
        smallest = probability.flatten().topk(
            min(count + 1, probability.numel()), largest=False, sorted=False
        )
        lowest = smallest.values.where(smallest.values < 2, -1).max()
        return probability.lt_(lowest.clamp(min=self.threshold)), valid

    def extra_repr(self) -> str:
        """The arguments of the constructor that are no tensors."""
        own = f"threshold={self.threshold}, min_kept={self.min_kept}"
        own += f", definition={self.definition!r}"
        if self.definition == "mmseg":
            own += f", avg_non_ignore={self.avg_non_ignore}"
        return f"{own}, {super().extra_repr()}"


def _class_weights(op: str, weight: Any) -> Tensor:
    """A tensor of its own, float64 where that was given and float32 otherwise."""
    try:
        found = torch.as_tensor(weight).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{op}: weight must be a tensor or a sequence of numbers, got {check.kind(weight)}"
        ) from None
    if found.is_complex():
        raise TypeError(f"{op}: weight must hold real numbers, got {found.dtype}")
    given = isinstance(weight, Tensor) and weight.dtype == torch.float64
    return found.to(torch.float64 if given else torch.float32, copy=True)


def _output_weights(op: str, weights: Any) -> tuple[float, ...]:
    """At least one number, as floats."""
    row: list[Any] = list(weights) if isinstance(weights, Iterable) else [None]
    if any(isinstance(x, bool) or not isinstance(x, Real) for x in row):
        raise TypeError(
            f"{op}: output_weights must be a sequence of numbers, got {check.kind(weights)}"
        )
    if not row:
        raise ValueError(f"{op}: output_weights must hold at least one number, got none")
    return tuple(float(factor) for factor in row)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
