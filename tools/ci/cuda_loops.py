# SPDX-License-Identifier: Apache-2.0
"""Machine instructions of main loops for each matrix product of a warp, as nvcc makes them.

The predictions of benchmarks/README.md count on ``benchmarks/cuda/loops.json``: what the shim's
compiler makes of such a loop says little about a GPU. ``cuda_gates.py`` holds kernels to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

LOOPS = Path(__file__).resolve().parents[2] / "benchmarks" / "cuda" / "loops.json"
ARCHITECTURE = "sm_90a"

HEADER = re.compile(r"arch = (\w+)")
FUNCTION = re.compile(r"\s+Function : (\S+)$")
LINE = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)")


class Loop(NamedTuple):
    """The main loop of a kernel: instructions for a product of the tensor cores."""

    name: str
    instructions: float


def main_loop(code: Sequence[tuple[int, str, str]]) -> float | None:
    """Instructions for each HMMA of the shortest loop that has the most of them; None without.

    Args:
        code: Address, instruction and operands, in order.
    """
    index = {address: i for i, (address, _, _) in enumerate(code)}
    best: tuple[int, int] | None = None  # products, and minus the loop's length
    for end, (address, name, operands) in enumerate(code):
        target = TARGET.search(operands) if name.startswith("BRA") else None
        begin = index.get(int(target[1], 16)) if target else None
        if begin is not None and int(code[begin][0]) <= address:
            products = sum(name.startswith("HMMA") for _, name, _ in code[begin : end + 1])
            if products:
                best = max(best or (0, 0), (products, begin - end - 1))
    return -best[1] / best[0] if best else None


def read_loops(printed: str) -> Iterator[Loop]:
    """The kernels of sm_90a with such a loop, in what ``cuobjdump -sass`` prints."""
    architecture, name = "", ""
    code: list[tuple[int, str, str]] = []

    def done() -> Iterator[Loop]:
        if name and architecture == ARCHITECTURE and (found := main_loop(code)) is not None:
            yield Loop(name, found)

    for line in printed.splitlines():
        if instruction := LINE.match(line):
            code.append((int(instruction[1], 16), instruction[2], instruction[3]))
        elif header := HEADER.match(line):
            yield from done()
            architecture, name, code = header[1], "", []
        elif function := FUNCTION.match(line):
            yield from done()
            name, code = function[1], []
    yield from done()


def too_long(loops: Sequence[Loop], text: str) -> list[str]:
    """Main loops with more instructions than predictions count on, and entries of no kernel."""
    found = []
    for entry in json.loads(text):
        concerned = [loop for loop in loops if re.search(entry["code"], loop.name)]
        if not concerned:
            found.append(f"loops.json: no kernel is '{entry['code']}'")
        found += [
            f"{loop.name}: {loop.instructions:.1f} instructions in its main loop for each matrix "
            f"product, predictions count on {entry['instructions']}"
            for loop in concerned
            if loop.instructions > entry["instructions"]
        ]
    return found
