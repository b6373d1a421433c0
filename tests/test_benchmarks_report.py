# SPDX-License-Identifier: Apache-2.0
"""Result files and the tables made from them."""

import copy
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from _benchmarks import ROOT, FakeClock, example

from benchmarks import _comparison_report, _harness, _result, report
from benchmarks._harness import Case
from benchmarks._scaling_report import growth


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
        (lambda r: r["runs"][0].update(variants={"x": {}}), "variants must be rivals"),
        (lambda r: r["runs"][0].update(variants={"rival": {}}), "ratios must have"),
        (lambda r: r.update(kind="other"), "kind must be one of"),
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


def test_a_rival_whose_memory_was_not_measured_is_no_lighter_one():
    result = example()
    with_memory = next(run for run in result["runs"] if len(run.get("memory", {})) > 1)
    other = copy.deepcopy(with_memory["ratios"]["rival"])
    with_memory["ratios"]["unmeasured"] = other
    with_memory["rivals"]["unmeasured"] = copy.deepcopy(with_memory["rivals"]["rival"])
    assert _comparison_report.losses(result) == _comparison_report.losses(example())


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
        assert "| 3 (30), 0.10x |" in text
        assert "| **40 (30), 1.33x** |" in text
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
        (
            "<!-- benchmark:demo long -->\n<!-- /benchmark -->\n",
            "form must be left out, 'fastest' or 'full'",
        ),
        ("no marker\n", "must show every result"),
    ],
)
def test_report_refuses_documents_it_cannot_fill(papers, text, message):
    for document in papers[1]:
        document.write_text(text)
    with pytest.raises(ValueError, match=message):
        call(papers, check=True)


def test_report_names_the_variables_that_were_set():
    result = example()
    assert "; numpy 2;" in report.preamble(result)
    result["machine"]["environment"] = {"OMP_WAIT_POLICY": "passive"}
    assert "; numpy 2, `OMP_WAIT_POLICY=passive`;" in report.preamble(result)


def with_variant_and_second_rival():
    """One run: pydense 2 s, another way to call it 1 s, rivals 6 s and 3 s."""
    clock = FakeClock()
    seconds = {"pydense": 2, "another": 1, "rival": 6, "slow rival": 1.5}
    case = Case(
        "a/case",
        lambda: {label: clock.work(label, [s]) for label, s in seconds.items()},
        variants=("another",),
        check=lambda _: {"rival": {"differ": 1}, "slow rival": {"differ": 2}},
    )
    run = _harness.run_case(case, rounds=2, threads=1, clock=clock)
    run["isa"] = "avx2"
    run["memory"] = {label: s * 2**20 for label, s in seconds.items()}
    return {**example(), "runs": [run]}


def test_report_judges_the_fastest_form():
    result = with_variant_and_second_rival()
    (run,) = result["runs"]
    other = copy.deepcopy(run)
    for table in (run["rivals"], run["variants"]):
        table["pydense channels_last"] = table.pop("another")
    sentence = "The fastest of pydense, pydense channels_last: in "
    assert sentence + "0 of 1 runs." in _comparison_report.losses(result)
    run["variants"]["pydense channels_last"]["rival"]["total"]["median"] = 0.9
    lost = sentence + "1 of 1 runs: a/case (avx2, 1 thread)."
    assert lost in _comparison_report.losses(result)
    shorter = _comparison_report.losses(result, most=0)
    assert "a/case" not in shorter
    assert sentence + "1 of 1 runs." in shorter
    # A variant that is no memory format and not compiled is none of the forms.
    assert "The fastest of" not in _comparison_report.losses({**result, "runs": [other]})


def test_report_weighs_runs_whose_fastest_rival_has_no_memory():
    result = with_variant_and_second_rival()
    (run,) = result["runs"]
    del run["memory"][run["fastest_rival"]]  # as of what torch.compile made
    assert "A higher memory peak in " in _comparison_report.losses(result)
    run["memory"] = {"pydense": 1}
    assert "memory peak" not in _comparison_report.losses(result)


def test_report_shows_variants_beside_the_subject_and_a_row_per_rival():
    result = with_variant_and_second_rival()
    _result.validate(result)
    summary = report.render(result, None)
    assert "Cells: pydense / another." in summary
    assert "| case | rival | avx2, 1 thread | peak memory, MiB (rival) | differ |" in summary
    assert "| a/case | rival | 3.00x / 6.00x | 2 / 1 (6), 0.33x | 1 |" in summary
    row = "| a/case | slow rival | **0.75x (slower)** / 1.50x | **2 / 1 (2), 1.33x** | 2 |"
    assert row in summary
    assert (
        "Slower than the fastest rival in 1 of 1 runs: a/case (avx2, 1 thread). "
        "another: in 0 of 1 runs. A higher memory peak in 1 of 1." in summary
    )
    full = report.render(result, "full")
    assert "| rival | total | another | pydense ms (rival) |" in full
    assert "| rival | 3.00x [3.00..3.00] | 6.00x | 2000.0 (6000) |" in full


def scaling_result(power=1.0):
    clock = FakeClock()
    values = [10, 20, 40, 80]
    case = Case(
        "pixels & more",
        lambda: {str(v): clock.work(str(v), [(v / 10) ** power]) for v in values},
        subject="10",
        params={"values": values},
    )
    runs = [
        {**_harness.run_case(case, rounds=2, threads=threads, clock=clock), "isa": "avx2"}
        for threads in (1, 2)
    ]
    return {**example(), "kind": "scaling", "name": "growth", "title": "How it grows", "runs": runs}


def test_the_shortest_table_has_the_fastest_rival_alone():
    result = example()
    won, lost = result["runs"]
    for run, seconds in ((won, 3.0), (lost, 9.0)):
        run["rivals"]["other"] = copy.deepcopy(run["rivals"]["rival"])
        run["ratios"]["other"] = {"total": {**run["ratios"]["rival"]["total"], "median": seconds}}
    won["variants"] = {"pydense warm": copy.deepcopy(won["ratios"])}
    won["variants"]["pydense warm"]["rival"]["total"]["median"] = 2.5
    won["rivals"]["pydense warm"] = copy.deepcopy(won["rivals"]["pydense"])
    won["fastest_rival"] = "other"
    won["memory"]["other"] = 2 * 2**20
    text = report.render(result, "fastest")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        "| case | avx2, 1 thread | peak memory, MiB (rival) |",
        "| a/case | 3.00x / 2.50x | **3 (2), 1.50x** |",
        "| b/case | **0.75x (slower)** | **40 (30), 1.33x** |",
    ]
    assert "to the fastest rival's." in text


def test_growth_is_measured_by_slope_and_distance_from_a_line():
    for power, slope in ((1.0, 1.0), (2.0, 2.0), (0.5, 0.5)):
        g = growth(scaling_result(power)["runs"][0])
        assert g.slope == pytest.approx(slope)
        assert g.last_slope == pytest.approx(slope)
        assert (g.off_line < 1e-9) is (power == 1.0)
    # Fixed costs: a straight line, but no proportion.
    run = scaling_result()["runs"][0]
    for stages in run["ratios"].values():
        stages["total"]["median"] += 1
    assert growth(run).off_line > 0.05  # 1, 3, 5, 9: the first point is off
    assert growth(run).slope == pytest.approx(1.03, abs=0.02)


def test_scaling_is_plotted_beside_its_result(tmp_path):
    results, document = tmp_path / "results", tmp_path / "README.md"
    path = _result.write_result(scaling_result(), results / "growth.json")
    document.write_text("<!-- benchmark:growth -->\n<!-- /benchmark -->\n")
    arguments = {"results": results, "documents": [document], "say": lambda line: None}
    assert report.run(check=True, **arguments) == 1
    assert not (results / "growth.svg").exists()
    assert report.run(check=False, **arguments) == 0
    assert report.run(check=True, **arguments) == 0
    text = document.read_text()
    assert "![How it grows](results/growth.svg)" in text
    row = (
        "| pixels & more | 2 | 10 to 80 | 1000.0 to 8000.0 | 8.0x | 8.0x | 1.000 | 1.000 | 0.0 % |"
    )
    assert row in text
    drawn = ElementTree.fromstring((results / "growth.svg").read_text())
    (line,) = drawn.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    # In proportion: along the diagonal, from corner to corner.
    assert points == [(64, 324), (164, 224), (264, 124), (364, 24)]
    assert "pixels & more: slope 1.00" in "".join(drawn.itertext())
    (results / "growth.svg").write_text("old")
    assert report.run(check=True, **arguments) == 1
    assert path.exists()


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
        result = _result.load_result(path)
        for run in result["runs"]:
            if result.get("kind") == "scaling":
                assert growth(run).slope < 1.3, run["case"]  # caches end, nothing worse
            for label, figures in run["checks"].items():
                assert figures.get("decided_labels_differ", 0) == 0, (run["case"], label)
    for document in report.DOCUMENTS:
        assert report.MARKER.search(document.read_text()), document.name
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
