# SPDX-License-Identifier: Apache-2.0
"""Result files and the tables made from them."""

import copy
import subprocess
import sys

import pytest
from _benchmarks import ROOT, FakeClock, example

from benchmarks import _harness, _result, report
from benchmarks._harness import Case


def test_result_round_trip(tmp_path):
    path = _result.write_result(example(), tmp_path / "demo.json")
    loaded = _result.load_result(path)
    assert loaded["schema"] == _result.SCHEMA
    assert loaded["runs"][0]["ratios"]["rival"]["total"]["median"] == 4.5
    assert "shared machine" in loaded["note"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema="pydense-benchmark/0"), "schema must be"),
        (lambda r: r.pop("machine"), "have 'machine'"),
        (lambda r: r.update(runs=[]), "runs must not be empty"),
        (lambda r: r["runs"][0].pop("isa"), r"runs\[0\] must have 'isa'"),
        (lambda r: r["runs"][1].update(threads="1"), r"runs\[1\]\.threads must be of type int"),
        (lambda r: r["runs"][0].update(subject="x"), "subject must be a rival"),
        (lambda r: r["runs"][0]["ratios"].clear(), "ratios must have"),
        (lambda r: r["runs"][0]["ratios"]["rival"]["total"].pop("median"), "have 'median'"),
        (lambda r: r["runs"][0]["ratios"]["rival"]["total"].update(min=9.0), "ordered"),
        (lambda r: r["runs"][0]["ratios"]["rival"]["total"].update(median=0.0), "positive"),
        (lambda r: r["runs"][0]["rivals"]["rival"]["seconds"].pop("total"), "have 'total'"),
        (lambda r: r["runs"][0].update(fastest_rival="pydense"), "fastest_rival must be"),
    ],
)
def test_a_malformed_result_is_refused_and_not_written(tmp_path, change, message):
    result = copy.deepcopy(example())
    change(result)
    with pytest.raises(ValueError, match=message):
        _result.write_result(result, tmp_path / "demo.json")
    assert not list(tmp_path.iterdir())


# --- report ---------------------------------------------------------------------------------------


DOCUMENT = (
    "# Title\n\n<!-- benchmark:demo{form} -->\nold\n<!-- /benchmark -->\n\nThe end, `{tail}`.\n"
)


@pytest.fixture
def papers(tmp_path):
    """A results folder with one result, and two documents that show it."""
    results = tmp_path / "results"
    _result.write_result(example(), results / "demo.json")
    documents = [tmp_path / "README.md", tmp_path / "benchmarks.md"]
    for document, form in zip(documents, ("", " full"), strict=True):
        document.write_text(DOCUMENT.format(form=form, tail="<!-- benchmark:demo -->"))
    return results, documents


def call(papers, *, check):
    results, documents = papers
    return report.run(check=check, results=results, documents=documents, say=lambda line: None)


def test_report_writes_tables_and_check_tells_when_they_are_old(papers):
    results, documents = papers
    before = [d.read_text() for d in documents]
    assert call(papers, check=True) == 1
    assert [d.read_text() for d in documents] == before  # --check writes nothing
    assert call(papers, check=False) == 0
    assert call(papers, check=True) == 0
    written = [d.read_text() for d in documents]
    assert call(papers, check=False) == 0
    assert [d.read_text() for d in documents] == written  # a second time changes nothing
    _result.write_result(example(theirs=(2, 9, 9)), results / "demo.json")
    assert call(papers, check=True) == 1


def test_report_shows_figures_and_losses(papers):
    call(papers, check=False)
    summary, full = (d.read_text() for d in papers[1])
    for text in (summary, full):
        assert "old" not in text
        assert text.startswith("# Title\n")
        assert text.endswith("The end, `<!-- benchmark:demo -->`.\n")
        assert "4.50x" in text
        assert "**0.75x" in text
        assert "Slower than the fastest rival in 1 of 2 runs: b/case (avx2, 1 thread)." in text
        assert "| 3 (30) |" in text
        assert "| **40 (30)** |" in text
        assert "A higher memory peak in 1 of 2." in text
        assert "1.5e-07" in text
    assert (
        "| case | avx2, 1 thread | peak memory, MiB (rival) | max abs dq | labels differ |"
        in summary
    )
    assert "4.50x [4.00..5.00]" in full
    assert "10.0 GB/s" in full
    row = next(line for line in full.splitlines() if line.startswith("| a/case"))
    assert row.endswith("| 2.0 |")  # seconds: 2 measured, 1e10 bytes at 1e10 bytes/s
    widths = {line.count("|") for line in full.splitlines() if line.startswith("|")}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmark:demo -->\n", "must close every marker"),
        ("<!-- benchmark:other -->\n<!-- /benchmark -->\n", "must name a result, got 'other'"),
        ("<!-- benchmark:demo long -->\n<!-- /benchmark -->\n", "form must be left out or 'full'"),
        ("no marker\n", "must show every result"),
    ],
)
def test_report_refuses_documents_it_cannot_fill(papers, text, message):
    for document in papers[1]:
        document.write_text(text)
    with pytest.raises(ValueError, match=message):
        call(papers, check=True)


def test_report_without_a_rival(tmp_path):
    clock = FakeClock()
    case = Case("alone", lambda: {"pydense": clock.work("A", [1])})
    (run,) = _harness.run_cases([case], rounds=2, threads=[1], clock=clock)
    assert run["ratios"] == {}
    assert "no rival" in _harness.one_line(run)
    result = {**example(), "runs": [{**run, "isa": "avx2"}]}
    _result.write_result(result, tmp_path / "demo.json")
    for form in (None, "full"):
        assert "nothing to compare with" in report.render(result, form)


def test_committed_results_are_valid_and_shown():
    for path in _result.RESULTS.glob("*.json"):
        _result.load_result(path)
    for document in report.DOCUMENTS:
        assert report.MARKER.search(document.read_text()), document.name
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- dense CRF ------------------------------------------------------------------------------------
