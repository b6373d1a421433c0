# SPDX-License-Identifier: Apache-2.0
"""The benchmark harness: maths with a fake clock, cases, measurements. No test depends on time."""

import json
import os
import random
import subprocess
import sys
from functools import partial

import pytest
from _benchmarks import PEAKS, ROOT, FakeClock, example, make_case, run_fake

from benchmarks import _harness, _machine, _memory, report
from benchmarks._harness import Case

LOAD_BY_FILE = """
import importlib.util, pathlib, sys
file = pathlib.Path(sys.argv[1], "__init__.py")
spec = importlib.util.spec_from_file_location("benchmarks", file)
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@pytest.mark.parametrize(
    ("built_in_place", "installed", "on_path", "expected"),
    [
        (True, True, True, "tree"),
        (True, True, False, "installed"),
        (True, False, False, "tree"),
        (False, True, True, "installed"),
        (False, True, False, "installed"),
        (False, False, True, "tree"),  # whose own error says what is missing
    ],
)
def test_which_pydense_is_measured(tmp_path, built_in_place, installed, on_path, expected):
    for folder in ("tree", "installed"):
        (tmp_path / folder / "pydense").mkdir(parents=True)
        (tmp_path / folder / "pydense" / "__init__.py").write_text(f"place = {folder!r}\n")
    package = tmp_path / "tree" / "benchmarks"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "benchmarks" / "__init__.py").read_text())
    if built_in_place:
        (tmp_path / "tree" / "pydense" / "_core.so").touch()
    # python -m puts the tree on the path; the pytest command loads the package by its file.
    load = "import benchmarks" if on_path else LOAD_BY_FILE
    # -S: whatever this environment has installed stays out of it.
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"{load}\nimport pydense\nprint(pydense.place)", str(package)],
        cwd=tmp_path / "tree" if on_path else tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed") if installed else ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == expected


# --- harness --------------------------------------------------------------------------------------


def test_median_is_taken_over_ratios_of_rounds_and_not_over_times():
    # The first entry is the warm-up. Ratios by round: 2, 4, 3; ratio of the medians: 8 / 2 = 4.
    run, _ = run_fake([99, 1, 2, 3], [99, 2, 8, 9], rounds=3, order="fixed")
    figures = run["ratios"]["rival"]["total"]
    assert figures["median"] == pytest.approx(3)
    assert (figures["min"], figures["max"], figures["rounds"]) == (2, 4, 3)
    assert run["rivals"]["rival"]["seconds"]["total"]["median"] == 8
    assert run["fastest_rival"] == "rival"


def test_a_neighbour_that_slows_some_rounds_leaves_the_median_ratio():
    slow = [1, 1, 10, 1, 10, 10]  # the machine, round by round, after one warm-up
    run, _ = run_fake([2 * s for s in slow], [6 * s for s in slow], rounds=5)
    assert run["ratios"]["rival"]["total"] == {
        "median": 3, "q1": 3, "q3": 3, "min": 3, "max": 3, "rounds": 5
    }  # fmt: skip


@pytest.mark.parametrize(("order", "expected"), [("fixed", "ABABABAB"), ("alternate", "ABBAABBA")])
def test_rounds_are_interleaved(order, expected):
    _, clock = run_fake([1], [1], rounds=4, order=order)
    assert "".join(clock.log) == "AB" + expected  # warm-up first


def test_random_order_has_each_rival_once_per_round():
    _, clock = run_fake([1], [1], rounds=20, order="random")
    turns = ["".join(clock.log[i : i + 2]) for i in range(2, 42, 2)]
    assert set(turns) == {"AB", "BA"}
    with pytest.raises(ValueError, match="order must be"):
        _harness.round_order(["A"], 0, "sorted", random.Random(0))


def test_stages_are_timed_apart_and_chained():
    clock = FakeClock()
    seen = []

    def second(value):
        seen.append(value)
        clock.now += 3
        return value + "!"

    spent, value = _harness.time_call(
        {"build": clock.work("built", [1]), "inference": second}, number=2, clock=clock
    )
    assert spent == {"build": 1, "inference": 3, "total": 4}
    assert (value, seen) == ("built!", ["built", "built"])
    assert _harness.time_call(_harness.stages_of(lambda: 7))[1] == 7
    with pytest.raises(ValueError, match="total"):
        _harness.stages_of({"total": second})


def test_ratios_cover_the_stages_that_both_have():
    rival = [{"build": 2.0, "total": 6.0}, {"build": 4.0, "total": 6.0}]
    own = [{"total": 2.0}, {"total": 3.0}]
    assert list(_harness.ratios(rival, own)) == ["total"]
    assert _harness.ratios(rival, own)["total"]["median"] == 2.5
    with pytest.raises(ValueError, match="rounds"):
        _harness.ratios(rival, own[:1])


def test_short_calls_are_repeated_within_a_round():
    clock = FakeClock()
    case = make_case(clock, [0.001], [0.5])
    run = _harness.run_case(case, rounds=1, threads=1, clock=clock, min_seconds=0.01)
    assert run["rivals"]["pydense"]["calls_per_round"] in (10, 11)
    assert run["rivals"]["rival"]["calls_per_round"] == 1
    assert run["ratios"]["rival"]["total"]["median"] == pytest.approx(500)


def test_thread_counts_are_stated_and_fixed_ones_kept(monkeypatch):
    told = []
    monkeypatch.setattr(_harness, "set_threads", told.append)
    clock = FakeClock()
    runs = _harness.run_cases(
        [make_case(clock, [1], [1], fixed_threads={"rival": 1})],
        rounds=1, threads=[1, 3], clock=clock,
    )  # fmt: skip
    assert told == [1, 3]
    assert [run["threads"] for run in runs] == [1, 3]
    assert [run["rivals"]["rival"]["threads"] for run in runs] == [1, 1]
    assert [run["rivals"]["pydense"]["threads"] for run in runs] == [1, 3]


def test_every_run_compiles_anew():
    """Behind its recompile limit torch.compile would leave a rival as it is, eager."""
    torch = pytest.importorskip("torch")
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def add_one(x):
        return x + 1

    def setup(size):
        x, function = torch.ones(size), torch.compile(add_one, backend=backend, dynamic=False)
        return {"pydense": lambda: None, "rival": lambda: function(x)}

    cases = [Case(name=f"{n}", setup=partial(setup, n)) for n in range(2, 7)]
    with torch._dynamo.config.patch(recompile_limit=2):
        _harness.run_cases(cases, rounds=1, threads=[1], min_seconds=1e-9)
    assert len(compiled) == len(cases)


def test_limit_is_the_slower_of_traffic_and_arithmetic():
    run, _ = run_fake(
        [4], [4], rounds=1, moved=lambda: {"total": 2e10}, flop=lambda: {"total": 1e12}
    )
    limit = run["limit"]["total"]
    assert (limit["seconds"], limit["times_limit"]) == (2, 2)
    parts = _harness.limit_of(
        {"a": 1e10, "b": 2e10}, {"b": 9e12}, PEAKS, {"a": 3, "b": 9, "total": 12}
    )
    assert parts["a"]["times_limit"] == 3
    assert parts["b"]["times_limit"] == 1  # arithmetic-bound
    assert parts["total"]["seconds"] == 9


@pytest.mark.parametrize(("share", "warned"), [(1.0, False), (0.95, False), (0.5, True)])
def test_cpu_time_taken_by_others_is_recorded_and_reported(share, warned):
    clock = FakeClock()
    case = make_case(clock, [1], [3])
    run = _harness.run_case(
        case, rounds=3, threads=1, clock=clock, cpu_clock=lambda: clock.now * share
    )
    assert run["rivals"]["rival"]["busy_cpus"] == pytest.approx(share)
    result = {**example(), "runs": [{**run, "isa": "avx2"}]}
    assert ("other work took CPU time away" in report.preamble(result)) is warned


def test_checks_see_the_results_of_all_rivals():
    run, _ = run_fake(
        [1],
        [1],
        rounds=1,
        check=lambda results: {"rival": {"same": float(len(set(results.values())))}},
    )
    assert run["checks"] == {"rival": {"same": 2.0}}


def test_a_slow_rival_is_measured_in_some_rounds_only():
    clock = FakeClock()
    case = make_case(clock, [1, 1, 2, 3, 4, 5], [9, 8, 8], every={"rival": 3})
    run = _harness.run_case(case, rounds=5, threads=1, clock=clock, order="fixed", min_seconds=0)
    assert "".join(clock.log) == "AB" + "AB" + "A" + "A" + "AB" + "A"
    assert run["rivals"]["pydense"]["seconds"]["total"]["rounds"] == 5
    figures = run["ratios"]["rival"]["total"]
    # Rounds 0 and 3, in which pydense took 1 and 4 seconds.
    assert (figures["rounds"], figures["min"], figures["max"]) == (2, 2, 8)


def test_variants_are_compared_with_the_rivals_and_are_none_themselves():
    clock = FakeClock()
    case = Case(
        "a/case",
        lambda: {
            "pydense": clock.work("A", [1, 2, 4]),
            "other way": clock.work("V", [1, 1, 2]),
            "rival": clock.work("B", [1, 8, 8]),
        },
        variants=("other way", "one that is not there"),
    )
    run = _harness.run_case(case, rounds=2, threads=1, clock=clock, min_seconds=0)
    assert run["ratios"]["rival"]["total"]["median"] == 3
    assert list(run["variants"]) == ["other way"]
    assert run["variants"]["other way"]["rival"]["total"]["median"] == 6
    assert run["fastest_rival"] == "rival"
    assert "other way vs rival: 6.00x" in _harness.one_line(run)


def test_what_comes_before_a_call_is_not_timed():
    clock = FakeClock()

    def prepare():
        clock.log.append("p")
        clock.now += 100

    case = make_case(clock, [2], [6], before={"pydense": prepare})
    run = _harness.run_case(case, rounds=2, threads=1, clock=clock, order="fixed")
    assert "".join(clock.log) == "pABpABpAB"
    assert run["rivals"]["pydense"]["seconds"]["total"]["max"] == 2


def test_bad_cases_are_refused():
    case = Case("x", lambda: {"other": lambda: 1})
    with pytest.raises(ValueError, match="subject must be"):
        _harness.run_case(case, rounds=1, threads=1)
    with pytest.raises(ValueError, match="rounds, warmup"):
        _harness.run_case(case, rounds=0, threads=1)
    with pytest.raises(ValueError, match="distinct"):
        _harness.run_cases([case, case], rounds=1, threads=[1])
    with pytest.raises(ValueError, match="samples"):
        _harness.summary([])


# --- machine and memory ---------------------------------------------------------------------------


def test_peaks_are_measured_in_a_child_process():
    peaks = _machine.measure_peaks(1, quick=True)
    assert peaks["bandwidth"] == max(peaks["copy"], peaks["add"]) > 0
    assert peaks["gemm"] == max(v for k, v in peaks.items() if k.startswith("gemm_")) > 0


def test_machine_is_described_without_its_name(tmp_path):
    text = json.dumps(_machine.describe())
    assert os.uname().nodename not in text
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\n")
    assert _machine.cpu_model(info) == "A CPU @ 2 GHz"
    info.write_text(
        "cpu family\t: 26\nmodel\t: 2\nmodel name\t: A CPU\n\nmodel\t: 3\nmodel name\t: B\n"
    )
    assert _machine.cpu_model(info) == "A CPU family 26 model 2"
    assert _machine.cpu_model(tmp_path / "none")


PROBE = """
import numpy as np
from benchmarks._harness import Case

def blocks(count):
    return [np.ones(2**16, np.uint8) for _ in range(count)]

def setup():
    many, pin = blocks(256), blocks(1)  # the heap keeps what lies below the pin
    del many
    return {
        "big": lambda: np.ones(2**25, np.uint8).sum(),
        "reuse": lambda: len(blocks(256)) + len(pin),
        "small": lambda: 1,
    }

primed = []

def make_case(name):
    prime = {"prime": primed.append} if name == "primed" else {}
    return Case(name, setup, subject="big", before={"big": lambda: print(primed)}, **prime)
"""


def test_results_of_the_same_sources(tmp_path, monkeypatch):
    def git(*arguments):
        mail = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *mail, *arguments], check=True)

    monkeypatch.setattr(_machine, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text("1")
    git("init", "-q")
    git("add", "setup.py")
    git("commit", "-qm", "first")
    first = _machine.commit()
    assert first and not first.endswith("-dirty") and _machine.same_sources(first)
    (tmp_path / "README.md").write_text("other")
    git("add", ".")
    git("commit", "-qm", "documents alone")
    assert _machine.commit() != first and _machine.same_sources(first)
    (tmp_path / "setup.py").write_text("2")
    assert _machine.commit().endswith("-dirty") and not _machine.same_sources(first)
    git("commit", "-qam", "sources")
    assert not _machine.same_sources(first) and _machine.same_sources(_machine.commit())
    assert not _machine.same_sources("no-such-commit")


def test_peak_memory_sees_native_and_reused_allocations(tmp_path):
    (tmp_path / "memory_probe.py").write_text(PROBE)
    environment = {"PYTHONPATH": str(tmp_path)}
    big, reuse, small = (
        _memory.peak_memory("memory_probe", "x", label, 1, environment)
        for label in ("big", "reuse", "small")
    )
    assert 2**25 * 0.95 <= big < 2**25 + 2**23  # the kernel counts in batches of pages
    assert 2**24 * 0.9 <= reuse < 2**24 + 2**23
    assert small < 2**22
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._memory", "memory_probe", "primed", "big", "1"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "['big']"  # primed first, and nothing else was
    with pytest.raises(RuntimeError, match="nothing"):
        _memory.peak_memory("memory_probe", "x", "nothing", 1, environment)
