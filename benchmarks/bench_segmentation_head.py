# SPDX-License-Identifier: Apache-2.0
"""Segmentation heads on the CPU: upsampled argmax, cross-entropy and softmax beside torch.

    python -m benchmarks.bench_segmentation_head                    # writes a result
    python -m benchmarks.bench_segmentation_head --isa avx512 avx2  # a process per instruction set
    python -m benchmarks.bench_segmentation_head --quick            # seconds; writes nothing

:mod:`benchmarks._head_cases` lists the cases and the rivals.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._harness import Case, run_cases
from benchmarks._head_cases import (
    PROBLEMS,
    QUICK,
    Problem,
    compare,
    moved_bytes,
    prime,
    rivals_of,
)
from benchmarks._machine import available_cpus, commit, describe, measure_peaks
from benchmarks._memory import peak_memory
from benchmarks._result import load_result, make_result, write_result

NAME = "segmentation_head"
TITLE = (
    "Segmentation heads on the CPU: bilinear upsampling with argmax, with cross-entropy (forward "
    "and backward) and with softmax"
)
MODULE = "benchmarks.bench_segmentation_head"
ATEN_NAMES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "amx": "avx512"}

Peaks = Mapping[int, Mapping[str, float]]


def case_of(problem: Problem) -> Case:
    """The harness case of a problem."""
    return Case(
        name=problem.name,
        setup=partial(rivals_of, problem),
        params={
            "shape": list(problem.shape),
            "size": list(problem.size),
            "dtype": problem.dtype,
            "logits": problem.logits,
        },
        prime=prime,
        check=partial(compare, problem),
        moved=partial(moved_bytes, problem),
    )


def make_case(name: str) -> Case:
    """The case called ``name``; for the child process that measures memory."""
    for problem in PROBLEMS + QUICK:
        if problem.name == name:
            return case_of(problem)
    raise ValueError(f"make_case: name must be a case of this benchmark, got {name!r}")


def measure(options: argparse.Namespace, peaks: Peaks) -> list[Any]:
    """All runs of this process: its CPU capability, the chosen cases and thread counts."""
    from pydense import _core

    problems = [p for p in (QUICK if options.quick else PROBLEMS) if options.case in p.name]
    if not problems:
        raise SystemExit(f"no case has {options.case!r} in its name")
    capability = _core.cpu_capability()
    print(f"instruction set: {capability}", file=sys.stderr)
    runs = run_cases(
        [case_of(problem) for problem in problems],
        rounds=options.rounds,
        threads=options.threads,
        peaks=peaks,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for run in runs:
        run["isa"] = capability
        if not options.no_memory and run["threads"] == options.threads[0]:
            run["memory"] = {
                label: peak_memory(MODULE, run["case"], label, rival["threads"])
                for label, rival in run["rivals"].items()
            }
    return runs


def measure_isa(arguments: Sequence[str], isa: str, peaks: Peaks) -> list[Any]:
    """The runs of a child process with one instruction set forced, on torch's kernels as well."""
    with tempfile.TemporaryDirectory() as folder:
        limits, output = Path(folder) / "peaks.json", Path(folder) / "result.json"
        limits.write_text(json.dumps(peaks))
        command = [sys.executable, "-m", MODULE, *arguments]
        command += ["--peaks", str(limits), "--output", str(output)]
        environment = {**os.environ, "PYDENSE_CPU_CAPABILITY": isa}
        if isa in ATEN_NAMES:
            environment["ATEN_CPU_CAPABILITY"] = ATEN_NAMES[isa]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        runs: list[Any] = load_result(output)["runs"]
    used = {run["isa"] for run in runs}
    if used != {isa}:
        raise SystemExit(f"--isa {isa}: this machine ran {', '.join(sorted(used))} instead")
    return runs


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, available_cpus()}))
    parser.add_argument("--isa", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--rounds", type=int, help="default 7, quick 3")
    parser.add_argument("--case", default="", help="only cases with this text in their name")
    parser.add_argument("--quick", action="store_true", help="small cases, to see that it works")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory processes")
    parser.add_argument("--peaks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output",
        type=Path,
        help=f"result file (default benchmarks/results/{NAME}.json, none with --quick or --case)",
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 7)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its result; writes it unless only a part was run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    shared = ["--threads", *map(str, options.threads), "--rounds", str(options.rounds)]
    shared += ["--case", options.case] if options.case else []
    shared += ["--quick"] * options.quick + ["--no-memory"] * options.no_memory
    if options.peaks:
        peaks = {int(k): v for k, v in json.loads(options.peaks.read_text()).items()}
    else:
        peaks = {count: measure_peaks(count, quick=options.quick) for count in options.threads}
    if options.isa:
        runs = [run for isa in options.isa for run in measure_isa(shared, isa, peaks)]
    else:
        runs = measure(options, peaks)
    import pydense

    machine = describe(("torch", "numpy"))
    built = pydense.build_info()
    machine["packages"] = {"pydense": built["version"], **machine["packages"]}
    machine["build"] = {key: built[key] for key in ("compiler", "build_type", "cpu_capabilities")}
    isa = ["--isa", *options.isa] if options.isa else []
    result = make_result(
        NAME,
        TITLE,
        runs=runs,
        machine=machine,
        peaks=peaks,
        command=shlex.join(["python", "-m", MODULE, *shared, *isa]),
        commit=commit(),
    )
    if options.output or not (options.quick or options.case):
        print(f"wrote {write_result(result, options.output).name}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
