# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel for every architecture, and looks at what nvcc made of it.

    python tools/ci/cuda_gates.py [BUILD_DIR] [--table]  # default: build/gates; MAX_JOBS at a time
    python tools/ci/cuda_gates.py [BUILD_DIR] --budgets  # lines for cuda_budgets.txt

The objects are those of every build: sources, flags and architectures of CMakeLists.txt, warnings
included, which are errors there. So ccache compiles them once for this and for the wheel. They are
read with cuobjdump (the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm):

- A stack frame, which is where registers spill to, fails the run unless the kernel is in
  ``tools/ci/cuda_exceptions.txt`` with a limit and a reason. An exception that nothing needs fails.
- Kernels stay within the registers and shared memory that ``tools/ci/cuda_budgets.txt`` gives each
  of them on each architecture.
- Main loops of matrix products are as long as predictions say (``cuda_loops.py``).
- Kernels have the machine instructions that ``tools/ci/cuda_sass.txt`` says, so that a matrix
  product or a vector load that the compiler lost is noticed. Every kernel with matrix instructions
  must be there, and none without an exception may have loads or stores of local memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import cuda_loops

ROOT = Path(__file__).resolve().parents[2]
EXCEPTIONS = Path(__file__).with_name("cuda_exceptions.txt")
BUDGETS = Path(__file__).with_name("cuda_budgets.txt")
INSTRUCTIONS = Path(__file__).with_name("cuda_sass.txt")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

ARCHITECTURE = re.compile(r"arch = (\w+)")
FUNCTION = re.compile(r"\s+Function (?:: )?([^\s:]+):?$")
USED = re.compile(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) ")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Za-z0-9_.]*)")
MATRIX = ("HMMA", "HGMMA", "QGMMA", "IMMA", "DMMA", "UTCHMMA")
LOCAL = ("LDL", "STL")
OWN = "pydense::"
RESERVED = 1024  # bytes of shared memory of a block that are the system's, and are counted


_Named = TypeVar("_Named", "Kernel", "Code", cuda_loops.Loop)


class Kernel(NamedTuple):
    """What one kernel uses on one architecture: registers of a thread, and bytes."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int


class Allowance(NamedTuple):
    """A line of the list of exceptions."""

    pattern: re.Pattern[str]
    architecture: str
    stack: int
    reason: str

    def covers(self, kernel: Kernel) -> bool:
        return (
            self.architecture in ("*", kernel.architecture)
            and self.pattern.search(kernel.name) is not None
            and kernel.stack <= self.stack
        )


def read_usage(printed: str) -> Iterator[Kernel]:
    """The kernels in what ``cuobjdump -res-usage`` prints; names are mangled."""
    architecture = name = ""
    for line in printed.splitlines():
        if found := ARCHITECTURE.match(line):
            architecture = found[1]
        elif found := FUNCTION.match(line):
            name = found[1]
        elif found := USED.match(line):
            registers, stack, shared = map(int, found.groups())
            reserved = 0 if architecture == "sm_80" else min(shared, RESERVED)
            yield Kernel(name, architecture, registers, shared - reserved, stack)


def read_allowances(text: str) -> list[Allowance]:
    """Lines ``PATTERN ARCHITECTURE stack=N REASON``; ValueError for any other."""
    allowances = []
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+(\S+)\s+stack=(\d+)\s+(\S.{9,})", line)
        if match is None:
            raise ValueError(f"cuda_exceptions.txt: cannot read {line!r}; a reason is needed too")
        pattern, architecture, stack, reason = match.groups()
        allowances.append(Allowance(re.compile(pattern), architecture, int(stack), reason))
    return allowances


def judge(kernels: Iterable[Kernel], allowances: Sequence[Allowance]) -> list[str]:
    """What is wrong: kernels beyond what is allowed, and allowances that nobody needs."""
    found = []
    needed = set()
    for kernel in kernels:
        if kernel.stack == 0:
            continue
        covering = [i for i, allowance in enumerate(allowances) if allowance.covers(kernel)]
        needed.update(covering)
        if not covering:
            found.append(
                f"{kernel.name} on {kernel.architecture}: {kernel.stack} bytes of local memory"
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
    """Kernels beyond their budgets or without one, and budgets of no kernel."""
    found = [
        f"{kernel.name} on {kernel.architecture}: has no budget"
        for kernel in kernels
        if kernel.name.startswith(OWN) and not any(b.concerns(kernel) for b in budgets)
    ]
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


def budget_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Budgets that hold these kernels: a line for each architecture, registers in steps of 8."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for kernel in kernels:
        if kernel.name.startswith(OWN):
            key = (re.split("[<(]", kernel.name.removeprefix(OWN))[0], kernel.architecture)
            registers, shared = found.get(key, (0, 0))
            steps = -(-kernel.registers // 8) * 8
            found[key] = max(registers, min(steps, 255)), max(shared, kernel.shared)
    return [
        f"{OWN}{name}\\b {architecture} registers={registers} shared={shared}"
        for (name, architecture), (registers, shared) in sorted(found.items())
    ]


class Code(NamedTuple):
    """The kinds of instructions of one kernel on one architecture."""

    name: str
    architecture: str
    instructions: frozenset[str]

    def has(self, wanted: str) -> bool:
        """Whether an instruction is of this kind: ``LDG.128`` is ``LDG.E.128.CONSTANT``, too."""
        kind, *modifiers = wanted.split(".")
        return any(
            own == kind and set(modifiers) <= set(others)
            for own, *others in (found.split(".") for found in self.instructions)
        )


def read_code(printed: str) -> Iterator[Code]:
    """The functions in what ``cuobjdump -sass`` prints; names are mangled."""
    architecture = ""
    found: dict[tuple[str, str], set[str]] = {}
    kinds: set[str] = set()
    for line in printed.splitlines():
        if instruction := INSTRUCTION.match(line):
            kinds.add(instruction[1])
        elif header := ARCHITECTURE.match(line):
            architecture = header[1]
        elif function := FUNCTION.match(line):
            kinds = found.setdefault((function[1], architecture), set())
    for (name, architecture), kinds in found.items():
        yield Code(name, architecture, frozenset(kinds))


class Expectation(NamedTuple):
    """A line of the list of instructions."""

    pattern: re.Pattern[str]
    architecture: str
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]

    def concerns(self, code: Code) -> bool:
        return self.architecture in ("*", code.architecture) and bool(
            self.pattern.search(code.name)
        )


def read_expectations(text: str) -> list[Expectation]:
    """Lines ``PATTERN ARCHITECTURE INSTRUCTION...``; ValueError for any other."""
    expectations = []
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        pattern, *words = line.split()
        kinds = words[1:]
        if not kinds or any(re.fullmatch(r"!?[A-Z][A-Za-z0-9_.]*", kind) is None for kind in kinds):
            raise ValueError(f"cuda_sass.txt: cannot read {line!r}")
        wanted = tuple(kind for kind in kinds if kind[0] != "!")
        unwanted = tuple(kind[1:] for kind in kinds if kind[0] == "!")
        expectations.append(Expectation(re.compile(pattern), words[0], wanted, unwanted))
    return expectations


def unexpected(
    codes: Sequence[Code], expectations: Sequence[Expectation], allowances: Sequence[Allowance]
) -> list[str]:
    """Kernels without what they should have, or with local memory; expectations of no kernel."""
    found = []
    for expectation in expectations:
        concerned = [code for code in codes if expectation.concerns(code)]
        if not concerned:
            found.append(f"cuda_sass.txt: no kernel is '{expectation.pattern.pattern}'")
        for code in concerned:
            where = f"{code.name} on {code.architecture}"
            found += [f"{where}: has no {k}" for k in expectation.wanted if not code.has(k)]
            found += [f"{where}: has {k}" for k in expectation.unwanted if code.has(k)]
    for code in codes:
        allowed = any(
            a.architecture in ("*", code.architecture) and a.pattern.search(code.name)
            for a in allowances
        )
        where = f"{code.name} on {code.architecture}"
        if not allowed:
            found += [f"{where}: has {k}, of local memory" for k in LOCAL if code.has(k)]
        if any(map(code.has, MATRIX)) and not any(e.concerns(code) for e in expectations):
            found.append(f"{where}: multiplies matrices, and cuda_sass.txt does not name it")
    return found


def demangled(rows: Sequence[_Named]) -> list[_Named]:
    names = subprocess.run(
        ["c++filt", "-p"],
        input="\n".join(row.name for row in rows),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [row._replace(name=name) for row, name in zip(rows, names, strict=True)]


def find_reader() -> str | None:
    """cuobjdump on PATH, or of the package nvidia-cuda-cuobjdump; it needs nvdisasm beside it."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [*map(str, sorted(packages.glob("*/bin"))), os.environ.get("PATH", os.defpath)]
    found = [
        shutil.which(tool, path=os.pathsep.join(folders)) for tool in ("cuobjdump", "nvdisasm")
    ]
    return found[0] if all(found) else None


def dump(reader: str, what: str, compiled: Path) -> str:
    """What cuobjdump prints of an object; it starts nvdisasm, which it looks for on PATH."""
    path = os.pathsep.join([str(Path(reader).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        [reader, what, compiled],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout


def compile_all(build: Path, jobs: int) -> list[Path]:
    """The objects of all CUDA sources; CalledProcessError where one does not compile."""
    options = ["-DPYDENSE_TESTS=ON", "-DPYDENSE_CUDA=ON", "-UPYDENSE_CUDA_ARCHS"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    entries = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    objects = [Path(e["output"]) for e in entries if e["file"].endswith(".cu")]
    targets = [str(path.relative_to(build.resolve())) for path in objects]
    subprocess.run(["ninja", "-C", str(build), "-j", str(jobs), *targets], check=True)
    return objects


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile CUDA kernels; refuse spills.")
    parser.add_argument("build", type=Path, nargs="?", default=ROOT / "build" / "gates")
    parser.add_argument("--table", action="store_true", help="list every kernel")
    parser.add_argument("--budgets", action="store_true", help="print what would be their budgets")
    options = parser.parse_args(arguments)
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        print("cuda_gates: no nvcc on PATH")
        return 2
    reader = find_reader()
    if reader is None:
        print("cuda_gates: no cuobjdump or nvdisasm: pip install -r tools/ci/requirements.txt")
        return 2

    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    try:
        objects = compile_all(options.build, jobs)
    except subprocess.CalledProcessError as error:
        print(f"cuda_gates: {error}")
        return 1

    def read(compiled: Path) -> tuple[list[Kernel], list[Code], list[cuda_loops.Loop]]:
        usage, code = (dump(reader, what, compiled) for what in ("-res-usage", "-sass"))
        return list(read_usage(usage)), list(read_code(code)), list(cuda_loops.read_loops(code))

    with ThreadPoolExecutor(jobs) as pool:
        every = list(pool.map(read, objects))
    kernels = sorted(set(demangled([row for used, _, _ in every for row in used])))
    codes = demangled([row for _, code, _ in every for row in code])
    loops = demangled([row for _, _, own in every for row in own])
    archs = [{row.architecture for row in rows} for rows in (kernels, codes)]
    if archs != [set(ARCHITECTURES)] * 2:
        print(f"cuda_gates: kernels for {', '.join(ARCHITECTURES)} expected, found others or none")
        return 1
    if options.table:
        for k in kernels:
            print(
                f"{k.architecture:<7} {k.registers:>3} registers, {k.shared:>6} B shared  {k.name}"
            )
    if options.budgets:
        print("\n".join(budget_lines(kernels)))
    allowances = read_allowances(EXCEPTIONS.read_text(encoding="utf-8"))
    expectations = read_expectations(INSTRUCTIONS.read_text(encoding="utf-8"))
    problems = judge(kernels, allowances)
    problems += unexpected(codes, expectations, allowances)
    problems += cuda_loops.too_long(loops, cuda_loops.LOOPS.read_text(encoding="utf-8"))
    problems += over_budget(kernels, read_budgets(BUDGETS.read_text(encoding="utf-8")))
    for problem in problems:
        print(f"cuda_gates: {problem}")
    names = {kernel.name for kernel in kernels}
    most = max(kernel.registers for kernel in kernels)
    print(
        f"cuda_gates: {len(names)} kernels for {len(ARCHITECTURES)} architectures, at most {most} "
        f"registers, instructions of {len(expectations)} kinds of kernels, {len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
