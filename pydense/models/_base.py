# SPDX-License-Identifier: Apache-2.0
"""What all segmentation models share."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.batchnorm import _BatchNorm

from pydense.nn import use_operators
from pydense.nn._operators import UsesOperators
from pydense.ops import _crf_arguments as check

_Model = TypeVar("_Model", bound=nn.Module)
_MAX_CHANNELS = 2**20


class Frame(NamedTuple):
    """How logits of low resolution lie over the input.

    They are upsampled bilinearly to ``size``; the input is what begins at ``offset`` there, or all
    of it where that is None.
    """

    size: tuple[int, int]
    align_corners: bool = False
    offset: tuple[int, int] | None = None


class SegmentationModel(UsesOperators, nn.Module):
    """A network that gives each pixel of a picture a logit for each class.

    A family defines :meth:`features` and :meth:`forward_low`; and :meth:`forward_outputs` with
    ``output_weights`` where it is trained on several outputs, :meth:`frame` and :meth:`upsample`
    where its logits are not simply upsampled to the size of the input. Its constructor ends with
    ``self._finish(reference)``.

    Args:
        num_classes: Number of logits for each pixel.
        features_only: :meth:`forward` returns :meth:`features`, and what only logits need does not
            exist.

    Attributes:
        feature_channels: Channels of each map of :meth:`features`, by name.
        align_corners: Of the upsampling of the logits.
        output_weights: Weights of the outputs' losses, the main output last.
        frozen_norm: Batch normalisation keeps its statistics in training, as nets that are trained
            from others with small batches have it. Its weight and bias still get gradients. An
            argument of every network that has any, with the published default; False for one that
            is trained from weights at random, whose statistics are still of nothing.
    """

    align_corners: bool = False
    output_weights: tuple[float, ...] = (1.0,)
    frozen_norm: bool = False
    feature_channels: Mapping[str, int]
    _head: ClassVar[tuple[str, ...]] = ()
    """Names of the children that only logits need."""

    def __init__(self, num_classes: int, features_only: bool = False) -> None:
        super().__init__()
        op = type(self).__name__
        self.num_classes = check.integer(op, "num_classes", num_classes, 1, _MAX_CHANNELS)
        check.flag(op, "features_only", features_only)
        self.features_only = features_only
        self.feature_channels = {}

    def _finish(
        self,
        reference: bool,
        frozen_norm: bool | None = None,
        norm_momentum: float | None = None,
    ) -> None:
        """Ends every constructor: what all networks do with their arguments."""
        op = type(self).__name__
        check.flag(op, "reference", reference)
        if frozen_norm is not None:
            check.flag(op, "frozen_norm", frozen_norm)
            self.frozen_norm = frozen_norm
        if norm_momentum is not None:
            set_norm_momentum(op, self, norm_momentum)
        if self.features_only:
            for name in self._head:
                self._modules.pop(name, None)
        use_operators(self, "reference" if reference else "pydense")

    @property
    def out_channels(self) -> int | list[int]:
        """Channels of the feature maps: one number where all are alike, as detectors want it."""
        channels = list(self.feature_channels.values())
        return channels[0] if len(set(channels)) == 1 else channels

    def features(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """The maps that a detector takes, finest first."""
        raise NotImplementedError(f"{type(self).__name__}: no features are defined")

    def forward_low(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes, h, w) of the network's own resolution; see :meth:`frame`."""
        raise NotImplementedError(f"{type(self).__name__}: no logits are defined")

    def forward_outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the losses are of, low resolution, the main output last."""
        return (self.forward_low(x),)

    def frame(self, low: Tensor, size: tuple[int, int]) -> Frame:
        """How ``low`` lies over an input of ``size``."""
        return Frame(size, self.align_corners)

    def upsample(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits of an input of ``size`` from those of low resolution."""
        frame = self.frame(low, size)
        full: Tensor = self.operators.upsample_bilinear(
            low, frame.size, align_corners=frame.align_corners
        )
        return _crop(full, frame, size)

    def forward(self, x: Tensor, low_resolution: bool = False) -> Any:
        """Logits (N, num_classes, H, W) of a picture (N, channels, H, W) of any size.

        With ``low_resolution`` they are :meth:`forward_low`'s, for fused losses and argmax. With
        ``features_only`` in the constructor the result is the ordered dict of :meth:`features`.
        """
        if self.features_only:
            return self.features(x)
        low = self.forward_low(x)
        return low if low_resolution else self.upsample(low, _size(x))

    @torch.no_grad()
    def predict(
        self, x: Tensor, *, dtype: torch.dtype = torch.int64, return_confidence: bool = False
    ) -> Any:
        """Labels (N, H, W), without logits of full resolution.

        Args:
            x: (N, channels, H, W).
            dtype: Of the labels, see :func:`pydense.ops.upsample_argmax`.
            return_confidence: Also return the softmax of the label, as (labels, confidence).
        """
        low = self.forward_low(x)
        frame = self.frame(low, _size(x))
        found = self.operators.upsample_argmax(
            low,
            frame.size,
            frame.align_corners,
            dtype=dtype,
            return_confidence=return_confidence,
        )
        if not return_confidence:
            return _crop(found, frame, _size(x))
        labels, confidence = found
        return _crop(labels, frame, _size(x)), _crop(confidence, frame, _size(x))

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        reduction: str = "mean",
        ignore_index: int = 255,
        **options: Any,
    ) -> Tensor:
        """The training loss: cross-entropy of all outputs, without logits of full resolution.

        The sum over :meth:`forward_outputs` of ``output_weights[i]`` times
        :func:`pydense.ops.upsample_cross_entropy`. For losses of other kinds
        (:class:`pydense.nn.OhemCrossEntropy`) call them on :meth:`forward_outputs`.

        Args:
            x: (N, channels, H, W).
            target: (N, H, W), any integer dtype.
            reduction: ``"mean"``, ``"mean_all"`` or ``"sum"``.
            ignore_index: Label of pixels that take no part.
            **options: ``weight``, ``label_smoothing``.
        """
        check.choice(type(self).__name__, "reduction", reduction, ("mean", "mean_all", "sum"))
        outputs = self.forward_outputs(x)
        total: Tensor | None = None
        for factor, low in zip(self.output_weights, outputs, strict=True):
            frame = self.frame(low, _size(x))
            labels = _padded(target, frame, ignore_index)
            term: Tensor = self.operators.upsample_cross_entropy(
                low,
                labels,
                align_corners=frame.align_corners,
                reduction="sum" if reduction == "mean_all" else reduction,
                ignore_index=ignore_index,
                **options,
            )
            if reduction == "mean_all":
                term = term / target.numel()
            total = factor * term if total is None else total + factor * term
        assert total is not None
        return total

    def train(self: _Model, mode: bool = True) -> _Model:
        """As of ``nn.Module``; with ``frozen_norm`` batch normalisation stays in ``eval()``."""
        super().train(mode)
        if mode and getattr(self, "frozen_norm", False):
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def set_norm_momentum(op: str, model: nn.Module, momentum: float) -> None:
    """Gives all batch normalisation in a model its momentum, torch's: that of the new.

    Raises:
        ValueError: None of 0 to 1.
        TypeError: No number.
    """
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"{op}: norm_momentum must be a number, got {check.kind(momentum)}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: norm_momentum must be 0 to 1, got {momentum!r}")
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


def reference_twin(model: _Model) -> _Model:
    """A copy of a model with the same weights that computes in plain torch.

    It calls :mod:`pydense.reference`, see :func:`pydense.nn.use_operators`.
    """
    return use_operators(copy.deepcopy(model), "reference")


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def _crop(full: Tensor, frame: Frame, size: tuple[int, int]) -> Tensor:
    if frame.offset is None:
        return full
    top, left = frame.offset
    return full[..., top : top + size[0], left : left + size[1]]


def _padded(target: Tensor, frame: Frame, ignore_index: int) -> Tensor:
    """Labels of the whole frame, those beside the input ignored."""
    if frame.offset is None:
        return target
    top, left = frame.offset
    below = frame.size[0] - top - target.shape[1]
    right = frame.size[1] - left - target.shape[2]
    return pad(target, (left, right, top, below), value=ignore_index)
