# SPDX-License-Identifier: Apache-2.0
"""Chained residual pooling on the CPU: pydense beside every form that torch offers.

    python -m benchmarks.bench_chained_residual_pool                    # writes the result
    python -m benchmarks.bench_chained_residual_pool --isa avx512 avx2  # a process for each
    python -m benchmarks.bench_chained_residual_pool --quick            # seconds; writes nothing

Max pooling with stride 1, the pooling block of RefineNet in two sizes, and HRNet's head. Forward
and backward go through autograd. Judged is pydense on contiguous tensors; the same on channels_last
tensors stands beside it.
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
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._harness import Case, run_cases
from benchmarks._machine import available_cpus, commit, describe, measure_peaks
from benchmarks._memory import peak_memory
from benchmarks._residual_pool_cases import case_of, problems, quick_problems
from benchmarks._result import load_result, make_result, write_result

NAME = "chained_residual_pool"
TITLE = "Chained residual pooling on the CPU, forward and backward: pydense on contiguous tensors"
MODULE = "benchmarks.bench_chained_residual_pool"
ATEN_NAMES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "amx": "avx512"}

Peaks = Mapping[int, Mapping[str, float]]


def make_case(name: str) -> Case:
    """The case called ``name``; for the child process that measures memory."""
    for problem in (*problems(), *quick_problems()):
        if problem.name == name:
            return case_of(problem)
    raise ValueError(f"make_case: name must be a case of this benchmark, got {name!r}")


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    found = quick_problems() if options.quick else problems()
    cases = [case_of(problem) for problem in found if options.case in problem.name]
    if not cases:
        raise SystemExit(f"no case has {options.case!r} in its name")
    return cases


def measure(options: argparse.Namespace, peaks: Peaks) -> list[Any]:
    """All runs of this process: its CPU capability, the chosen cases and thread counts."""
    from pydense import _core

    capability = _core.cpu_capability()
    print(f"instruction set: {capability}", file=sys.stderr)
    runs = run_cases(
        chosen(options),
        rounds=options.rounds,
        threads=options.threads,
        peaks=peaks,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for run in runs:
        run["isa"] = capability
        if not options.no_memory:
            run["memory"] = {
                label: _peak(run["case"], label, rival["threads"])
                for label, rival in run["rivals"].items()
                if not label.startswith(
                    "torch.compile"
                )  # a fresh process would measure its compiler
            }
    return runs


@cache
def _peak(case: str, label: str, threads: int) -> int:
    return peak_memory(MODULE, case, label, threads)


def measure_isa(arguments: Sequence[str], isa: str, peaks: Peaks) -> list[Any]:
    """The runs of a child process with one instruction set forced, on torch's kernels as well."""
    with tempfile.TemporaryDirectory() as folder:
        limits, output = Path(folder) / "peaks.json", Path(folder) / "result.json"
        limits.write_text(json.dumps(peaks))
        command = [sys.executable, "-m", MODULE, *arguments]
        command += ["--peaks", str(limits), "--output", str(output)]
        environment = {**os.environ, "PYDENSE_CPU_CAPABILITY": isa}
        # Code that torch.compile kept from another instruction set crashes.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        if isa in ATEN_NAMES:
            environment["ATEN_CPU_CAPABILITY"] = ATEN_NAMES[isa]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if not output.exists():
            raise SystemExit(f"--isa {isa}: the process ended with status {status}")
        runs: list[Any] = load_result(output)["runs"]
    used = {run["isa"] for run in runs}
    if used != {isa}:
        raise SystemExit(f"--isa {isa}: this machine ran {', '.join(sorted(used))} instead")
    return runs


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=(__doc__ or "").split("\n", 1)[0]
    )
    add = parser.add_argument
    counts = sorted({1, available_cpus()})
    add("--threads", type=int, nargs="+", default=counts, help="default: 1 and all")
    add("--isa", nargs="+", default=[], metavar="NAME", help="sets to force, a process for each")
    add("--rounds", type=int, help="measurements of each rival (default 9, quick 2)")
    add("--case", default="", help="only cases with this text in their name")
    add("--quick", action="store_true", help="small cases, to see that it works")
    add("--no-memory", action="store_true", help="skip the peak-memory processes")
    add("--peaks", type=Path, help=argparse.SUPPRESS)
    add("--output", type=Path, help=f"default results/{NAME}.json, none with --quick or --case")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 9)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its result; writes it unless only a part was run."""
    import pydense

    options = parse(sys.argv[1:] if arguments is None else arguments)
    shared = ["--threads", *map(str, options.threads), "--rounds", str(options.rounds)]
    shared += ["--case", options.case] if options.case else []
    shared += ["--quick"] * options.quick + ["--no-memory"] * options.no_memory
    if options.peaks:
        peaks: Peaks = {int(n): p for n, p in json.loads(options.peaks.read_text()).items()}
    else:
        peaks = {n: measure_peaks(n, quick=options.quick) for n in options.threads}
    if options.isa:
        runs = [run for isa in options.isa for run in measure_isa(shared, isa, peaks)]
    else:
        runs = measure(options, peaks)
    isa = ["--isa", *options.isa] if options.isa else []
    built = pydense.build_info()
    machine = describe(("torch", "numpy"))
    machine["packages"] = {"pydense": built["version"], **machine["packages"]}
    machine["build"] = {key: built[key] for key in ("compiler", "build_type", "cpu_capabilities")}
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
