# SPDX-License-Identifier: Apache-2.0
"""The upsampling benchmark: its rivals agree, and a quick run writes a valid result."""

from __future__ import annotations

import json

import pytest
import torch
from _benchmarks import PEAKS, _result, example

from benchmarks import _driver, _upsample_cases, bench_upsample
from benchmarks._comparison_report import preamble
from benchmarks._harness import stages_of, time_call

PROBLEMS = {problem.name: problem for problem in _upsample_cases.problems()}


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n.endswith("f32") and "150" not in n])
def test_rivals_compute_the_same(name):
    """All but the compiled one: it is torch's own translation of what stands beside it."""
    case = bench_upsample.make_case(name)
    rivals = {k: v for k, v in case.setup().items() if k != "torch.compile"}
    results = {label: time_call(stages_of(rival))[1] for label, rival in rivals.items()}
    figures = case.check(results)
    assert set(figures) == set(rivals) - {"pydense"} and len(figures) == 3
    # F.interpolate's coordinates are rounded to float32, those of a crop are exact.
    assert all(f["max_relative_difference"] < 2e-4 for f in figures.values())


def test_the_cases_are_those_of_the_plan():
    assert len(PROBLEMS) == 14 and {p.dtype for p in PROBLEMS.values()} == {
        torch.float32,
        torch.bfloat16,
    }
    problem = PROBLEMS["bilinear/21x65x65-513x513/f32"]
    assert problem.moved["forward"] == 4 * 21 * (65 * 65 + 513 * 513)
    with pytest.raises(ValueError, match="must be a case of this benchmark, got 'x'"):
        bench_upsample.make_case("x")
    with pytest.raises(SystemExit, match="no case has 'nothing' in its name"):
        bench_upsample.BENCHMARK.main(["--case", "nothing"])


def test_quick_run_writes_a_valid_result(tmp_path):
    path = tmp_path / "upsample.json"
    bench_upsample.BENCHMARK.main(
        ["--quick", "--no-memory", "--threads", "1", "--output", str(path)]
    )
    result = _result.load_result(path)
    assert len(result["runs"]) == 2
    for run in result["runs"]:
        assert set(run["ratios"]) == {"torch NCHW", "torch channels_last", "torch.compile"}
        assert set(run["variants"]) == {"pydense channels_last"}
        assert set(run["ratios"]["torch NCHW"]) == {"forward", "backward", "total"}
        assert run["limit"]["total"]["times_limit"] > 0


def test_a_long_benchmark_is_measured_in_parts(tmp_path, monkeypatch, capsys):
    path = tmp_path / "upsample.json"
    quick = ["--quick", "--no-memory", "--output", str(path)]
    one, run = [*quick, "--threads", "1"], bench_upsample.BENCHMARK.main
    first = run([*one, "--minutes", "0"])["runs"]
    assert len(first) == 1 and "1 cases are left" in capsys.readouterr().err
    monkeypatch.setattr(_driver, "same_sources", lambda commit: True)  # whatever is uncommitted
    both = run([*one, "--resume"])["runs"]
    assert both[0] == _result.load_result(path)["runs"][0] and len(both) == 2
    assert both[0]["rivals"] == _result._rounded(first[0]["rivals"])
    again = run([*one, "--resume"])["runs"]  # nothing is left
    assert again == _result.load_result(path)["runs"] == _result._rounded(both)


def test_resuming_keeps_what_is_measured(tmp_path, monkeypatch):
    """Another number of threads measures case by case; the file has all that was there before."""
    path = tmp_path / "upsample.json"
    quick = ["--quick", "--no-memory", "--output", str(path)]
    seen = []

    def measure(self, options, cases, peaks):
        seen.append((cases[0].name, options.threads))
        known = example()["runs"][0]
        params = dict(cases[0].params)
        return [
            {**known, "case": cases[0].name, "params": params, "threads": n, "isa": "avx2"}
            for n in options.threads
        ]

    monkeypatch.setattr(_driver.Benchmark, "measure", measure)
    monkeypatch.setattr(_driver, "same_sources", lambda commit: True)
    monkeypatch.setattr(_driver, "measure_peaks", lambda count, quick: dict(PEAKS))
    run = bench_upsample.BENCHMARK.main
    names = [r["case"] for r in run([*quick, "--threads", "1"])["runs"]]
    assert len(names) == 2
    result = run([*quick, "--threads", "1", "2", "--resume", "--minutes", "0"])
    found = sorted((r["case"], r["threads"]) for r in result["runs"])
    assert found == sorted([(names[0], 1), (names[0], 2), (names[1], 1)])
    assert set(result["peaks"]) == {"1", "2"}
    assert seen[2:] == [(names[0], [1, 2])]
    text = path.read_text()
    changed = json.loads(text)
    changed["runs"][0]["params"] = {"size": 1}  # a case of the same name that was another
    path.write_text(json.dumps(changed))
    run([*quick, "--threads", "1", "--resume"])
    assert seen[3:] == [(changed["runs"][0]["case"], [1])]
    changed["machine"]["cpu"] = "another"
    path.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match=r"--resume: upsample\.json is of another CPU \(--older"):
        run([*quick, "--resume"])
    kept = run([*quick, "--threads", "1", "--resume", "--older"])
    older = sum(r.get("cpu") == "another" for r in kept["runs"])
    assert older and f"another ({older} runs)" in preamble(kept)
    monkeypatch.setattr(_driver, "same_sources", lambda commit: False)
    with pytest.raises(SystemExit, match=r"--resume: upsample\.json is of .*--older"):
        run([*quick, "--resume"])


def test_runs_of_older_commits_are_kept_by_name(tmp_path, monkeypatch):
    path = tmp_path / "upsample.json"
    arguments = ["--quick", "--no-memory", "--threads", "1", "--output", str(path)]
    monkeypatch.setattr(_driver, "measure_peaks", lambda count, quick: dict(PEAKS))
    for name in ("older", "newer"):
        monkeypatch.setattr(_driver, "commit", lambda name=name: name)
        monkeypatch.setattr(_driver, "same_sources", lambda measured, name=name: measured == name)
        more = ["--resume", "--older"] if name == "newer" else ["--minutes", "0"]
        result = bench_upsample.BENCHMARK.main([*arguments, *more])
    assert result["commit"] == "newer"
    assert [run["commit"] for run in result["runs"]] == ["older", "newer"]
    assert ", commits older (1 runs), newer (1 runs)." in preamble(result)
    for run in result["runs"]:
        run["commit"] = "older"
    assert ", commit older." in preamble(result)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--isa", "avx2", "--resume"], "not with --resume or --minutes"),
        (["--isa", "avx2", "--minutes", "0"], "not with --resume or --minutes"),
        (["--older"], "--older says what --resume keeps"),
        (["--minutes", "-1"], "--minutes must be 0 or more"),
        (["--minutes", "nan"], "--minutes must be 0 or more"),
    ],
)
def test_parts_that_make_no_sense(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench_upsample.BENCHMARK.main(arguments)
    assert said in capsys.readouterr().err
