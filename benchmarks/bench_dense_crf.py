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

import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

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
from benchmarks._driver import Benchmark
from benchmarks._harness import Case

PLAIN_TORCH_EVERY = 3  # rounds
BY_NAME = {problem.name: problem for problem in PROBLEMS + QUICK}


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


def missing(case: Case) -> str:
    """Why the case cannot run on this machine."""
    return "" if available([BY_NAME[case.name]]) else "no picture, see PYDENSE_TEST_DATA"


def add_vertices(run: dict[str, Any]) -> None:
    """Notes the sizes of the lattices; not before, since that takes a build."""
    sizes = vertices(BY_NAME[run["case"]])
    run["params"]["vertices"] = {f"d{d}": count for d, count in sizes.items()}


def wrong_labels(runs: Sequence[Any]) -> list[str]:
    """Lines about runs in which a label differs although the probabilities decide it."""
    return [
        f"{run['case']}, {run['isa']}, {run['threads']} thread(s): {label} has other labels at "
        f"{figures['decided_labels_differ']} decided pixels"
        for run in runs
        for label, figures in run["checks"].items()
        if figures["decided_labels_differ"]
    ]


BENCHMARK = Benchmark(
    name="dense_crf",
    title=(
        f"Dense CRF on the CPU, {ITERATIONS} mean-field iterations, lattices and normalisation "
        "included: pydense.nn.DenseCRF on torch tensors, cold (empty lattice cache)"
    ),
    cases=lambda quick: [case_of(problem) for problem in (QUICK if quick else PROBLEMS)],
    packages=("torch", "pydensecrf2", "pydensecrf", "numpy", "scikit-image"),
    missing=missing,
    complete=add_vertices,
    memoryless=(WARM,),  # lower by the lattice that stayed: nothing to learn from it
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    wrong = wrong_labels(BENCHMARK.main()["runs"])
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong else 0)
