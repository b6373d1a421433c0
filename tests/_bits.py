# SPDX-License-Identifier: Apache-2.0
"""Equality of results over threads and instruction sets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def assert_same_bits(results: Mapping[tuple[str, int], tuple[object, ...]]) -> None:
    """Results by (CPU capability, threads) agree.

    Bitwise over threads, and over the instruction sets that have fused multiply-adds. The baseline
    has none and rounds twice: it agrees with the others in whole numbers, and elsewhere to 1e-4 of
    the largest value.

    Args:
        results: Tuples of float32 bytes and numbers.
    """
    kinds = {"baseline" if name == "baseline" else "fused" for name, _ in results}
    firsts = {}
    for kind in kinds:
        group = [r for (name, _), r in results.items() if (name == "baseline") == (kind != "fused")]
        assert all(result == group[0] for result in group), kind
        firsts[kind] = group[0]
    for a, b in zip(firsts.get("baseline", ()), firsts.get("fused", ()), strict=False):
        if isinstance(a, bytes) and isinstance(b, bytes):
            x, y = np.frombuffer(a, np.float32), np.frombuffer(b, np.float32)
            assert np.abs(x - y).max() <= 1e-4 * max(np.abs(y).max(), 1e-3)
        elif isinstance(a, int):
            assert a == b
        else:
            assert abs(float(str(a)) - float(str(b))) <= 1e-4 * abs(float(str(b)))
