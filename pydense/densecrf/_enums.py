# SPDX-License-Identifier: Apache-2.0
"""The two enumerations of the pydensecrf interface."""

from __future__ import annotations

from enum import IntEnum


class NormalizationType(IntEnum):
    """How a kernel matrix K is normalised by its own row sums n = K 1.

    The integer values are those of pydensecrf, so scripts that stored plain integers keep working.
    """

    NO_NORMALIZATION = 0
    """K as it is. The lattice loses mass, so this is not the scale of a true Gaussian."""
    NORMALIZE_BEFORE = 1
    """K n^-1: every sender's total influence is 1."""
    NORMALIZE_AFTER = 2
    """n^-1 K: every receiver averages."""
    NORMALIZE_SYMMETRIC = 3
    """n^-1/2 K n^-1/2, the default."""


class KernelType(IntEnum):
    """Shape of the learnable feature transform in the original C++ library.

    It only matters for learning, which pydensecrf never exposed in Python; inference gives the same
    result for all three. Accepted and checked, then ignored.
    """

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2
