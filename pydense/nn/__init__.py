# SPDX-License-Identifier: Apache-2.0
"""Layers over ``pydense.ops``."""

from .dense_crf import DenseCRF

__all__ = ["DenseCRF"]
