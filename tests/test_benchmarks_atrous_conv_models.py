# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the dispatch rule: its rivals agree, and a quick run writes a result."""

from __future__ import annotations

import pytest
from _benchmarks import _result

from benchmarks import _atrous_model_cases, bench_atrous_conv_models
from benchmarks._harness import stages_of, time_call

QUICK = {problem.name: problem for problem in _atrous_model_cases.quick_problems()}
ALL = {problem.name: problem for problem in _atrous_model_cases.problems()}


@pytest.mark.parametrize("name", list(QUICK))
def test_rivals_compute_the_same(name):
    case = bench_atrous_conv_models.make_case(name)
    rivals = {k: v for k, v in case.setup().items() if not k.startswith("torch.compile")}
    results = {label: time_call(stages_of(rival))[1] for label, rival in rivals.items()}
    figures = case.check(results)
    bound = 0.05 if name.endswith("bf16") else 1e-4
    assert len(figures) == 3
    assert all(f["max_relative_difference"] < bound for f in figures.values())


def test_the_cases_are_those_of_the_plan():
    assert len(ALL) == 2 * (2 * 36 + 10)
    one = ALL["packed/deeplabv3-os16-aspp-2048x33x33-256-rate18/bf16"]
    assert one.flop == 2 * 2048 * 256 * (3 * 33 - 36) ** 2 and not one.backward


def test_quick_run_writes_a_valid_result(tmp_path):
    path = tmp_path / "result.json"
    bench_atrous_conv_models.BENCHMARK.main(
        ["--quick", "--no-memory", "--threads", "1", "--output", str(path)]
    )
    result = _result.load_result(path)
    assert {run["case"] for run in result["runs"]} == set(QUICK)
