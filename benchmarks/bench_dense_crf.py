# SPDX-License-Identifier: Apache-2.0
"""Dense CRF on the CPU: pydense beside pydensecrf, the package it replaces, and plain torch.

    python -m benchmarks.bench_dense_crf                    # writes results/dense_crf.json
    python -m benchmarks.bench_dense_crf --isa avx512 avx2  # a process per instruction set
    python -m benchmarks.bench_dense_crf --quick            # seconds; writes nothing

:mod:`benchmarks._crf_rivals` lists the rivals. Judged is the layer on torch tensors with an empty
lattice cache; the same with a filled cache, and the drop-in on NumPy arrays, stand beside it.
Exit status 1 where a label differs from a rival's although the probabilities decide it.
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
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._crf_cases import (
    ITERATIONS,
    PARAMETERS,
    PROBLEMS,
    QUICK,
    Problem,
    available,
    features,
    load_picture,
    moved_bytes,
    operations,
)
from benchmarks._crf_rivals import (
    COLD,
    PLAIN_TORCH,
    PYDENSECRF,
    VARIANTS,
    WARM,
    clear_cache,
    compare,
    prime,
    rivals_of,
)
from benchmarks._harness import Case, run_cases
from benchmarks._machine import available_cpus, commit, describe, measure_peaks
from benchmarks._memory import peak_memory
from benchmarks._result import load_result, make_result, write_result

NAME = "dense_crf"
TITLE = (
    f"Dense CRF on the CPU, {ITERATIONS} mean-field iterations, lattices and normalisation "
    "included: pydense.nn.DenseCRF on torch tensors, cold (empty lattice cache)"
)
MODULE = "benchmarks.bench_dense_crf"
PLAIN_TORCH_EVERY = 3  # rounds
ATEN_NAMES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512", "amx": "avx512"}

Peaks = Mapping[int, Mapping[str, float]]


@cache
def vertices(problem: Problem) -> dict[int, int]:
    """Number of lattice vertices by feature dimension."""
    from pydense import _core

    image = load_picture(problem.picture, problem.height, problem.width)
    pair = features(image, PARAMETERS[problem.parameters])
    return {len(f): _core.Lattice(f).num_vertices for f in pair}


def case_of(problem: Problem) -> Case:
    """The harness case of a problem."""
    points = problem.height * problem.width
    return Case(
        name=problem.name,
        setup=partial(rivals_of, problem),
        subject=COLD,
        variants=VARIANTS,
        params={
            "picture": problem.picture,
            "height": problem.height,
            "width": problem.width,
            "labels": problem.labels,
            "iterations": ITERATIONS,
            "kernels": str(PARAMETERS[problem.parameters]),
        },
        fixed_threads={PYDENSECRF: 1},
        every={PLAIN_TORCH: PLAIN_TORCH_EVERY},
        before={COLD: clear_cache},
        prime=prime,
        check=compare,
        moved=lambda: moved_bytes(points, problem.labels, vertices(problem)),
        flop=lambda: operations(points, problem.labels, vertices(problem)),
    )


def make_case(name: str) -> Case:
    """The case called ``name``; for the child process that measures memory."""
    for problem in PROBLEMS + QUICK:
        if problem.name == name:
            return case_of(problem)
    raise ValueError(f"make_case: name must be a case of this benchmark, got {name!r}")


def chosen(options: argparse.Namespace) -> list[Problem]:
    """The problems that the command line asks for and whose pictures are there."""
    problems = [p for p in (QUICK if options.quick else PROBLEMS) if options.case in p.name]
    if not problems:
        raise SystemExit(f"no case has {options.case!r} in its name")
    there = available(problems)
    for problem in problems:
        if problem not in there:
            print(f"{problem.name}: no picture, see PYDENSE_TEST_DATA", file=sys.stderr)
    if not there:
        raise SystemExit("no case has its picture on this machine")
    return there


def measure(options: argparse.Namespace, peaks: Peaks) -> list[Any]:
    """All runs of this process: its CPU capability, the chosen cases and thread counts."""
    from pydense import _core

    problems = chosen(options)
    capability = _core.cpu_capability()
    print(f"instruction set: {capability}", file=sys.stderr)
    runs = run_cases(
        [case_of(problem) for problem in problems],
        rounds=options.rounds,
        threads=options.threads,
        peaks=peaks,
        order=options.order,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for run in runs:
        run["isa"] = capability
        run["params"]["vertices"] = {
            f"d{d}": m
            for problem in problems
            if problem.name == run["case"]
            for d, m in vertices(problem).items()
        }
        if not options.no_memory:
            # Warm, the peak is lower by the lattice that stayed: nothing to learn from it.
            run["memory"] = {
                label: peak(run["case"], label, rival["threads"])
                for label, rival in run["rivals"].items()
                if label != WARM
            }
    return runs


@cache
def peak(case: str, label: str, threads: int) -> int:
    """Peak memory of a rival; once, if it has the same number of threads in several runs."""
    return peak_memory(MODULE, case, label, threads)


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
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        if not output.exists():
            raise SystemExit(f"--isa {isa}: the process ended with status {status}")
        runs: list[Any] = load_result(output)["runs"]
    used = {run["isa"] for run in runs}
    if used != {isa}:
        raise SystemExit(f"--isa {isa}: this machine ran {', '.join(sorted(used))} instead")
    return runs


def wrong_labels(runs: Sequence[Any]) -> list[str]:
    """Lines about runs in which a label differs although the probabilities decide it."""
    return [
        f"{run['case']}, {run['isa']}, {run['threads']} thread(s): {label} has other labels at "
        f"{figures['decided_labels_differ']} decided pixels"
        for run in runs
        for label, figures in run["checks"].items()
        if figures["decided_labels_differ"]
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_dense_crf", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, available_cpus()}),
        help="thread counts of pydense and torch (default: 1 and all)",
    )
    parser.add_argument(
        "--isa",
        nargs="+",
        default=[],
        metavar="NAME",
        help="instruction sets to force, each in its own process (default: the best, in this one)",
    )
    parser.add_argument(
        "--rounds", type=int, help="measurements of each rival (default 9, quick 3)"
    )
    parser.add_argument("--order", choices=("alternate", "random", "fixed"), default="alternate")
    parser.add_argument("--case", default="", help="only cases with this text in their name")
    parser.add_argument(
        "--quick", action="store_true", help="two small cases, to see that it works"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory processes")
    parser.add_argument("--peaks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output",
        type=Path,
        help=f"result file (default benchmarks/results/{NAME}.json, none with --quick or --case)",
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 9)
    return options


def child_arguments(options: argparse.Namespace) -> list[str]:
    """What a process with one instruction set gets: all options but --isa and --output."""
    arguments = ["--threads", *map(str, options.threads), "--rounds", str(options.rounds)]
    arguments += ["--order", options.order]
    if options.case:
        arguments += ["--case", options.case]
    return arguments + ["--quick"] * options.quick + ["--no-memory"] * options.no_memory


def machine() -> dict[str, Any]:
    """The machine, the packages, and how pydense was built."""
    import pydense

    text = describe(("torch", "pydensecrf2", "pydensecrf", "numpy", "scikit-image"))
    built = pydense.build_info()
    text["packages"] = {"pydense": built["version"], **text["packages"]}
    text["build"] = {key: built[key] for key in ("compiler", "build_type", "cpu_capabilities")}
    return text


def peaks_of(options: argparse.Namespace) -> Peaks:
    """The machine's limits by thread count: measured, or as the parent process measured them."""
    if options.peaks:
        read = json.loads(options.peaks.read_text())
        return {int(count): peak for count, peak in read.items()}
    peaks = {count: measure_peaks(count, quick=options.quick) for count in options.threads}
    for count, peak in peaks.items():
        rates = f"{peak['bandwidth'] / 1e9:.1f} GB/s, {peak['gemm'] / 1e9:.0f} GFLOP/s float32"
        print(f"limits with {count} thread(s): {rates}", file=sys.stderr)
    return peaks


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and returns its result; writes it unless only a part was run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    shared = child_arguments(options)
    peaks = peaks_of(options)
    if options.isa:
        runs = [run for isa in options.isa for run in measure_isa(shared, isa, peaks)]
    else:
        runs = measure(options, peaks)
    isa = ["--isa", *options.isa] if options.isa else []
    result = make_result(
        NAME,
        TITLE,
        runs=runs,
        machine=machine(),
        peaks=peaks,
        command=shlex.join(["python", "-m", MODULE, *shared, *isa]),
        commit=commit(),
    )
    if options.output or not (options.quick or options.case):
        print(f"wrote {write_result(result, options.output).name}", file=sys.stderr)
    return result


if __name__ == "__main__":
    wrong = wrong_labels(main()["runs"])
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong else 0)
