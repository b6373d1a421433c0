# SPDX-License-Identifier: Apache-2.0
"""CRF-as-RNN: FCN-8s and a dense CRF that are trained together.

Source: S. Zheng et al., *Conditional Random Fields as Recurrent Neural Networks*, ICCV 2015 (code:
torrvision/crfasrnn in Caffe, sadeepj/crfasrnn_pytorch, whose names the parameters have).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pydense.nn import CRFasRNN
from pydense.ops import _crf_arguments as check

from ._base import Frame
from ._registry import register_model
from .fcn import FCN


class FCNCRFasRNN(FCN):
    """FCN-8s whose logits a :class:`pydense.nn.CRFasRNN` refines, by the picture that it is given.

    Input is BGR, 0 to 255, less the mean: the CRF's bandwidths are in these units, and it heeds
    differences of colours alone. Logits, and so the tensors of training, are of full resolution.

    Args:
        num_classes: 21 for Pascal VOC.
        iterations: Of the mean field in training and in ``eval()``, as in the paper. (The PyTorch
            port always has 10.)
        crf: Other options of :class:`pydense.nn.CRFasRNN`.
        fc_channels: Of ``fc6`` and ``fc7``.
        padding: Of ``conv1_1``, see :class:`FCN`.
        ceil_mode: Of the max pooling; Caffe's.
        dropout: Of channels (``"channel"``, the PyTorch port) or of elements (``"element"``).
        upsampling: ``"learned"`` as in the port, where ``upscore2`` has a bias too, or
            ``"bilinear"``, fixed, without; see :class:`FCN`.
        features_only: ``pool3``, ``pool4``, ``pool5``.
        reference: Plain torch.
    """

    def __init__(
        self,
        num_classes: int = 21,
        *,
        iterations: tuple[int, int] = (5, 10),
        crf: Mapping[str, Any] | None = None,
        fc_channels: int = 4096,
        padding: int | None = None,
        ceil_mode: bool = True,
        dropout: str = "channel",
        upsampling: str = "learned",
        features_only: bool = False,
        reference: bool = False,
    ) -> None:
        super().__init__(
            num_classes,
            8,
            fc_channels=fc_channels,
            padding=padding,
            ceil_mode=ceil_mode,
            dropout=dropout,
            upsampling=upsampling,
            features_only=features_only,
        )
        for value in check.sequence("FCNCRFasRNN", "iterations", iterations, "integers"):
            check.integer("FCNCRFasRNN", "iterations", value, 0, check.MAX_ITERATIONS)
        if len(iterations) != 2:
            raise ValueError(f"FCNCRFasRNN: iterations must be two numbers, got {iterations!r}")
        self.iterations = tuple(iterations)
        if not features_only:
            if upsampling == "learned":
                deconvolution = self.get_submodule("upscore2")
                deconvolution.bias = nn.Parameter(torch.zeros(num_classes))
            self.crfrnn = CRFasRNN(num_classes, self.iterations[0], **(crf or {}))
        self._finish(reference)

    def unary(self, x: Tensor) -> Tensor:
        """The logits of FCN-8s, of full resolution."""
        return FCN.upsample(self, FCN.forward_low(self, x), (x.shape[2], x.shape[3]))

    def forward_low(self, x: Tensor) -> Tensor:
        """The refined logits; of full resolution, there are no lower ones."""
        out: Tensor = self.crfrnn(self.unary(x), x)
        return out

    def frame(self, low: Tensor, size: tuple[int, int]) -> Frame:
        """The input."""
        return Frame(size)

    def upsample(self, low: Tensor, size: tuple[int, int]) -> Tensor:
        """The logits as they are."""
        return low

    def train(self, mode: bool = True) -> FCNCRFasRNN:
        """As of ``nn.Module``; chooses the number of iterations."""
        super().train(mode)
        if "crfrnn" in self._modules:
            self.crfrnn.iterations = self.iterations[0 if mode else 1]
        return self


@register_model
def crf_as_rnn_vgg16(num_classes: int = 21, **options: Any) -> FCNCRFasRNN:
    """CRF-as-RNN on FCN-8s; options of :class:`FCNCRFasRNN`."""
    return FCNCRFasRNN(num_classes, **options)
