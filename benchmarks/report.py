# SPDX-License-Identifier: Apache-2.0
"""Turns benchmarks/results/*.json into the tables of README.md and benchmarks/README.md.

    python -m benchmarks.report            # rewrites the text between the markers
    python -m benchmarks.report --check    # exit status 1 where that would change a file

A marker is ``<!-- benchmark:NAME -->`` or ``<!-- benchmark:NAME full -->``, NAME being that of a
result file, and ends at ``<!-- /benchmark -->``. The first form gives one row per case with the
ratio of the whole call, the second one row per run with stages, memory and the distance from the
machine's limit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._harness import TOTAL
from benchmarks._result import RESULTS, load_result

MARKER = re.compile(
    r"^(?P<open><!-- benchmark:(?P<name>\w+)(?: (?P<form>\w+))? -->)\n"
    r"(?P<body>.*?)^(?P<close><!-- /benchmark -->)$",
    re.MULTILINE | re.DOTALL,
)
OPENING = re.compile(r"^<!-- benchmark:\w+(?: \w+)? -->$", re.MULTILINE)
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")

Run = Mapping[str, Any]
Result = Mapping[str, Any]


def ratio_text(figures: Mapping[str, float], spread: bool = False) -> str:
    """A ratio rival / subject; one below 1 is a loss and says so."""
    median = figures["median"]
    text = f"{median:.2f}x" if median < 10 else f"{median:.1f}x"
    if spread:
        text += f" [{figures['min']:.2f}..{figures['max']:.2f}]"
    return f"**{text} (slower)**" if median < 1 else text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def memory_text(run: Run, rival: str) -> str:
    """Peak MiB of the subject and, in parentheses, the rival; bold where the subject needs more."""
    memory = run.get("memory", {})
    own, other = memory.get(run["subject"]), memory.get(rival)
    if own is None:
        return ""
    text = f"{own / 2**20:.0f}"
    if other is None:
        return text
    text += f" ({other / 2**20:.0f})"
    return f"**{text}**" if own > other else text


def _plural(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")


def _by_case(result: Result) -> dict[str, list[Run]]:
    cases: dict[str, list[Run]] = {}
    for run in result["runs"]:
        cases.setdefault(run["case"], []).append(run)
    return cases


def _check_names(result: Result) -> list[str]:
    names: dict[str, None] = {}
    for run in result["runs"]:
        for figures in run["checks"].values():
            names.update(dict.fromkeys(figures))
    return list(names)


def _check_text(run: Run, label: str, name: str) -> str:
    value = run["checks"].get(label, {}).get(name)
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


def _settings(result: Result) -> list[tuple[str, int]]:
    """Distinct (isa, threads) in the order of the runs."""
    return list(dict.fromkeys((run["isa"], run["threads"]) for run in result["runs"]))


def contention(result: Result) -> str:
    """A warning where other work on the machine took CPUs from the measurement."""
    runs = result["runs"]
    starved = sum(
        any(r["threads"] == 1 and r.get("busy_cpus", 1.0) < 0.9 for r in run["rivals"].values())
        for run in runs
    )
    if not starved:
        return ""
    return (
        f" In {starved} of {len(runs)} runs other work took CPU time away: ratios with several "
        "threads are then too low."
    )


def preamble(result: Result) -> str:
    """What was measured, where, and against whom."""
    machine, runs = result["machine"], result["runs"]
    subject = runs[0]["subject"]
    rivals = {
        label: rival["threads"]
        for run in runs
        for label, rival in run["rivals"].items()
        if label != run["subject"]
    }
    fixed = [
        f"{label} always on {_plural(count)}"
        for label, count in rivals.items()
        if all(run["rivals"][label]["threads"] == count for run in runs if label in run["rivals"])
        and len({run["threads"] for run in runs}) > 1
    ]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    low, high = min(r["rounds"] for r in runs), max(r["rounds"] for r in runs)
    rounds = f"{low}" if low == high else f"{low} to {high}"
    text = (
        f"{result['title']}. Ratios are rival time / {subject} time, the median of {rounds} "
        f"interleaved rounds; above 1 {subject} is faster. "
        f"{machine['cpu']} ({machine['cpus']} CPUs, shared machine); {versions}"
    )
    text += f"; {'; '.join(fixed)}" if fixed else ""
    text += f"; {result['date']}"
    text += f", commit {result['commit']}" if result["commit"] else ""
    return text + "." + contention(result)


def losses(result: Result) -> str:
    """Where a rival was better, in words."""
    compared = [run for run in result["runs"] if run["ratios"]]
    if not compared:
        return "No rival was installed, so there is nothing to compare with."
    lost = [
        f"{run['case']} ({run['isa']}, {_plural(run['threads'])})"
        for run in compared
        if run["ratios"][run["fastest_rival"]][TOTAL]["median"] < 1
    ]
    text = f"Slower than the fastest rival in {len(lost)} of {len(compared)} runs"
    text += f": {'; '.join(lost)}." if lost else "."
    weighed = [run for run in compared if run["fastest_rival"] in run.get("memory", {})]
    if weighed:
        heavier = sum(r["memory"][r["subject"]] > r["memory"][r["fastest_rival"]] for r in weighed)
        text += f" A higher memory peak in {heavier} of {len(weighed)}."
    return text


def summary_table(result: Result) -> str:
    """One row per case: whole-call ratio to the fastest rival at every setting."""
    settings, checks = _settings(result), _check_names(result)
    several = len({label for run in result["runs"] for label in run["ratios"]}) > 1
    header = ["case", *(f"{isa}, {_plural(threads)}" for isa, threads in settings)]
    header += ["peak memory, MiB (rival)"] + [name.replace("_", " ") for name in checks]
    rows = []
    for case, runs in _by_case(result).items():
        row = [case]
        for setting in settings:
            cell = ""
            for run in runs:
                if (run["isa"], run["threads"]) == setting:
                    rival = run.get("fastest_rival")
                    cell = ratio_text(run["ratios"][rival][TOTAL]) if rival else ""
                    cell += f" vs {rival}" if several and rival else ""
            row.append(cell)
        rival = runs[0].get("fastest_rival", "")
        row.append(memory_text(runs[0], rival))
        rows.append(row + [_worst_check(runs, rival, name) for name in checks])
    return table(header, rows)


def _worst_check(runs: Sequence[Run], label: str, name: str) -> str:
    """The largest figure of a check over the runs of a case."""
    having = [run for run in runs if name in run["checks"].get(label, {})]
    if not having:
        return ""
    return _check_text(max(having, key=lambda run: run["checks"][label][name]), label, name)


def full_table(result: Result) -> str:
    """One row per run and rival: stages, spread, seconds, memory, checks, times the limit."""
    checks = _check_names(result)
    subject = result["runs"][0]["subject"]
    stages = list(dict.fromkeys(s for run in result["runs"] for s in _own(run)))
    header = ["case", "ISA", "threads", "rival", *stages, f"{subject} ms (rival)"]
    header += ["MiB (rival)", *(name.replace("_", " ") for name in checks), "times limit"]
    rows = []
    for run in result["runs"]:
        for rival in run["ratios"] or [""]:
            row = [run["case"], run["isa"], str(run["threads"]), rival]
            for stage in stages:
                figures = run["ratios"].get(rival, {}).get(stage)
                row.append(ratio_text(figures, spread=stage == TOTAL) if figures else "")
            own, other = _own(run)[TOTAL]["median"], run["rivals"].get(rival)
            theirs = f" ({other['seconds'][TOTAL]['median'] * 1e3:.0f})" if other else ""
            row.append(f"{own * 1e3:.1f}{theirs}")
            row.append(memory_text(run, rival))
            row += [_check_text(run, rival, name) for name in checks]
            limit = run.get("limit", {}).get(TOTAL)
            rows.append([*row, f"{limit['times_limit']:.1f}" if limit else ""])
    return table(header, rows)


def _own(run: Run) -> Mapping[str, Any]:
    seconds: Mapping[str, Any] = run["rivals"][run["subject"]]["seconds"]
    return seconds


def peaks_line(result: Result) -> str:
    """The machine's measured limits in a sentence."""
    parts = [
        f"{_plural(int(threads))} {peak['bandwidth'] / 1e9:.1f} GB/s, "
        f"{peak['gemm'] / 1e9:.0f} GFLOP/s"
        for threads, peak in result["peaks"].items()
    ]
    return f"Measured limits (memory traffic, float32 GEMM): {'; '.join(parts)}."


def render(result: Result, form: str | None) -> str:
    """The text between the markers."""
    if form is None:
        parts = [preamble(result), summary_table(result), losses(result)]
    elif form == "full":
        parts = [preamble(result), full_table(result), f"{losses(result)} {peaks_line(result)}"]
    else:
        raise ValueError(f"report: form must be left out or 'full', got {form!r}")
    return "\n" + "\n\n".join(parts) + "\n\n"


def update(text: str, results: Mapping[str, Result], where: str) -> str:
    """The document with the text between its markers made anew.

    Raises:
        ValueError: For a marker without end or without result.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in results:
            raise ValueError(f"report: {where} must name a result, got {name!r}")
        return f"{match['open']}\n{render(results[name], match['form'])}{match['close']}"

    if len(OPENING.findall(text)) != len(MARKER.findall(text)):
        raise ValueError(f"report: {where} must close every marker with <!-- /benchmark -->")
    return MARKER.sub(replace, text)


def run(
    *,
    check: bool,
    results: Path = RESULTS,
    documents: Sequence[Path] = DOCUMENTS,
    say: Callable[[str], None] = print,
) -> int:
    """Writes or checks the documents.

    Args:
        check: Write nothing; report what is out of date.
        results: Folder of the JSON files.
        documents: The last one has to show every result; one that does not exist is passed over.
        say: Gets one line per document.

    Returns:
        Exit status: 0, or 1 where ``check`` found a document out of date.
    """
    loaded = {path.stem: load_result(path) for path in sorted(results.glob("*.json"))}
    shown: set[str] = set()
    outdated = 0
    for document in documents:
        if not document.exists():
            say(f"{document.name}: not there")
            continue
        old = document.read_text()
        shown.update(match["name"] for match in MARKER.finditer(old))
        new = update(old, loaded, document.name)
        state = "up to date"
        if new != old and check:
            outdated += 1
            state = "out of date, run python -m benchmarks.report"
        elif new != old:
            document.write_text(new)
            state = "written"
        say(f"{document.parent.name}/{document.name}: {state}")
    hidden = sorted(set(loaded) - shown)
    if hidden:
        raise ValueError(f"report: the documents must show every result, got none of {hidden}")
    return 1 if outdated else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument(
        "--check", action="store_true", help="only tell whether the tables are current"
    )
    options = parser.parse_args(arguments)
    try:
        return run(check=options.check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
