# SPDX-License-Identifier: Apache-2.0
"""The benchmark of atrous convolution: its rivals agree, and a quick run writes a result."""

from __future__ import annotations

import pytest
import torch
from _benchmarks import _result

from benchmarks import _atrous_conv_cases, bench_atrous_conv
from benchmarks._harness import stages_of, time_call

QUICK = {problem.name: problem for problem in _atrous_conv_cases.quick_problems()}
ALL = {problem.name: problem for problem in _atrous_conv_cases.problems()}


@pytest.mark.parametrize("name", list(QUICK))
def test_rivals_compute_the_same(name):
    """All but the compiled ones: they are torch's own translation of what stands beside them."""
    case = bench_atrous_conv.make_case(name)
    rivals = {k: v for k, v in case.setup().items() if not k.startswith("torch.compile")}
    results = {label: time_call(stages_of(rival))[1] for label, rival in rivals.items()}
    figures = case.check(results)
    assert len(figures) == 3
    bound = 0.05 if name.endswith("bf16") else 1e-4
    assert all(f["max_relative_difference"] < bound for f in figures.values())


def test_the_cases_are_those_of_the_plan():
    assert {p.dtype for p in ALL.values()} == {torch.float32, torch.bfloat16}
    valid = sum((3 * 65 - 2 * rate) ** 2 for rate in (6, 12, 18, 24))
    assert ALL["aspp-sum/2048x65x65-21/f32"].flop == 2 * 2048 * 21 * valid
    assert ALL["depthwise/2048x65x65-rate18/f32"].flop == 2 * 2048 * (3 * 65 - 36) ** 2
    assert not ALL["aspp-sum-inference/2048x65x65-21/bf16"].backward


def test_quick_run_writes_a_valid_result(tmp_path):
    path = tmp_path / "result.json"
    bench_atrous_conv.BENCHMARK.main(
        ["--quick", "--no-memory", "--threads", "1", "--output", str(path)]
    )
    result = _result.load_result(path)
    assert {run["case"] for run in result["runs"]} == set(QUICK)
    for run in result["runs"]:
        assert set(run["ratios"]) == {
            f"torch{form}"
            for form in (" NCHW", " channels_last", ".compile", ".compile channels_last")
        }
        assert set(run["variants"]) == {"pydense channels_last"}
