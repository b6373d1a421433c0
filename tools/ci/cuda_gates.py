# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel for every architecture and refuses spills and local memory.

    python tools/ci/cuda_gates.py [BUILD_DIR] [--table]  # default: build/gates; MAX_JOBS at a time

Flags and sources are those of CMakeLists.txt, warnings included, which are errors there. What ptxas
says of each kernel is read: registers that spill, or a stack frame, fail the run unless the kernel
is in ``tools/ci/cuda_exceptions.txt`` with a limit and a reason. An exception that nothing needs
fails too. Kernels that ``tools/ci/cuda_budgets.txt`` names stay within its registers and static
shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EXCEPTIONS = Path(__file__).with_name("cuda_exceptions.txt")
BUDGETS = Path(__file__).with_name("cuda_budgets.txt")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


class Kernel(NamedTuple):
    """What ptxas used for one kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


class Allowance(NamedTuple):
    """A line of the list of exceptions."""

    pattern: re.Pattern[str]
    architecture: str
    stack: int
    spills: int
    reason: str

    def covers(self, kernel: Kernel) -> bool:
        return (
            self.architecture in ("*", kernel.architecture)
            and self.pattern.search(kernel.name) is not None
            and kernel.stack <= self.stack
            and kernel.spills <= self.spills
        )


def parse(output: str) -> Iterator[Kernel]:
    """The kernels in what ``nvcc -Xptxas=-v`` prints; names are mangled."""
    name = architecture = ""
    stack = spills = 0
    for line in output.splitlines():
        if entry := ENTRY.search(line):
            name, architecture = entry[1], entry[2]
            stack = spills = 0
        elif frame := FRAME.search(line):
            # Also of functions that a kernel calls: their frames count as the kernel's.
            stack = max(stack, int(frame[1]))
            spills = max(spills, int(frame[2]) + int(frame[3]))
        elif (used := USED.search(line)) and name:
            yield Kernel(name, architecture, int(used[1]), int(used[2] or 0), stack, spills)
            name = ""


def read_allowances(text: str) -> list[Allowance]:
    """Lines ``PATTERN ARCHITECTURE stack=N spills=N REASON``; ValueError for any other."""
    allowances = []
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+(\S+)\s+stack=(\d+)\s+spills=(\d+)\s+(\S.{9,})", line)
        if match is None:
            raise ValueError(f"cuda_exceptions.txt: cannot read {line!r}; a reason is needed too")
        pattern, architecture, stack, spills, reason = match.groups()
        allowances.append(
            Allowance(re.compile(pattern), architecture, int(stack), int(spills), reason)
        )
    return allowances


def judge(kernels: Iterable[Kernel], allowances: Sequence[Allowance]) -> list[str]:
    """What is wrong: kernels beyond what is allowed, and allowances that nobody needs."""
    found = []
    needed = set()
    for kernel in kernels:
        if kernel.stack == 0 and kernel.spills == 0:
            continue
        covering = [i for i, allowance in enumerate(allowances) if allowance.covers(kernel)]
        needed.update(covering)
        if not covering:
            found.append(
                f"{kernel.name} on {kernel.architecture}: {kernel.stack} bytes of local memory, "
                f"{kernel.spills} bytes spilled"
            )
    found += [
        f"cuda_exceptions.txt: nothing needs '{allowance.pattern.pattern}'"
        for i, allowance in enumerate(allowances)
        if i not in needed
    ]
    return found


class Budget(NamedTuple):
    """A line of the list of budgets."""

    pattern: re.Pattern[str]
    architecture: str
    registers: int
    shared: int

    def concerns(self, kernel: Kernel) -> bool:
        return self.architecture in ("*", kernel.architecture) and bool(
            self.pattern.search(kernel.name)
        )


def read_budgets(text: str) -> list[Budget]:
    """Lines ``PATTERN ARCHITECTURE registers=N shared=N``; ValueError for any other."""
    budgets = []
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+(\S+)\s+registers=(\d+)\s+shared=(\d+)", line)
        if match is None:
            raise ValueError(f"cuda_budgets.txt: cannot read {line!r}")
        pattern, architecture, registers, shared = match.groups()
        budgets.append(Budget(re.compile(pattern), architecture, int(registers), int(shared)))
    return budgets


def over_budget(kernels: Sequence[Kernel], budgets: Sequence[Budget]) -> list[str]:
    """Kernels beyond their budgets, and budgets of no kernel."""
    found = []
    for budget in budgets:
        concerned = [kernel for kernel in kernels if budget.concerns(kernel)]
        if not concerned:
            found.append(f"cuda_budgets.txt: no kernel is '{budget.pattern.pattern}'")
        found += [
            f"{kernel.name} on {kernel.architecture}: {kernel.registers} registers and "
            f"{kernel.shared} bytes of shared memory, allowed are {budget.registers} and "
            f"{budget.shared}"
            for kernel in concerned
            if kernel.registers > budget.registers or kernel.shared > budget.shared
        ]
    return found


def demangled(kernels: Sequence[Kernel]) -> list[Kernel]:
    names = subprocess.run(
        ["c++filt", "-p"],
        input="\n".join(kernel.name for kernel in kernels),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [kernel._replace(name=name) for kernel, name in zip(kernels, names, strict=True)]


def commands(build: Path) -> list[list[str]]:
    """The compiler calls of all CUDA sources, with ptxas's report and without an output."""
    options = ["-DPYDENSE_TESTS=ON", "-DPYDENSE_CUDA=ON"]
    archs = ";".join(f"{name.removeprefix('sm_')}-real" for name in ARCHITECTURES)
    subprocess.run(
        [
            "cmake",
            "-S",
            ROOT,
            "-B",
            build,
            "-G",
            "Ninja",
            f"-DPYDENSE_CUDA_ARCHS={archs}",
            *options,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = []
    for entry in json.loads((build / "compile_commands.json").read_text(encoding="utf-8")):
        if entry["file"].endswith(".cu"):
            words = shlex.split(entry["command"])
            output = words.index("-o")
            found.append([*words[:output], "-o", os.devnull, "-Xptxas=-v"])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile CUDA kernels; refuse spills.")
    parser.add_argument("build", type=Path, nargs="?", default=ROOT / "build" / "gates")
    parser.add_argument("--table", action="store_true", help="list every kernel")
    options = parser.parse_args(arguments)
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        print("cuda_gates: no nvcc on PATH")
        return 2

    def compile_one(command: list[str]) -> tuple[str, int]:
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout + done.stderr, done.returncode

    kernels: list[Kernel] = []
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        for output, status in pool.map(compile_one, commands(options.build)):
            if status != 0:
                print(output)
                return 1
            kernels += parse(output)
    kernels = sorted(set(demangled(kernels)))
    if {kernel.architecture for kernel in kernels} != set(ARCHITECTURES):
        print(f"cuda_gates: kernels for {', '.join(ARCHITECTURES)} expected, found others or none")
        return 1
    if options.table:
        for k in kernels:
            print(
                f"{k.architecture:<7} {k.registers:>3} registers, {k.shared:>6} B shared  {k.name}"
            )
    problems = judge(kernels, read_allowances(EXCEPTIONS.read_text(encoding="utf-8")))
    problems += over_budget(kernels, read_budgets(BUDGETS.read_text(encoding="utf-8")))
    for problem in problems:
        print(f"cuda_gates: {problem}")
    names = {kernel.name for kernel in kernels}
    most = max(kernel.registers for kernel in kernels)
    print(
        f"cuda_gates: {len(names)} kernels for {len(ARCHITECTURES)} architectures, at most {most} "
        f"registers, {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
