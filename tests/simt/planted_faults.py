# SPDX-License-Identifier: Apache-2.0
"""Faults that mutate.py plants in CUDA kernels: which there are, samples of them, explanations."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

OPERATORS = [
    (r"__syncthreads\(\);", ";"),
    (r"__syncwarp\([^)]*\);", ";"),
    (r"(?<= )<(?= )", "<="),
    (r"(?<= )<=(?= )", "<"),
    (r"(?<= )>(?= )", ">="),
    (r"(?<= )>=(?= )", ">"),
    (r"(?<= )==(?= )", "!="),
    (r"(?<= )!=(?= )", "=="),
    (r"(?<= )&&(?= )", "||"),
    (r"(?<= )\|\|(?= )", "&&"),
    (r"(?<= )\+ 1\b", "+ 0"),
    (r"(?<= )\+ 1\b", "+ 2"),
    (r"(?<= )- 1\b", "- 0"),
    (r"(?<= )- 1\b", "- 2"),
    (r"(?<=[\w\])] )\+(?= [a-z(])", "-"),
    (r"(?<=[\w\])] )-(?= [a-z(])", "+"),
    (r"(?<=[\w\])] )\*(?= [a-zA-Z(])", "+"),
    (r"(?<=[\w\])] )/(?= [a-zA-Z(])", "*"),
    (r"(?<=[\w\])] )%(?= [a-zA-Z(])", "/"),
    (r"(?<= )\+=(?= )", "-="),
    (r"(?<= )\+=(?= )", "="),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"\bfminf\(", "fmaxf("),
    (r"\bfmaxf\(", "fminf("),
    (r"\batomicAdd\(", "::simt::plain_add("),
    (r"\bthreadIdx\.x", "threadIdx.y"),
    (r"\bthreadIdx\.y", "threadIdx.x"),
    (r"\bblockIdx\.x", "blockIdx.y"),
    (r"\bblockIdx\.y", "blockIdx.x"),
    (r"\bblockIdx\.z", "blockIdx.y"),
    (r"\bgridDim\.(\w)", r"(gridDim.\1 + 1)"),
    (r"\breturn;", ";"),
    (r"\bcontinue;", ";"),
    (r"\bbreak;", ";"),
    (r"\b__shfl_xor_sync\b", "__shfl_down_sync"),
    (r"\b__shfl_down_sync\b", "__shfl_up_sync"),
    (r"\b0xFFFFFFFFU?\b", "0xFFFFU"),
    (r"-INFINITY\b", "0.0f"),
    (r"(?<![\w.])(\d+)(?=[;,)\]])", lambda m: str(int(m[1]) + 1)),
    (r"(?<=[(\s])0\.5f?\b", "0.25f"),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"\bint64_t\b", "int32_t"),
    (r"(?<=\()!(?=\w)", ""),
]
# Lines where a change is no fault of a kernel.
SKIPPED = re.compile(r"^\s*(//|#|template|static_assert|using|namespace|}?\s*$)|__launch_bounds__")


class Fault(NamedTuple):
    """One change of one line."""

    path: Path
    line: int  # from 0
    before: str
    after: str
    operator: int  # its place in OPERATORS

    @property
    def file(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def key(self) -> tuple[str, str, str]:
        """What explains it is found by: not by the line's number, which moves."""
        return self.file, self.before.strip(), self.after.strip()

    def title(self) -> str:
        return f"{self.file}:{self.line + 1}: {self.before.strip()}  =>  {self.after.strip()}"


def faults_of(path: Path) -> Iterator[Fault]:
    """Every fault that can be planted in a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        # What is said in messages and comments is no code.
        code = re.sub(r'"[^"]*"', lambda text: " " * len(text[0]), line).split("//")[0]
        if SKIPPED.search(line):
            continue
        seen = {line}
        for operator, (pattern, replacement) in enumerate(OPERATORS):
            for match in re.finditer(pattern, code):
                new = match.expand(replacement) if isinstance(replacement, str) else None
                text = new if new is not None else replacement(match)  # type: ignore[operator]
                after = line[: match.start()] + text + line[match.end() :]
                if after not in seen:
                    seen.add(after)
                    yield Fault(path, number, line, after, operator)


def sample_of(faults: Sequence[Fault], size: int, seed: int) -> list[Fault]:
    """So many, evenly over operators, files and lines; a smaller sample is its beginning."""
    ordered = sorted(faults, key=lambda fault: (fault.operator, fault.path, fault.line))
    if not 0 < size < len(ordered):
        return ordered
    place = random.Random(seed).random()
    sample: list[Fault] = []
    taken: set[int] = set()
    while len(sample) < size:
        place = (place + (5**0.5 - 1) / 2) % 1  # no other step spreads them more evenly
        index = int(place * len(ordered))
        if index not in taken:
            taken.add(index)
            sample.append(ordered[index])
    return sample


def explanations(path: Path) -> dict[tuple[str, str, str], str]:
    """Paragraphs of four lines or more: file, line before, line after, reason."""
    found = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines() if not line.startswith("#")]
        if len(lines) >= 4:
            found[lines[0], lines[1], lines[2]] = " ".join(lines[3:])
    return found
