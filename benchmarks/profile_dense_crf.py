# SPDX-License-Identifier: Apache-2.0
"""Where the time of a dense CRF goes: the calls into the compiled core, one by one.

    python -m benchmarks.profile_dense_crf [--threads 1 2] [--case coffee] [--repeats 7]

Prints milliseconds, the fastest of the repeats, which alternate between the thread counts. These
are hints for whoever tunes the kernels; the comparison is ``benchmarks.bench_dense_crf``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks._crf_cases import (
    ITERATIONS,
    PARAMETERS,
    PROBLEMS,
    Problem,
    features,
    load_picture,
    make_unary,
)
from benchmarks._machine import available_cpus


class Stopwatch:
    """Fastest milliseconds of a call for each thread count."""

    def __init__(self, threads: Sequence[int], repeats: int) -> None:
        self.threads = threads
        self.repeats = repeats
        self.rows: dict[str, list[float]] = {}

    def __call__(self, step: str, call: Callable[[], Any], less: str = "", parts: int = 1) -> Any:
        """Row ``step`` becomes (time of ``call`` - row ``less``) / parts; returns the value."""
        from pydense import _core

        fastest = [float("inf")] * len(self.threads)
        value = None
        for _ in range(self.repeats):
            for column, count in enumerate(self.threads):
                _core.set_num_threads(count)
                value = None
                start = time.perf_counter()
                value = call()
                spent = (time.perf_counter() - start) * 1e3
                fastest[column] = min(fastest[column], spent)
        start_at = self.rows[less] if less else [0.0] * len(fastest)
        self.rows[step] = [(f - s) / parts for f, s in zip(fastest, start_at, strict=True)]
        return value


def profile(problem: Problem, watch: Stopwatch) -> dict[str, float]:
    """Fills the stopwatch's rows for one case; returns figures of the lattices."""
    from pydense import _core

    p = PARAMETERS[problem.parameters]
    image = load_picture(problem.picture, problem.height, problem.width)
    unary = make_unary(problem.height, problem.width, problem.labels)
    labels, points = unary.shape
    pair = watch("features (NumPy)", lambda: features(image, p))
    lattices = {
        len(f): watch(f"lattice d{len(f)}", partial(_core.Lattice, f, "symmetric")) for f in pair
    }
    one = np.ones((1, points), np.float32)
    for d, lattice in lattices.items():
        watch(f"filter d{d}, 1 channel", partial(lattice.filter, one))
        watch(f"filter d{d}, {labels} channels", partial(lattice.filter, unary))

    def prepare(kernels: Sequence[int]) -> Any:
        field = _core.MeanField(points, labels)
        field.set_unary(unary)
        weights = {2: p.gaussian_weight, 5: p.bilateral_weight}
        for d in kernels:
            field.add_pairwise(lattices[d], np.array(weights[d], np.float32))
        return field

    chosen: dict[str, tuple[int, ...]] = {"no kernel": (), "d2": (2,), "d5": (5,), "both": (2, 5)}
    for name, kernels in chosen.items():
        field = watch(f"set_unary, add_pairwise: {name}", partial(prepare, kernels))
        watch(f"run(1): {name}", partial(field.run, 1))
        more = f"run, each further iteration: {name}"
        watch(more, partial(field.run, 1 + ITERATIONS), f"run(1): {name}", ITERATIONS)
    q = watch("start (softmax)", field.start)
    watch("step: both", lambda: field.step(q))
    figures = {}
    for d, lattice in lattices.items():
        figures[f"vertices / points, d{d}"] = lattice.num_vertices / points
        figures[f"MiB of the lattice, d{d}"] = lattice.nbytes / 2**20
    return figures


def main() -> None:
    """Prints one table per case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_dense_crf")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, available_cpus()}))
    parser.add_argument("--case", default="", help="only cases with this text in their name")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    from pydense import _core

    print(f"{_core.cpu_capability()}, milliseconds with {options.threads} threads")
    for problem in PROBLEMS:
        if options.case in problem.name:
            watch = Stopwatch(options.threads, options.repeats)
            figures = profile(problem, watch)
            print(problem.name)
            for step, row in watch.rows.items():
                print(f"  {step:44s}" + "".join(f"{value:9.2f}" for value in row))
            for name, value in figures.items():
                print(f"  {name:44s}{value:9.2f}")


if __name__ == "__main__":
    main()
