# SPDX-License-Identifier: Apache-2.0
"""Every upsampling case through pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Few rounds, to stay quick: use ``python -m benchmarks.bench_upsample`` for figures worth quoting.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks._harness import set_threads, stages_of, time_call
from benchmarks._machine import available_cpus
from benchmarks._upsample_cases import Problem, case_of, problems


@pytest.mark.parametrize("threads", sorted({1, available_cpus()}))
@pytest.mark.parametrize(
    ("problem", "label"),
    [
        pytest.param(problem, label, id=f"{problem.name}-{label.replace(' ', '-')}")
        for problem in problems()
        for label in problem.rivals
        if "bf16" not in problem.name or "deconvolution" not in label  # seconds per call
    ],
)
def test_upsample(benchmark: Any, problem: Problem, label: str, threads: int) -> None:
    """Forward and backward."""
    case = case_of(problem)
    stages = stages_of(case.setup()[label])
    set_threads(threads)
    benchmark.group = case.name
    benchmark.extra_info.update(case.params, rival=label, threads=threads)
    out, *grads = benchmark.pedantic(lambda: time_call(stages)[1], rounds=2, warmup_rounds=1)
    assert tuple(out.shape[2:]) == problem.size and all(g.isfinite().all() for g in grads)
