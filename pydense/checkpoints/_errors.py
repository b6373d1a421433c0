# SPDX-License-Identifier: Apache-2.0
"""The error of everything about checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A file that cannot be read, or that does not fit a model."""


def printable(text: str) -> str:
    """Names come from outside: nothing in them may drive a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
