# SPDX-License-Identifier: Apache-2.0
"""The command line that comparisons share: what to run, in which processes, and what to write."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._harness import Case, run_cases
from benchmarks._machine import (
    available_cpus,
    commit,
    cpu_model,
    describe,
    measure_peaks,
    same_sources,
)
from benchmarks._memory import peak_memory
from benchmarks._result import RESULTS, load_result, make_result, write_result

# What torch's own kernels and oneDNN's, which choose for themselves, call an instruction set.
TORCH_NAMES = {
    "baseline": ("default", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16"),
    "amx": ("avx512", "AVX512_CORE_AMX"),
}

Peaks = Mapping[int, Mapping[str, float]]


def _nothing_missing(case: Case) -> str:
    return ""


def _nothing_to_add(run: dict[str, Any]) -> None:
    return None


@dataclass(frozen=True)
class Benchmark:
    """A comparison of rivals on the CPU.

    Attributes:
        name: Of the result file, and of the module ``benchmarks.bench_<name>``, which has
            ``make_case = BENCHMARK.make_case`` for the processes that measure memory.
        title: Heading of the tables.
        cases: The cases; given True, the small ones of ``--quick``.
        packages: Whose versions are noted.
        rounds: Measurements of each rival.
        missing: Why a case cannot run on this machine, empty where it can.
        complete: Adds to a finished run what only its end knows.
        memoryless: Labels of rivals whose peak memory means nothing.
    """

    name: str
    title: str
    cases: Callable[[bool], Sequence[Case]]
    packages: Sequence[str] = ("torch", "numpy")
    rounds: int = 9
    missing: Callable[[Case], str] = _nothing_missing
    complete: Callable[[dict[str, Any]], None] = _nothing_to_add
    memoryless: Collection[str] = ()

    @property
    def module(self) -> str:
        """What ``python -m`` runs."""
        return f"benchmarks.bench_{self.name}"

    def make_case(self, name: str) -> Case:
        """The case called ``name``.

        Raises:
            ValueError: There is none.
        """
        for case in (*self.cases(False), *self.cases(True)):
            if case.name == name:
                return case
        raise ValueError(f"make_case: name must be a case of this benchmark, got {name!r}")

    def chosen(self, options: argparse.Namespace) -> list[Case]:
        """The cases that the command line asks for and that can run here."""
        cases = [case for case in self.cases(options.quick) if options.case in case.name]
        if not cases:
            raise SystemExit(f"no case has {options.case!r} in its name")
        reasons = {case.name: self.missing(case) for case in cases}
        for name, reason in reasons.items():
            if reason:
                print(f"{name}: {reason}", file=sys.stderr)
        there = [case for case in cases if not reasons[case.name]]
        if not there:
            raise SystemExit("no case can run on this machine")
        return there

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The command line."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}", description=f"{self.title}."
        )
        add = parser.add_argument
        counts = sorted({1, available_cpus()})
        add("--threads", type=int, nargs="+", default=counts, help="default: 1 and all")
        add("--isa", nargs="+", default=[], metavar="NAME", help="to force, a process for each")
        add("--rounds", type=int, help=f"of each rival (default {self.rounds}, quick 2)")
        add("--order", choices=("alternate", "random", "fixed"), default="alternate")
        add("--case", default="", help="only cases with this text in their name")
        add("--quick", action="store_true", help="small cases, to see that it works")
        add("--no-memory", action="store_true", help="skip the peak-memory processes")
        add("--resume", action="store_true", help="keep what the result has; measure the rest")
        add("--older", action="store_true", help="with --resume: keep other commits and CPUs")
        add("--minutes", type=float, help="start no case after these; --resume goes on")
        add("--peaks", type=Path, help=argparse.SUPPRESS)
        written = f"default results/{self.name}.json, none with --quick or --case"
        add("--output", type=Path, help=written)
        options = parser.parse_args(arguments)
        if options.isa and (options.resume or options.minutes is not None):
            parser.error("--isa measures everything in one go: not with --resume or --minutes")
        if options.older and not options.resume:
            parser.error("--older says what --resume keeps: not without it")
        if options.minutes is not None and not options.minutes >= 0:
            parser.error(f"--minutes must be 0 or more, got {options.minutes}")
        options.rounds = options.rounds or (2 if options.quick else self.rounds)
        if not options.output and not (options.quick or options.case):
            options.output = RESULTS / f"{self.name}.json"
        return options

    def measure(
        self, options: argparse.Namespace, cases: Sequence[Case], peaks: Peaks
    ) -> list[Any]:
        """All runs of these cases in this process, with its CPU capability."""
        from pydense import _core

        capability = _core.cpu_capability()
        runs = run_cases(
            cases,
            rounds=options.rounds,
            threads=options.threads,
            peaks=peaks,
            order=options.order,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
        for run in runs:
            run["isa"], run["commit"], run["cpu"] = capability, commit(), cpu_model()
            self.complete(run)
            self.add_memory(run, options)
        return runs

    def add_memory(self, run: dict[str, Any], options: argparse.Namespace) -> None:
        """Measures the rivals' peak memory where the run does not have it yet."""
        # It hardly depends on the threads, and each figure costs a process.
        if options.no_memory or run["threads"] != options.threads[0] or "memory" in run:
            return
        run["memory"] = {
            label: peak_memory(self.module, run["case"], label, rival["threads"])
            for label, rival in run["rivals"].items()
            if label not in self.memoryless
        }

    def measure_isa(self, arguments: Sequence[str], isa: str, peaks: Peaks) -> list[Any]:
        """The runs of a process with one instruction set forced, on torch's kernels as well."""
        with tempfile.TemporaryDirectory() as folder:
            limits, output = Path(folder) / "peaks.json", Path(folder) / "result.json"
            limits.write_text(json.dumps(peaks))
            command = [sys.executable, "-m", self.module, *arguments]
            command += ["--peaks", str(limits), "--output", str(output)]
            environment = {**os.environ, "PYDENSE_CPU_CAPABILITY": isa}
            # Code that torch.compile kept from another instruction set crashes.
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
            if isa in TORCH_NAMES:
                aten, onednn = TORCH_NAMES[isa]
                environment.update(ATEN_CPU_CAPABILITY=aten, ONEDNN_MAX_CPU_ISA=onednn)
            status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            if not output.exists():
                raise SystemExit(f"--isa {isa}: the process ended with status {status}")
            runs: list[Any] = load_result(output)["runs"]
        used = {run["isa"] for run in runs}
        if used != {isa}:
            raise SystemExit(f"--isa {isa}: this machine ran {', '.join(sorted(used))} instead")
        return runs

    def main(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the benchmark and returns its result; writes it unless only a part was run."""
        options = self.parse(sys.argv[1:] if arguments is None else arguments)
        shared = _shared_arguments(options)
        isa = ["--isa", *options.isa] if options.isa else []
        before = self.kept(options)
        runs: list[Any] = before.get("runs", [])
        machine = _machine(self.packages)
        cases = [case for case in self.chosen(options) if _is_left(case, runs, options)]
        peaks = _peaks(options)

        def result_so_far() -> dict[str, Any]:
            result = make_result(
                self.name,
                self.title,
                runs=runs,
                machine=machine,
                peaks={**{int(n): p for n, p in before.get("peaks", {}).items()}, **peaks},
                command=shlex.join(["python", "-m", self.module, *shared, *isa]),
                commit=commit(),
            )
            if options.output:
                write_result(result, options.output)
            return result

        if options.isa:
            runs += [run for name in options.isa for run in self.measure_isa(shared, name, peaks)]
            return result_so_far()
        latest = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
        for run in runs:
            self.add_memory(run, options)
        result = result_so_far() if runs else {}
        for number, case in enumerate(cases, 1):
            new = self.measure(options, [case], peaks)
            again = {(run["case"], run["threads"]) for run in new}
            runs[:] = [run for run in runs if (run["case"], run["threads"]) not in again] + new
            result = result_so_far()  # an interruption loses one case
            if time.monotonic() > latest:
                print(f"{len(cases) - number} cases are left", file=sys.stderr)
                break
        return result

    def kept(self, options: argparse.Namespace) -> dict[str, Any]:
        """With ``--resume``, the result so far; empty where there is none.

        Raises:
            SystemExit: It is of other sources or another CPU and ``--older`` does not allow them,
                or of other packages: one table would mix what cannot be compared.
        """
        if not options.resume or not options.output or not options.output.exists():
            return {}
        result = load_result(options.output)
        where = f"--resume: {options.output.name} is of"
        if not same_sources(result["commit"]) and not options.older:
            raise SystemExit(f"{where} {result['commit']} (--older keeps its runs)")
        for run in result["runs"]:
            run.setdefault("commit", result["commit"])
            run.setdefault("cpu", result["machine"].get("cpu"))
        machine = _machine(self.packages)
        for key in ("packages", "build"):
            if result["machine"].get(key) != machine[key]:
                raise SystemExit(f"{where} another machine ({key})")
        if result["machine"].get("cpu") != machine["cpu"] and not options.older:
            raise SystemExit(f"{where} another CPU (--older keeps its runs)")
        return result


def _is_left(case: Case, runs: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> bool:
    """Whether a thread count of the case, with its size of today, was not measured yet."""
    there = {
        run["threads"]
        for run in runs
        if run["case"] == case.name and run["params"] == json.loads(json.dumps(case.params))
    }
    return not there.issuperset(options.threads)


def _shared_arguments(options: argparse.Namespace) -> list[str]:
    """What a process with one instruction set gets: all options but --isa and --output."""
    arguments = ["--threads", *map(str, options.threads), "--rounds", str(options.rounds)]
    arguments += ["--order", options.order]
    if options.case:
        arguments += ["--case", options.case]
    return arguments + ["--quick"] * options.quick + ["--no-memory"] * options.no_memory


def _machine(packages: Sequence[str]) -> dict[str, Any]:
    """The machine, the packages, and how pydense was built."""
    import pydense

    text = describe(packages)
    built = pydense.build_info()
    text["packages"] = {"pydense": built["version"], **text["packages"]}
    text["build"] = {key: built[key] for key in ("compiler", "build_type", "cpu_capabilities")}
    return text


def _peaks(options: argparse.Namespace) -> Peaks:
    """The machine's limits by thread count: measured, or as the parent process measured them."""
    if options.peaks:
        read = json.loads(options.peaks.read_text())
        return {int(count): peak for count, peak in read.items()}
    peaks = {count: measure_peaks(count, quick=options.quick) for count in options.threads}
    for count, peak in peaks.items():
        rates = f"{peak['bandwidth'] / 1e9:.1f} GB/s, {peak['gemm'] / 1e9:.0f} GFLOP/s float32"
        print(f"limits with {count} thread(s): {rates}", file=sys.stderr)
    return peaks
