# SPDX-License-Identifier: Apache-2.0
"""Dense CRF on the CPU: ``pydense.densecrf`` beside pydensecrf, the package it replaces.

    python -m benchmarks.bench_dense_crf                    # writes results/dense_crf.json
    python -m benchmarks.bench_dense_crf --isa avx512 avx2  # a process per instruction set
    python -m benchmarks.bench_dense_crf --quick            # seconds; writes nothing

Both packages get the same arrays through the same calls. Stage ``build`` is everything before
inference (unary, features, lattices, normalisation), ``inference`` is ten mean-field iterations up
to a NumPy view of Q. pydensecrf always runs on one thread with SSE2; where it is not installed
pydense is measured alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import ROOT
from benchmarks._crf_cases import (
    ITERATIONS,
    PARAMETERS,
    PROBLEMS,
    QUICK,
    Parameters,
    Problem,
    features,
    load_picture,
    make_unary,
    moved_bytes,
    operations,
)
from benchmarks._harness import Case, Rival, run_cases
from benchmarks._machine import available_cpus, commit, describe, measure_peaks
from benchmarks._memory import peak_memory
from benchmarks._result import load_result, make_result, write_result

NAME = "dense_crf"
TITLE = (
    f"Dense CRF on the CPU, {ITERATIONS} mean-field iterations: pydense.densecrf against pydensecrf"
)
MODULE = "benchmarks.bench_dense_crf"
MODULES = {"pydense": "pydense.densecrf", "pydensecrf": "pydensecrf.densecrf"}

Peaks = Mapping[int, Mapping[str, float]]


@cache
def rivals() -> dict[str, ModuleType]:
    """The installed packages by label; pydense has to be there, pydensecrf may be missing."""
    found = {"pydense": importlib.import_module(MODULES["pydense"])}
    try:
        found["pydensecrf"] = importlib.import_module(MODULES["pydensecrf"])
    except ImportError as error:
        print(f"pydensecrf is not importable ({error}): pydense is measured alone", file=sys.stderr)
    return found


def build(
    module: ModuleType,
    image: NDArray[np.uint8],
    unary: NDArray[np.float32],
    p: Parameters,
    _: object = None,
) -> Any:
    """Everything that precedes inference, in the calls that both packages share."""
    height, width = image.shape[:2]
    crf = module.DenseCRF2D(width, height, unary.shape[0])
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=p.gaussian_sxy, compat=p.gaussian_weight)
    crf.addPairwiseBilateral(
        sxy=p.bilateral_sxy, srgb=p.bilateral_srgb, rgbim=image, compat=p.bilateral_weight
    )
    return crf


def infer(crf: Any) -> NDArray[np.float32]:
    """Ten iterations; (L, N) probabilities."""
    return np.asarray(crf.inference(ITERATIONS))


def compare(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Differences of each rival's probabilities from pydense's.

    Returns:
        By rival ``max_abs_dq`` and ``labels_differ`` (number of pixels whose best label is
        another).
    """
    own = np.asarray(results["pydense"])
    return {
        label: {
            "max_abs_dq": float(np.abs(own - np.asarray(q)).max()),
            "labels_differ": int((own.argmax(axis=0) != np.asarray(q).argmax(axis=0)).sum()),
        }
        for label, q in results.items()
        if label != "pydense"
    }


@cache
def vertices(problem: Problem) -> dict[int, int]:
    """Number of lattice vertices by feature dimension."""
    from pydense import _core

    image = load_picture(problem.picture, problem.height, problem.width)
    pair = features(image, PARAMETERS[problem.parameters])
    return {len(f): _core.Lattice(f).num_vertices for f in pair}


def case_of(problem: Problem) -> Case:
    """The harness case of a problem."""
    p = PARAMETERS[problem.parameters]
    points = problem.height * problem.width

    def setup() -> Mapping[str, Rival]:
        image = load_picture(problem.picture, problem.height, problem.width)
        unary = make_unary(problem.height, problem.width, problem.labels)
        return {
            label: {"build": partial(build, module, image, unary, p), "inference": infer}
            for label, module in rivals().items()
        }

    return Case(
        name=problem.name,
        setup=setup,
        params={
            "picture": problem.picture,
            "height": problem.height,
            "width": problem.width,
            "labels": problem.labels,
            "iterations": ITERATIONS,
            "kernels": str(p),
        },
        fixed_threads={"pydensecrf": 1},
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
            run["memory"] = {
                label: peak_memory(MODULE, run["case"], label, run["threads"])
                for label in run["rivals"]
            }
    return runs


def measure_isa(arguments: Sequence[str], isa: str, peaks: Peaks) -> list[Any]:
    """The runs of a child process with one instruction set forced."""
    with tempfile.TemporaryDirectory() as folder:
        limits, output = Path(folder) / "peaks.json", Path(folder) / "result.json"
        limits.write_text(json.dumps(peaks))
        command = [sys.executable, "-m", MODULE, *arguments]
        command += ["--peaks", str(limits), "--output", str(output)]
        environment = {**os.environ, "PYDENSE_CPU_CAPABILITY": isa}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        runs: list[Any] = load_result(output)["runs"]
    used = {run["isa"] for run in runs}
    if used != {isa}:
        raise SystemExit(f"--isa {isa}: this machine ran {', '.join(sorted(used))} instead")
    return runs


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_dense_crf", description=TITLE)
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, available_cpus()}),
        help="thread counts of pydense (default: 1 and all)",
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

    text = describe(("pydensecrf2", "pydensecrf", "numpy", "scikit-image"))
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
    main()
