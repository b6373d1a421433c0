# SPDX-License-Identifier: Apache-2.0
"""The benchmark of chained residual pooling: its rivals agree, and a quick run writes a result."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from _benchmarks import PEAKS, _result

from benchmarks import _autograd_cases, _residual_pool_cases, bench_chained_residual_pool
from benchmarks._harness import stages_of, time_call

QUICK = {problem.name: problem for problem in _residual_pool_cases.quick_problems()}
ALL = {problem.name: problem for problem in _residual_pool_cases.problems()}


@pytest.mark.parametrize("name", list(QUICK))
def test_rivals_compute_the_same(name):
    """All but the compiled ones: they are torch's own translation of what stands beside them."""
    case = bench_chained_residual_pool.make_case(name)
    rivals = {k: v for k, v in case.setup().items() if not k.startswith("torch.compile")}
    results = {label: time_call(stages_of(rival))[1] for label, rival in rivals.items()}
    figures = case.check(results)
    assert set(figures) == set(rivals) - {"pydense", "GEMM + pool"} and len(figures) == 3
    bound = 0.05 if name.endswith("bf16") else 1e-4
    assert all(f["max_relative_difference"] < bound for f in figures.values())


def test_the_cases_are_those_of_the_plan():
    assert len(ALL) == 12 and {p.dtype for p in ALL.values()} == {torch.float32, torch.bfloat16}
    assert ALL["light-weight/256x128x128/f32"].flop == 4 * 2 * 256 * 256 * 128 * 128
    with pytest.raises(ValueError, match="must be a case of this benchmark, got 'x'"):
        bench_chained_residual_pool.make_case("x")


def test_what_is_kept_for_backward():
    """The pool: a byte for each element, where torch keeps the input and 8; less than a third."""
    problem = QUICK["pool/16x20x20/f32"]
    elements = 16 * 20 * 20
    kept = {
        label: _autograd_cases.saved_bytes(problem, label) for label in ("pydense", "torch NCHW")
    }
    assert kept == {"pydense": elements, "torch NCHW": 12 * elements}
    problem = QUICK["light-weight/16x20x20/bf16"]
    kept = [_autograd_cases.saved_bytes(problem, x) for x in ("pydense", "torch NCHW")]
    assert kept == [4 * 3 * elements, 4 * 12 * elements]


def test_quick_run_writes_a_valid_result(tmp_path):
    path = tmp_path / "result.json"
    bench_chained_residual_pool.BENCHMARK.main(
        ["--quick", "--no-memory", "--threads", "1", "--output", str(path)]
    )
    result = _result.load_result(path)
    assert len(result["runs"]) == 5
    for run in result["runs"]:
        assert set(run["ratios"]) == {
            f"torch{form}"
            for form in (" NCHW", " channels_last", ".compile", ".compile channels_last")
        }
        inference = run["case"].startswith("light-weight-inference")
        floor = {"GEMM + pool"} if inference else set()
        assert set(run["variants"]) == {"pydense channels_last"} | floor
        assert bool(floor) == ("share_of_floor" in run["checks"]["torch NCHW"])
        assert {"forward", "total"} <= set(run["ratios"]["torch NCHW"])


def test_an_instruction_set_is_forced_on_both_sides(monkeypatch):
    """On torch's own kernels and on oneDNN's, which say so themselves."""
    run = subprocess.run
    seen = []

    def ask(command, env, **options):
        code = (
            "import torch; print(torch.backends.cpu.get_cpu_capability());"
            "torch.conv2d(torch.zeros(2, 64, 64, 64), torch.zeros(64, 64, 3, 3))"
        )
        env = {**env, "ONEDNN_VERBOSE": "1"}
        seen.append(run([sys.executable, "-c", code], env=env, capture_output=True, text=True))
        seen.append(env)
        return seen[0]

    monkeypatch.setattr(subprocess, "run", ask)
    with pytest.raises(SystemExit, match="--isa avx2: the process ended with status 0"):
        bench_chained_residual_pool.BENCHMARK.measure_isa([], "avx2", PEAKS)
    result, environment = seen
    assert environment["PYDENSE_CPU_CAPABILITY"] == "avx2"
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "AVX2" in result.stdout.splitlines()
        assert "isa:Intel AVX2\n" in result.stdout
