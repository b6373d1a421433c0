# SPDX-License-Identifier: Apache-2.0
"""Plants faults in CUDA kernels, one at a time, and counts those that the tests notice.

    python tests/simt/mutate.py upsample                  # all faults of a room
    python tests/simt/mutate.py upsample --sample 60      # as many of them
    python tests/simt/mutate.py upsample --pytest         # what is left, by the tests in Python too
    python tests/simt/mutate.py segmentation_head --part cross_entropy   # with a driver of its own

Needs a build with PYDENSE_SIMT=ON (``--build``, default build/simt), whose compiler calls it
repeats. Faults are planted in ``csrc/<room>/*.cuh`` and ``*.cu``: a barrier left out, ``<`` for
``<=``, a constant moved by one, min for max, an atomic operation made plain, another shuffle, and
so on. Each is tried in turn until a driver notices: first with kernels that are compiled without
optimization, which is quick, then in the builds release and trace, last in asan without
optimization. A fault that leaves release's machine code as it is, or does not compile, is not
counted. With ``--log``, what a former run noticed is not tried again. Faults that are explained
(below) are planted together, last, and one by one only where that is noticed.

What nothing notices must be explained in ``tests/simt/survivors/<room>.txt``, a paragraph each:
the file, the line before, the line after, and the reason why no result changes. A reason that
begins with "A fault" is one why it is not tested for: such a fault counts as missed. Exit status 0:
at least 95 % of those that change a result are noticed, and all others are explained.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from planted_faults import ROOT, Fault, explanations, faults_of, sample_of

SURVIVORS = Path(__file__).with_name("survivors")
GOAL = 0.95
# Read once: most of a compiler call would be these.
PRECOMPILED = """#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/launch.cuh"
"""


class Stage(NamedTuple):
    """One way to try a fault."""

    name: str
    build: str
    options: tuple[str, ...] = ()


STAGES = (
    Stage("release -O0", "release", ("-O0",)),
    Stage("release", "release"),
    Stage("trace", "trace"),  # its counts are of optimized code
    Stage("asan -O0", "asan", ("-O0",)),
)
PYTEST = Stage("pytest", "")


class Harness:
    """Compiles and runs the driver of a room, or of a part of it, with one file replaced."""

    def __init__(self, room: str, part: str, build: Path, folder: Path) -> None:
        self.room, self.part, self.build, self.folder = room, part, build, folder
        drivers = (ROOT / "tests" / "simt").glob(f"test_{room}_*.cpp")
        self.parts = tuple(driver.stem.removeprefix(f"test_{room}_") for driver in drivers)
        entries = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
        kernels = (Path(e["file"]) for e in entries if f"/csrc/{room}/" in e["file"])
        self.all_sources = sorted({path for path in kernels if path.suffix == ".cu"})
        self.sources = [path for path in self.all_sources if self.is_own(path)]
        self.commands = {
            (target[1], Path(entry["file"])): shlex.split(entry["command"])
            for entry in entries
            if (target := re.search(r"CMakeFiles/([^/]+)\.dir/", entry["command"]))
        }
        self.seconds: dict[str, float] = {}  # of a build's driver without a fault
        self.affected = list(self.sources)  # by the planted fault

    def is_own(self, path: Path) -> bool:
        """Of the part, or of the room without the parts that have drivers of their own."""
        if self.part:
            return path.name.startswith(self.part)
        return not self.parts or not path.name.startswith(self.parts)

    def files(self) -> list[Path]:
        """Where faults are planted."""
        found = sorted((ROOT / "csrc" / self.room).iterdir())
        return [path for path in found if path.suffix in (".cu", ".cuh") and self.is_own(path)]

    @property
    def name(self) -> str:
        return f"{self.room}_{self.part}" if self.part else self.room

    def words(self, source: Path, target: str, options: Sequence[str]) -> list[str]:
        """The build's compiler call without files of dependencies, input and output."""
        words = list(self.commands[target, source])
        words = words[1:] if words[0].endswith("ccache") else words
        for flag in ("-o", "-c", "-MT", "-MF", "-x"):
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        words = [word for word in words if word not in ("-MD", "-Werror")]
        # Before the tree's own, and under its names.
        words[1:1] = [f"-I{self.folder / 'csrc'}", f"-ffile-prefix-map={self.folder}/="]
        return [*words, *options, "-w"]

    def precompiled(self, words: Sequence[str], label: str) -> Path:
        header = self.folder / f"{label}.h"
        if not header.exists():
            header.write_text(PRECOMPILED, encoding="utf-8")
            output = ["-x", "c++-header", "-c", str(header), "-o", f"{header}.gch"]
            subprocess.run([*words, *output], cwd=self.build, check=True)
        return header

    def compile(self, source: Path, target: str, options: Sequence[str]) -> Path | None:
        """The object of a source with the planted fault, None where it does not compile."""
        words = self.words(source, target, options)
        label = f"{target}{''.join(options)}"
        output = self.folder / f"{label}-{source.stem}.o"
        overlay = self.folder / "csrc" / source.relative_to(ROOT / "csrc")
        header = self.precompiled(words, label)
        words += ["-include", str(header), "-x", "c++", "-c"]
        words.append(str(overlay if overlay.exists() else source))
        done = subprocess.run(
            [*words, "-o", str(output)], cwd=self.build, capture_output=True, text=True
        )
        return output if done.returncode == 0 else None

    def link(self, build: str, objects: Sequence[Path]) -> Path:
        """The driver with these objects in place of the room's own."""
        program = self.folder / f"driver-{build}"
        tests = self.build / "tests" / "simt" / "CMakeFiles"
        shim = sorted((tests / f"simt_shim_{build}.dir").glob("*.o"))
        driver = sorted((tests / f"simt_{self.name}_{build}.dir").glob("*.o"))
        core = self.build / "libpydense_core.a"
        # First the objects with the fault: of an inline function, the first copy is taken.
        words = ["g++", *objects, *shim, *driver, core, "-o", program]
        words += ["-fsanitize=address,undefined"] if build == "asan" else []
        subprocess.run([str(word) for word in words], check=True)
        return program

    def own_object(self, target: str, source: Path) -> Path:
        """The object of the build itself."""
        words = self.commands[target, source]
        return self.build / words[words.index("-o") + 1]

    def includers(self, path: Path) -> list[Path]:
        """The sources that a file is part of."""
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

    def plant(self, faults: Sequence[Fault]) -> None:
        """All of these, which are of different lines, and no others."""
        shutil.rmtree(self.folder / "csrc", ignore_errors=True)
        paths = {fault.path for fault in faults}
        for path in paths:
            target = self.folder / "csrc" / path.relative_to(ROOT / "csrc")
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines()
            for fault in faults:
                if fault.path == path:
                    lines[fault.line] = fault.after
            target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        affected = {source for path in paths for source in self.includers(path)}
        self.affected = sorted(affected)

    def attempt(self, stage: Stage) -> str:
        """ "noticed", "never ends", "unnoticed", "same code" or "does not compile"."""
        if stage == PYTEST:
            return self.attempt_pytest()
        target = f"simt_kernels_{stage.build}"
        objects = []
        for source in self.affected:
            compiled = self.compile(source, target, stage.options)
            if compiled is None:
                return "does not compile"
            objects.append(compiled)
        if stage.name == "release" and all(
            code_of(path) == code_of(self.own_object(target, source))
            for path, source in zip(objects, self.affected, strict=True)
        ):
            return "same code"
        objects += [self.own_object(target, s) for s in self.all_sources if s not in self.affected]
        return self.execute(stage, self.link(stage.build, objects))

    def execute(self, stage: Stage, program: Path) -> str:
        usual = self.seconds.get(stage.build)
        limit = None if usual is None else 10 + 8 * int(usual)  # of processor time

        def set_limits() -> None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [program, "--first-failure"], capture_output=True, preexec_fn=set_limits
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.seconds.setdefault(stage.build, after.ru_utime - before.ru_utime)
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "never ends"
        return "noticed" if done.returncode != 0 else "unnoticed"

    def without_fault(self, stage: Stage) -> str:
        """By the build's own driver, and without optimization, where nothing may fail either."""
        if stage == PYTEST or stage.name == "release -O0":
            state = self.attempt(stage)
            if stage == PYTEST or state != "unnoticed":
                return state
        program = self.build / "tests" / "simt" / f"simt_{self.name}_{stage.build}"
        return self.execute(stage, program)

    def attempt_pytest(self) -> str:
        """The same by the tests of the operators in Python, with ``backend`` simt."""
        library = self.folder / "libpydense_simt.so"
        objects = [self.compile(source, "libpydense_simt", ()) for source in self.affected]
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


class Log:
    """What former runs noticed: a line of JSON for each fault."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.verdicts: dict[tuple[int, tuple[str, str, str]], str] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                number, key, verdict = json.loads(line)
                self.verdicts[number, tuple(key)] = verdict

    def find(self, fault: Fault) -> str | None:
        verdict = self.verdicts.get((fault.line, fault.key))
        return None if verdict == "unnoticed" else verdict

    def add(self, fault: Fault, verdict: str) -> None:
        if self.path is not None and self.verdicts.get((fault.line, fault.key)) != verdict:
            self.verdicts[fault.line, fault.key] = verdict
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([fault.line, fault.key, verdict]) + "\n")


def verdict_on(harness: Harness, faults: Sequence[Fault], stages: Sequence[Stage]) -> str:
    harness.plant(faults)
    for stage in stages:
        state = harness.attempt(stage)
        if state == "noticed":
            return f"noticed by {stage.name}"
        if state == "never ends":
            return f"noticed by {stage.name}, which takes too long"
        if state != "unnoticed":
            return state
    return "unnoticed"


def all_at_once(
    harness: Harness, faults: Sequence[Fault], stages: Sequence[Stage], log: Log
) -> dict[Fault, str]:
    """Verdicts on faults that probably nothing notices: nothing together, nothing each."""
    verdicts: dict[Fault, str] = {}
    first = {(fault.path, fault.line): fault for fault in reversed(faults)}
    group = list(first.values())
    if group and (verdict := verdict_on(harness, group, stages)) in ("unnoticed", "same code"):
        verdicts = dict.fromkeys(group, verdict)
    elif len(group) > 1:
        middle = len(group) // 2
        for half in (group[:middle], group[middle:]):
            verdicts |= all_at_once(harness, half, stages, log)
    elif group:
        verdicts = {group[0]: verdict}
    for fault, verdict in verdicts.items():
        log.add(fault, verdict)
    others = [fault for fault in faults if fault not in verdicts]
    return verdicts | all_at_once(harness, others, stages, log) if others else verdicts


def run(options: argparse.Namespace, folder: Path) -> int:
    harness = Harness(options.room, options.part, options.build.resolve(), folder)
    if not harness.sources:
        print(f"mutate: {options.build} holds no CUDA kernels of {options.room}")
        return 2
    stages = (*STAGES, PYTEST) if options.pytest else STAGES
    for stage in stages:
        if (state := harness.without_fault(stage)) != "unnoticed":
            print(f"mutate: without a fault, the tests must pass in {stage.name}; it is: {state}")
            return 2
    every = [fault for path in harness.files() for fault in faults_of(path)]
    faults = sample_of(every, options.sample, options.seed)
    print(f"mutate: {len(faults)} of {len(every)} faults", flush=True)
    explained = explanations(SURVIVORS / f"{harness.name}.txt")
    log = Log(options.log)
    verdicts: dict[Fault, str] = {}
    start = time.monotonic()

    def judge(fault: Fault, verdict: str) -> None:
        if verdict == "unnoticed":
            reason = explained.get(fault.key)
            kind = "is no fault" if reason and not reason.startswith("A fault") else "missed"
            verdict = f"unnoticed, {kind}: {reason}" if reason else "UNNOTICED"
        verdicts[fault] = verdict
        print(f"{len(verdicts)}/{len(faults)} {verdict}: {fault.title()}", flush=True)

    hopeless = []
    for fault in faults:
        verdict = log.find(fault)
        if verdict is None and fault.key in explained:
            hopeless.append(fault)
            continue
        if verdict is None:
            verdict = verdict_on(harness, [fault], stages)
            log.add(fault, verdict)
        judge(fault, verdict)
    for fault, verdict in all_at_once(harness, hopeless, stages, log).items():
        judge(fault, verdict)
    tally = Counter(verdict.split(":")[0] for verdict in verdicts.values())
    unexplained = [fault for fault, verdict in verdicts.items() if verdict == "UNNOTICED"]
    noticed = sum(count for verdict, count in tally.items() if verdict.startswith("noticed"))
    counted = noticed + tally["unnoticed, missed"] + len(unexplained)
    for verdict, count in tally.most_common():
        print(f"{count:>5} {verdict}")
    print(
        f"mutate: {noticed} of {counted} faults noticed ({100 * noticed / max(counted, 1):.1f} %), "
        f"{time.monotonic() - start:.0f} s"
    )
    for fault in unexplained:
        print("\n" + "\n".join(fault.key) + "\n(reason)")
    return 0 if noticed >= GOAL * counted and not unexplained else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults in CUDA kernels.")
    parser.add_argument("room", help="a folder of csrc")
    parser.add_argument("--part", default="", help="its files that begin so, with their own driver")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "simt")
    parser.add_argument("--sample", type=int, default=0, help="so many faults, chosen evenly")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="verdicts, read and added to")
    parser.add_argument("--pytest", action="store_true", help="the tests in Python as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return run(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
