# SPDX-License-Identifier: Apache-2.0
"""Layers over ``pydense.ops``."""

from ._convert import convert
from ._fold import fold_batchnorm
from ._operators import use_operators
from .aspp import ASPPSum
from .aspp_concat import ASPP
from .atrous_conv import AtrousConv2d
from .atrous_separable_conv import AtrousSeparableConv2d
from .chained_residual_pool import (
    ChainedResidualPooling,
    MultiResolutionFusion,
    RefineNetBlock,
    ResidualConvUnit,
    UpsampleConcatConv1x1,
)
from .crf_as_rnn import CRFasRNN
from .dense_crf import DenseCRF
from .losses import OhemCrossEntropy, SegmentationLoss
from .upsample import UpsampleCrop

__all__ = [
    "ASPP",
    "ASPPSum",
    "AtrousConv2d",
    "AtrousSeparableConv2d",
    "CRFasRNN",
    "ChainedResidualPooling",
    "DenseCRF",
    "MultiResolutionFusion",
    "OhemCrossEntropy",
    "RefineNetBlock",
    "ResidualConvUnit",
    "SegmentationLoss",
    "UpsampleConcatConv1x1",
    "UpsampleCrop",
    "convert",
    "fold_batchnorm",
    "use_operators",
]
