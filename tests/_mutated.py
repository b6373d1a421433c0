# SPDX-License-Identifier: Apache-2.0
"""Broken copies of files, for parsers that must refuse them."""

from __future__ import annotations

import random


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes, most of them near the beginning, where files say what they hold."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(min(len(data), 160))
        choice = rng.randrange(6)
        if choice == 0:
            data[at] = rng.randrange(256)
        elif choice == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 2:
            data[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"])
        elif choice == 3:
            del data[at : at + rng.randint(1, 40)]
        elif choice == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 12))
        else:
            data = data[: max(1, at)]
        if not data:
            return b"\0"
    return bytes(data)
