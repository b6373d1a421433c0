# SPDX-License-Identifier: Apache-2.0
"""Refusing work that cannot fit in memory, which would else end in a silent kill."""

from __future__ import annotations

import os
from pathlib import Path

from ._errors import CommandError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

# Measured on photos (peak resident size over 1 megapixel, 2 and 21 labels: 145 and 436 bytes per
# pixel), rounded down: features and lattices, and per label energies, marginals and scratch. Noise
# needs several times as much. So what this refuses surely fails; what it lets through may fail.
_BYTES_PER_PIXEL = 100
_BYTES_PER_LABEL = 12


def available_bytes() -> int | None:
    """Return the memory of this machine or container, None where that is unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        return min(total, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return total


def require_memory(pixels: int, labels: int) -> None:
    """Raise CommandError when refining `pixels` with `labels` cannot fit in memory."""
    needed = pixels * (_BYTES_PER_PIXEL + labels * _BYTES_PER_LABEL)
    available = available_bytes()
    if available is not None and needed > available:
        raise CommandError(
            f"{pixels / 1e6:.1f} megapixels with {labels} labels need at least "
            f"{needed / 1e9:.1f} GB of memory, there are {available / 1e9:.1f} GB: "
            "make the picture smaller"
        )
