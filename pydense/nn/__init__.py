# SPDX-License-Identifier: Apache-2.0
"""Layers over ``pydense.ops``."""

from .chained_residual_pool import (
    ChainedResidualPooling,
    MultiResolutionFusion,
    RefineNetBlock,
    ResidualConvUnit,
    UpsampleConcatConv1x1,
)
from .dense_crf import DenseCRF
from .losses import OhemCrossEntropy, SegmentationLoss
from .upsample import UpsampleCrop

__all__ = [
    "ChainedResidualPooling",
    "DenseCRF",
    "MultiResolutionFusion",
    "OhemCrossEntropy",
    "RefineNetBlock",
    "ResidualConvUnit",
    "SegmentationLoss",
    "UpsampleConcatConv1x1",
    "UpsampleCrop",
]
