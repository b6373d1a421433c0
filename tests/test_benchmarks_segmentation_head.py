# SPDX-License-Identifier: Apache-2.0
"""The segmentation-head benchmark: inputs, rivals that agree, a small run from end to end."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from benchmarks import _head_cases, _result, bench_segmentation_head  # noqa: E402

SMALL = {p.task: p for p in _head_cases.QUICK}


@pytest.fixture
def not_compiled(monkeypatch):
    """Compiling takes seconds and is torch's matter."""
    monkeypatch.setattr(_head_cases, "_compiled", lambda function: function)


def test_cases_have_names_of_their_own():
    names = [p.name for p in _head_cases.PROBLEMS + _head_cases.QUICK]
    assert len(set(names)) == len(names)
    for name in names:
        assert bench_segmentation_head.make_case(name).name == name
    with pytest.raises(ValueError, match="make_case: name must be a case of this benchmark"):
        bench_segmentation_head.make_case("argmax")


def test_regions_are_regions():
    problem = _head_cases.Problem("argmax", (1, 21, 65, 65), (513, 513), logits="regions")
    labels = _head_cases.make_logits(problem).argmax(1)
    same = (labels[:, 1:] == labels[:, :-1]).float().mean()
    assert same > 0.8
    assert len(labels.unique()) > 10
    target = _head_cases.make_target(problem)
    assert 0.04 < (target == _head_cases.IGNORED).float().mean() < 0.06


def test_traffic_by_hand():
    softmax = _head_cases.Problem("softmax", (2, 3, 4, 5), (8, 10), dtype="bfloat16")
    assert _head_cases.moved_bytes(softmax) == {"total": 2 * (2 * 3 * 20 + 2 * 3 * 80)}
    argmax = _head_cases.Problem("argmax", (2, 3, 4, 5), (8, 10))
    assert _head_cases.moved_bytes(argmax) == {"total": 4 * 2 * 3 * 20 + 8 * 2 * 80}
    loss = _head_cases.Problem("cross-entropy", (2, 3, 4, 5), (8, 10))
    assert _head_cases.moved_bytes(loss) == {"total": 2 * 4 * 2 * 3 * 20 + 8 * 2 * 80}


@pytest.mark.parametrize("task", SMALL)
def test_rivals_solve_the_same_problem(task, not_compiled):
    problem = SMALL[task]
    rivals = _head_cases.rivals_of(problem)
    assert {"pydense", "torch", "torch channels_last", "torch.compile"} <= set(rivals)
    for label in rivals:
        _head_cases.prime(label)
    figures = _head_cases.compare(problem, {label: rival() for label, rival in rivals.items()})
    assert set(figures) == set(rivals) - {"pydense"}
    for found in figures.values():
        assert all(value < 1e-5 for value in found.values())


def test_small_run(not_compiled, tmp_path):
    output = tmp_path / "result.json"
    arguments = ["--quick", "--threads", "1", "--rounds", "1", "--no-memory"]
    result = bench_segmentation_head.BENCHMARK.main([*arguments, "--output", str(output)])
    names = [p.name for p in _head_cases.QUICK]
    assert [run["case"] for run in result["runs"]] == names
    assert [run["case"] for run in _result.load_result(output)["runs"]] == names
