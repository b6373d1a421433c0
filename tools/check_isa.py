# SPDX-License-Identifier: Apache-2.0
"""No unit may bring instructions to a CPU that it was not chosen for.

    python tools/check_isa.py BUILD_DIR        # a CMake build folder; exit status 1 on a leak

Kernels are compiled once per instruction set (CMake targets ``pydense_isa_<isa>``) and chosen at
run time. Two things can undo that choice, and both are looked for in the object files:

* An inline function or template that is emitted by several units is one weak symbol, and the linker
  keeps any copy, say the AVX-512 one for every CPU. So a weak symbol of an ISA unit must carry its
  ISA's namespace in its name (as its scope or as a template argument). What does not may stay only
  when no copy can differ in instruction set: it is data, or its code holds no instruction beyond
  SSE (shown as "shared").
* Compiler flags reach an object they are not meant for. So the encodings are read from the
  disassembly: VEX only in avx2 and above, EVEX and mask registers only in avx512 and above,
  bfloat16 arithmetic only in avx512_bf16 and amx, tiles only in amx; none of them in any other
  object (dispatch, core, doors).

Objects for other processors than x86-64 have one ISA and nothing to leak; they are counted only.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ELF_X86_64 = 62
# Levels of encodings: an object may hold those up to the level of its ISA.
SSE, VEX, EVEX, BF16, AMX = range(5)
LEVELS = {"baseline": SSE, "avx2": VEX, "avx512": EVEX, "avx512_bf16": BF16, "amx": AMX}
LEVEL_NAMES = ("SSE", "VEX (AVX, AVX2, FMA)", "EVEX (AVX-512)", "AVX-512 BF16", "AMX")

TARGET = re.compile(r"CMakeFiles/([^/]+)\.dir/")
ISA_TARGET = re.compile(r"pydense_isa_(\w+?)(?:_tests)?")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t?(.*)$")
CLONE = re.compile(r"\.(cold|part|isra|constprop|lto_priv)(\.\d+)*$")
SEGMENT_AND_SIZE_PREFIXES = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67}
AMX_TEXT = re.compile(r"%tmm\d|\btilerelease\b|\b[ls]dtilecfg\b|\bsttilecfg\b")
BF16_TEXT = re.compile(r"\bv(dp|cvtn)\w*bf16")
MASK_TEXT = re.compile(r"%k[0-7]\b")


@dataclass
class Report:
    """What was found in one build folder."""

    objects: Counter[str] = field(default_factory=Counter)
    levels: dict[str, int] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    foreign: int = 0
    leaks: list[str] = field(default_factory=list)


def run(*command: str | Path, text_in: str | None = None) -> str:
    return subprocess.run(
        [str(part) for part in command], input=text_in, check=True, capture_output=True, text=True
    ).stdout


def elf_machine(path: Path) -> int:
    with path.open("rb") as file:
        header = file.read(20)
    return int.from_bytes(header[18:20], "little") if header[:4] == b"\x7fELF" else -1


def objects(build: Path) -> Iterator[tuple[str, Path]]:
    """Pairs (CMake target, object file)."""
    for path in sorted(build.rglob("*.o")):
        match = TARGET.search(path.as_posix())
        if match:
            yield match.group(1), path


def instruction_level(code: bytes, text: str) -> int:
    """Level of one instruction from its bytes; in 64-bit mode C4, C5 and 62 mean nothing else."""
    at = 0
    while at < len(code) - 1 and code[at] in SEGMENT_AND_SIZE_PREFIXES:
        at += 1
    if code[at] not in (0xC4, 0xC5, 0x62):
        return SSE
    if AMX_TEXT.search(text):
        return AMX
    if BF16_TEXT.search(text):
        return BF16
    # kmovw and its like are VEX-encoded, but AVX-512 all the same.
    return EVEX if code[at] == 0x62 or MASK_TEXT.search(text) else VEX


def function_levels(path: Path) -> dict[str, tuple[int, str]]:
    """For each function the highest level in it and one instruction that reaches it."""
    found: dict[str, tuple[int, str]] = {}
    name = ""
    # -w: no instruction's bytes are continued on a second line.
    for line in run("objdump", "-d", "-w", path).splitlines():
        if match := FUNCTION.match(line):
            name = CLONE.sub("", match.group(1))
            found.setdefault(name, (SSE, ""))
        elif match := INSTRUCTION.match(line):
            level = instruction_level(bytes.fromhex(match.group(1)), match.group(2))
            if level > found.get(name, (SSE, ""))[0]:
                found[name] = (level, " ".join(match.group(2).split()))
    return found


def weak_symbols(path: Path) -> dict[str, str]:
    """Mangled name -> nm's letter, of the symbols the linker may merge over objects."""
    symbols = {}
    for line in run("nm", "--defined-only", "--format=posix", path).splitlines():
        name, letter = line.split()[:2]
        if letter in ("W", "V", "u"):
            symbols[name] = letter
    return symbols


def demangle(names: Sequence[str]) -> list[str]:
    return run("c++filt", text_in="\n".join(names)).splitlines() if names else []


def check_object(target: str, path: Path, report: Report) -> None:
    match = ISA_TARGET.fullmatch(target)
    isa = match.group(1) if match else None
    if isa is not None and isa not in LEVELS:
        report.leaks.append(f"{path}: unknown instruction set '{isa}'")
        return
    allowed = LEVELS[isa] if isa else SSE
    functions = function_levels(path)
    for name, (level, example) in functions.items():
        report.levels[target] = max(report.levels.get(target, SSE), level)
        if level > allowed:
            report.leaks.append(
                f"{path}: {demangle([name])[0]} has {LEVEL_NAMES[level]} code, e.g. '{example}'"
            )
    if isa is None:
        return
    weak = weak_symbols(path)
    for (name, letter), readable in zip(weak.items(), demangle(list(weak)), strict=True):
        if f"pydense::{isa}::" in readable:
            continue
        level, example = functions.get(name, (SSE, ""))
        if letter == "W" and level > SSE:
            report.leaks.append(
                f"{path}: weak {readable} is not in pydense::{isa} and has"
                f" {LEVEL_NAMES[level]} code, e.g. '{example}'"
            )
        else:
            report.shared.add(readable)


def check(build: Path) -> Report:
    report = Report()
    for target, path in objects(build):
        report.objects[target] += 1
        machine = elf_machine(path)
        if machine == ELF_X86_64:
            check_object(target, path, report)
        else:
            report.foreign += 1
    return report


def print_report(build: Path, report: Report, verbose: bool) -> None:
    print(f"check_isa: {build}")
    for target, count in sorted(report.objects.items()):
        level = LEVEL_NAMES[report.levels[target]] if target in report.levels else "not x86-64"
        print(f"  {target:<24} {count:>3} objects, up to {level}")
    if report.foreign:
        print(f"  {report.foreign} objects are for processors with one ISA: nothing can leak")
    print(f"  {len(report.shared)} shared weak symbols of ISA units, all data or plain SSE code")
    if verbose:
        for name in sorted(report.shared):
            print(f"    shared: {name}")
    for leak in report.leaks:
        print(f"  LEAK {leak}")
    print(f"check_isa: {len(report.leaks)} leaks")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look for instructions outside their ISA's units.")
    parser.add_argument("build", type=Path, help="CMake build folder")
    parser.add_argument("-v", "--verbose", action="store_true", help="list shared weak symbols")
    options = parser.parse_args(arguments)
    for tool in ("objdump", "nm", "c++filt"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is needed: install binutils")
    report = check(options.build)
    if not report.objects:
        parser.error(f"{options.build} holds no object files: build it first")
    print_report(options.build, report, options.verbose)
    return 1 if report.leaks else 0


if __name__ == "__main__":
    sys.exit(main())
