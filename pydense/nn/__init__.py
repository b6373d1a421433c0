# SPDX-License-Identifier: Apache-2.0
"""Layers over ``pydense.ops``."""

from .dense_crf import DenseCRF
from .upsample import UpsampleCrop

__all__ = ["DenseCRF", "UpsampleCrop"]
