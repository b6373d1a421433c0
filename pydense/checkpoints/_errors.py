# SPDX-License-Identifier: Apache-2.0
"""The error of everything about checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file that cannot be read, or that does not fit a model."""
