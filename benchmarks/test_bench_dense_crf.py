# SPDX-License-Identifier: Apache-2.0
"""Every dense-CRF case through pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Few rounds, to stay quick, and one rival after the other: use ``python -m
benchmarks.bench_dense_crf`` for figures that are worth quoting. ``--benchmark-group-by=group``
prints the rivals of a case together.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from benchmarks._crf_cases import PROBLEMS, Problem
from benchmarks._harness import set_threads, stages_of, time_call
from benchmarks._machine import available_cpus
from benchmarks.bench_dense_crf import case_of

ROUNDS = 2


def _combinations() -> list[Any]:
    """Every case with pydense at 1 and all threads, and with pydensecrf where that is installed."""
    runs = [("pydense", count) for count in sorted({1, available_cpus()})]
    if importlib.util.find_spec("pydensecrf"):
        runs.append(("pydensecrf", 1))
    return [
        pytest.param(problem, label, count, id=f"{problem.name}-{label}-{count}t")
        for problem in PROBLEMS
        for label, count in runs
    ]


@pytest.mark.parametrize(("problem", "label", "threads"), _combinations())
def test_dense_crf(benchmark: Any, problem: Problem, label: str, threads: int) -> None:
    """Build and ten iterations."""
    case = case_of(problem)
    stages = stages_of(case.setup()[label])
    set_threads(threads)
    benchmark.group = case.name
    benchmark.extra_info.update(case.params, rival=label, threads=threads)
    q = benchmark.pedantic(lambda: time_call(stages)[1], rounds=ROUNDS, warmup_rounds=1)
    np.testing.assert_allclose(q.sum(axis=0), 1, atol=1e-4)
