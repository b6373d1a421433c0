# SPDX-License-Identifier: Apache-2.0
"""Plants faults in CUDA kernels, one at a time, and counts those that the tests notice.

    python tests/simt/mutate.py upsample                  # all faults of a room
    python tests/simt/mutate.py upsample --sample 60      # as many, chosen at random
    python tests/simt/mutate.py upsample --pytest         # what is left, by the tests in Python too
    python tests/simt/mutate.py segmentation_head --part cross_entropy   # with a driver of its own

Needs a build with PYDENSE_SIMT=ON (``--build``, default build/simt), whose compiler calls it
repeats. Faults are planted in ``csrc/<room>/*.cuh`` and ``*.cu``: a barrier left out, ``<`` for
``<=``, a constant moved by one, min for max, an atomic operation made plain, another shuffle, and
so on. Each is tried in the builds release, trace and asan in turn until one notices. A fault that
leaves the machine code as it is, or does not compile, is not counted.

What no build notices must be explained in ``tests/simt/survivors/<room>.txt``, a paragraph each:
the file, the line before, the line after, and the reason why the kernel is still right (or why it
is worth no test). Exit status 0: at least 95 % of the others are noticed, and all are explained.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("survivors")
BUILDS = ("release", "trace", "asan")
TIMEOUT = 120  # seconds of a driver: a kernel that never ends is noticed too
GOAL = 0.95

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


class Mutant(NamedTuple):
    """One change of one line."""

    path: Path
    line: int  # from 0
    before: str
    after: str

    def title(self) -> str:
        name = self.path.relative_to(ROOT).as_posix()
        return f"{name}:{self.line + 1}: {self.before.strip()}  =>  {self.after.strip()}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every fault that can be planted in a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        code = line.split("//")[0]
        if SKIPPED.search(line):
            continue
        seen = {line}
        for pattern, replacement in OPERATORS:
            for match in re.finditer(pattern, code):
                new = match.expand(replacement) if isinstance(replacement, str) else None
                text = new if new is not None else replacement(match)  # type: ignore[operator]
                after = line[: match.start()] + text + line[match.end() :]
                if after not in seen:
                    seen.add(after)
                    yield Mutant(path, number, line, after)


class Harness:
    """Compiles and runs the driver of a room, or of a part of it, with one file replaced."""

    def __init__(self, room: str, part: str, build: Path, folder: Path) -> None:
        self.room, self.part, self.build, self.folder = room, part, build, folder
        entries = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
        self.sources = sorted(
            {
                Path(e["file"])
                for e in entries
                if f"/csrc/{room}/" in e["file"] and ".cu" in e["file"]
            }
        )
        self.commands = {
            (target, Path(entry["file"])): shlex.split(entry["command"])
            for entry in entries
            if (target := re.search(r"CMakeFiles/([^/]+)\.dir/", entry["command"]))
            and (target := target[1])
        }
        self.originals: dict[Path, bytes] = {}
        self.affected = list(self.sources)  # by the planted fault

    def files(self) -> list[Path]:
        """Of the part, or of the room without the parts that have drivers of their own."""
        found = (ROOT / "csrc" / self.room).iterdir()
        files = sorted(path for path in found if path.suffix in (".cu", ".cuh"))
        if self.part:
            return [path for path in files if path.name.startswith(self.part)]
        drivers = (ROOT / "tests" / "simt").glob(f"test_{self.room}_*.cpp")
        parts = tuple(driver.stem.removeprefix(f"test_{self.room}_") for driver in drivers)
        return [path for path in files if not path.name.startswith(parts)]

    @property
    def name(self) -> str:
        return f"{self.room}_{self.part}" if self.part else self.room

    def compile(self, source: Path, target: str) -> Path | None:
        """The object of a source with the planted fault, None where it does not compile."""
        words = list(self.commands[target, source])
        words = words[1:] if words[0].endswith("ccache") else words
        output = self.folder / f"{target}-{source.stem}.o"
        overlay = self.folder / "csrc" / source.relative_to(ROOT / "csrc")
        words[words.index("-o") + 1] = str(output)
        words[words.index("-c") + 1] = str(overlay if overlay.exists() else source)
        words = [word for word in words if not word.startswith("-M") and not word.endswith(".d")]
        words = [word for word in words if word not in ("-MT", "-MF") and word != "-Werror"]
        words = [word for word in words if not word.endswith(".o") or word == str(output)]
        # Before the tree's own, and under its names.
        words[1:1] = [f"-I{self.folder / 'csrc'}", f"-ffile-prefix-map={self.folder}/="]
        done = subprocess.run(words, cwd=self.build, capture_output=True, text=True)
        return output if done.returncode == 0 else None

    def link(self, build: str, objects: Sequence[Path]) -> Path:
        """The driver with these objects in place of the room's own."""
        program = self.folder / f"driver-{build}"
        tests = self.build / "tests" / "simt" / "CMakeFiles"
        shim = sorted((tests / f"simt_shim_{build}.dir").glob("*.o"))
        driver = sorted((tests / f"simt_{self.name}_{build}.dir").glob("*.o"))
        core = self.build / "libpydense_core.a"
        words = ["g++", *shim, *driver, *objects, core, "-o", program]
        words += ["-fsanitize=address,undefined"] if build == "asan" else []
        subprocess.run([str(word) for word in words], check=True)
        return program

    def own_object(self, target: str, source: Path) -> Path:
        """The object of the build itself."""
        words = self.commands[target, source]
        return self.build / words[words.index("-o") + 1]

    def includers(self, path: Path) -> list[Path]:
        """The sources of the room that a file is part of."""
        name = path.relative_to(ROOT / "csrc").as_posix()
        if path in self.sources:
            return [path]
        found = []
        for source in self.sources:
            seen, todo = set(), [source]
            while todo:
                text = todo.pop().read_text(encoding="utf-8")
                for included in re.findall(r'#include "([^"]+)"', text):
                    file = ROOT / "csrc" / included
                    if included not in seen and file.exists():
                        seen.add(included)
                        todo.append(file)
            if name in seen:
                found.append(source)
        return found

    def plant(self, mutant: Mutant) -> None:
        self.affected = self.includers(mutant.path)
        shutil.rmtree(self.folder / "csrc", ignore_errors=True)
        target = self.folder / "csrc" / mutant.path.relative_to(ROOT / "csrc")
        target.parent.mkdir(parents=True)
        lines = mutant.path.read_text(encoding="utf-8").splitlines()
        lines[mutant.line] = mutant.after
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def try_build(self, build: str) -> str:
        """ "noticed", "unnoticed", "same code" or "does not compile"."""
        target = f"simt_kernels_{build}"
        objects = []
        for source in self.affected:
            compiled = self.compile(source, target)
            if compiled is None:
                return "does not compile"
            objects.append(compiled)
        if build == "release":
            code = {path: code_of(path) for path in objects}
            if not self.originals:  # the first call is without a fault
                self.originals = code
            elif all(code[path] == self.originals[path] for path in objects):
                return "same code"
        objects += [self.own_object(target, s) for s in self.sources if s not in self.affected]
        program = self.link(build, objects)
        try:
            done = subprocess.run([program], capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "noticed"
        return "noticed" if done.returncode != 0 else "unnoticed"

    def try_pytest(self) -> str:
        """The same by the tests of the operators in Python, with ``backend`` simt."""
        library = self.folder / "libpydense_simt.so"
        objects = [self.compile(source, "libpydense_simt") for source in self.affected]
        if None in objects:
            return "does not compile"
        folder = self.build / "tests" / "simt" / "CMakeFiles" / "libpydense_simt.dir"
        replaced = {f"{source.name}.o" for source in self.affected}
        others = [path for path in folder.rglob("*.o") if path.name not in replaced]
        archive = self.build / "libpydense_core.a"
        import torch

        torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        words = ["g++", "-shared", *objects, *others, archive, torch_library, "-o", library]
        subprocess.run([str(word) for word in words], check=True)
        tests = sorted((ROOT / "tests").glob(f"test_ops_{self.room}*.py"))
        tests.append(ROOT / "tests" / "test_cuda.py")
        arguments = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "simt"]
        done = subprocess.run(
            [sys.executable, *arguments, *(str(path) for path in tests)],
            cwd=ROOT,
            env={**os.environ, "PYDENSE_SIMT_LIBRARY": str(library)},
            capture_output=True,
        )
        return "unnoticed" if done.returncode == 0 else "noticed"


def code_of(path: Path) -> bytes:
    """An object file without the names of source lines: code, constants and relocations."""
    stripped = path.with_suffix(".stripped")
    subprocess.run(["objcopy", "--strip-debug", str(path), str(stripped)], check=True)
    return stripped.read_bytes()


def explanations(path: Path) -> dict[tuple[str, str, str], str]:
    """Paragraphs of four lines or more: file, line before, line after, reason."""
    found = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines() if not line.startswith("#")]
        if len(lines) >= 4:
            found[lines[0], lines[1], lines[2]] = " ".join(lines[3:])
    return found


def key_of(mutant: Mutant) -> tuple[str, str, str]:
    name = mutant.path.relative_to(ROOT).as_posix()
    return name, mutant.before.strip(), mutant.after.strip()


def run(options: argparse.Namespace, folder: Path) -> int:
    harness = Harness(options.room, options.part, options.build.resolve(), folder)
    if not harness.sources:
        print(f"mutate: {options.build} holds no CUDA kernels of {options.room}")
        return 2
    for build in BUILDS:
        if (state := harness.try_build(build)) != "unnoticed":
            print(f"mutate: without a fault, the tests must pass in {build}; it is: {state}")
            return 2
    if options.pytest and (state := harness.try_pytest()) != "unnoticed":
        print(f"mutate: without a fault, the tests in Python must pass; it is: {state}")
        return 2
    mutants = [mutant for path in harness.files() for mutant in mutants_of(path)]
    if options.sample and options.sample < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    explained = explanations(SURVIVORS / f"{harness.name}.txt")
    tally: Counter[str] = Counter()
    unexplained = []
    start = time.monotonic()
    for number, mutant in enumerate(mutants, 1):
        harness.plant(mutant)
        verdict = "unnoticed"
        for build in BUILDS:
            verdict = harness.try_build(build)
            if verdict != "unnoticed":
                verdict = f"noticed by {build}" if verdict == "noticed" else verdict
                break
        if verdict == "unnoticed" and options.pytest and harness.try_pytest() == "noticed":
            verdict = "noticed by pytest"
        if verdict == "unnoticed":
            reason = explained.get(key_of(mutant))
            verdict = f"unnoticed, explained: {reason}" if reason else "UNNOTICED"
            unexplained += [] if reason else [mutant]
        tally[verdict.split(":")[0]] += 1
        print(f"{number}/{len(mutants)} {verdict}: {mutant.title()}", flush=True)
    noticed = sum(count for verdict, count in tally.items() if verdict.startswith("noticed"))
    share = noticed / max(noticed + len(unexplained), 1)
    for verdict, count in tally.most_common():
        print(f"{count:>5} {verdict}")
    print(
        f"mutate: {noticed} of {noticed + len(unexplained)} faults noticed ({100 * share:.1f} %), "
        f"{time.monotonic() - start:.0f} s"
    )
    for mutant in unexplained:
        print("\n" + "\n".join(key_of(mutant)) + "\n(reason)")
    return 0 if share >= GOAL and not unexplained else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults in CUDA kernels.")
    parser.add_argument("room", help="a folder of csrc")
    parser.add_argument("--part", default="", help="its files that begin so, with their own driver")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "simt")
    parser.add_argument("--sample", type=int, default=0, help="so many faults, chosen at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pytest", action="store_true", help="the tests in Python as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
