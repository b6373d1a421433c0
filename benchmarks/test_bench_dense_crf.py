# SPDX-License-Identifier: Apache-2.0
"""Every dense-CRF case through pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Few rounds, to stay quick, and one rival after the other: use ``python -m
benchmarks.bench_dense_crf`` for figures that are worth quoting. ``--benchmark-group-by=group``
prints the rivals of a case together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks._crf_cases import PROBLEMS, Problem, available
from benchmarks._crf_rivals import COLD, DROP_IN, PLAIN_TORCH, PYDENSECRF, WARM, pydensecrf
from benchmarks._harness import set_threads, stages_of, time_call
from benchmarks._machine import available_cpus
from benchmarks.bench_dense_crf import case_of

ROUNDS = 2


def _combinations() -> list[Any]:
    """Every case with each rival at 1 and all threads, pydensecrf only where it is installed."""
    counts = sorted({1, available_cpus()})
    runs = [(label, count) for label in (COLD, WARM, DROP_IN, PLAIN_TORCH) for count in counts]
    if pydensecrf() is not None:
        runs.append((PYDENSECRF, 1))
    return [
        pytest.param(problem, label, count, id=f"{problem.name}-{label.replace(' ', '-')}-{count}t")
        for problem in available(PROBLEMS)
        for label, count in runs
        if label != PLAIN_TORCH or problem.plain_torch
    ]


@pytest.mark.parametrize(("problem", "label", "threads"), _combinations())
def test_dense_crf(benchmark: Any, problem: Problem, label: str, threads: int) -> None:
    """Build and ten iterations."""
    case = case_of(problem)
    stages = stages_of(case.setup()[label])
    set_threads(threads)
    benchmark.group = case.name
    benchmark.extra_info.update(case.params, rival=label, threads=threads)
    clear = case.before.get(label, lambda: None)
    q = benchmark.pedantic(
        lambda: time_call(stages)[1], setup=lambda: clear() and None, rounds=ROUNDS, warmup_rounds=1
    )
    labels = 1 if np.ndim(q) == 4 else 0
    np.testing.assert_allclose(np.asarray(q).sum(axis=labels), 1, atol=1e-4)
