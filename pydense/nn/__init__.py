# SPDX-License-Identifier: Apache-2.0
"""Layers over ``pydense.ops``."""

from .dense_crf import DenseCRF
from .losses import OhemCrossEntropy, SegmentationLoss
from .upsample import UpsampleCrop

__all__ = ["DenseCRF", "OhemCrossEntropy", "SegmentationLoss", "UpsampleCrop"]
