# SPDX-License-Identifier: Apache-2.0
"""Tables and sentences of results of the kind ``comparison``: a subject, its variants, rivals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks._harness import TOTAL

Run = Mapping[str, Any]
Result = Mapping[str, Any]

# What labels of the forms have beside the subject's name.
FORMS = ("channels_last", "torch.compile")


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
    """Peak MiB of the subject and its variants, in parentheses the rival's, and subject / rival.

    Bold where the subject needs more.
    """
    memory = run.get("memory", {})
    own, other = memory.get(run["subject"]), memory.get(rival)
    if own is None:
        return ""
    ours = [memory[label] for label in ours_of(run) if label in memory]
    text = " / ".join(f"{peak / 2**20:.0f}" for peak in ours)
    if other is None:
        return text
    text += f" ({other / 2**20:.0f}), {own / max(other, 1):.2f}x"
    return f"**{text}**" if own > other else text


def ours_of(run: Run) -> list[str]:
    """Labels of what is judged: the subject first, then its variants."""
    return [run["subject"], *run.get("variants", {})]


def ratios_of(run: Run, own: str) -> Mapping[str, Any]:
    """By rival, the ratios rival / own, own being the subject or a variant."""
    found: Mapping[str, Any] = run["ratios"] if own == run["subject"] else run["variants"][own]
    return found


def rivals_in(result: Result) -> list[str]:
    """All rivals, in the order in which they appear."""
    return list(dict.fromkeys(label for run in result["runs"] for label in run["ratios"]))


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


def versions(machine: Mapping[str, Any]) -> str:
    """Packages, and environment variables that matter."""
    parts = [f"{name} {version}" for name, version in machine["packages"].items()]
    parts += [f"`{name}={value}`" for name, value in machine.get("environment", {}).items()]
    return ", ".join(parts)


def preamble(result: Result) -> str:
    """What was measured, where, and against whom."""
    machine, runs = result["machine"], result["runs"]
    subject = runs[0]["subject"]
    rivals = {
        label: rival["threads"]
        for run in runs
        for label, rival in run["rivals"].items()
        if label not in ours_of(run)
    }
    fixed = [
        f"{label} always on {_plural(count)}"
        for label, count in rivals.items()
        if all(run["rivals"][label]["threads"] == count for run in runs if label in run["rivals"])
        and len({run["threads"] for run in runs}) > 1
    ]
    low, high = min(r["rounds"] for r in runs), max(r["rounds"] for r in runs)
    rounds = f"{low}" if low == high else f"{low} to {high}"
    text = (
        f"{result['title']}. Ratios are rival time / {subject} time, the median of {rounds} "
        f"interleaved rounds; above 1 {subject} is faster. "
        f"{_cells(result)}{_cpus(result)} ({machine['cpus']} CPUs, shared machine); "
    )
    text += versions(machine)
    text += f"; {'; '.join(fixed)}" if fixed else ""
    text += f"; {result['date']}"
    return text + commits(result) + "." + contention(result)


def commits(result: Result) -> str:
    """The commit that was measured, or how many runs are of which."""
    counts = Counter(run.get("commit", result["commit"]) for run in result["runs"])
    if len(counts) > 1:
        return ", commits " + _counted(counts)
    return "".join(f", commit {name}" for name in counts if name)


def _cpus(result: Result) -> str:
    """The CPU, or how many runs are of which."""
    own = result["machine"]["cpu"]
    counts = Counter(run.get("cpu", own) for run in result["runs"])
    return _counted(counts) if len(counts) > 1 else "".join(counts) or own


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({n} runs)" for name, n in counts.items())


def _cells(result: Result) -> str:
    """What the figures in one cell of a table are, where there are several."""
    ours = max((ours_of(run) for run in result["runs"]), key=len)
    return f"Cells: {' / '.join(ours)}. " if len(ours) > 1 else ""


def losses(result: Result, most: int | None = None) -> str:
    """Where a rival was better, in words.

    Args:
        result: The result.
        most: Longer lists of runs are left to the table beside; None names all.
    """
    compared = [run for run in result["runs"] if run["ratios"]]
    if not compared:
        return "No rival was installed, so there is nothing to compare with."
    sentences = []
    subject = compared[0]["subject"]
    ours = max((ours_of(run) for run in compared), key=len)
    for own in ours:
        having = [run for run in compared if own in ours_of(run)]
        text = _lost(having, [_to_fastest(run, own) for run in having], most)
        first = own == subject
        sentences.append(f"Slower than the fastest rival {text}" if first else f"{own}: {text}")
    if len(_forms(ours)) > 1:
        best = [max(_to_fastest(run, own) for own in _forms(ours_of(run))) for run in compared]
        sentences.append(f"The fastest of {', '.join(_forms(ours))}: {_lost(compared, best, most)}")
    text = ". ".join(sentences) + "."
    weighed = [run for run in compared if set(run["ratios"]) & set(run.get("memory", {}))]
    if weighed:
        heavier = sum(
            any(
                r["memory"][r["subject"]] > r["memory"][label]
                for label in r["ratios"]
                if label in r["memory"]
            )
            for r in weighed
        )
        text += f" A higher memory peak in {heavier} of {len(weighed)}."
    return text


def _forms(ours: Sequence[str]) -> list[str]:
    """Of the subject and its variants, those that a user chooses by memory format or compiling.

    Other variants are no choice: a lower bound, or a call that finds its cache filled.
    """
    return [own for own in ours if set(own.split()) <= {ours[0], *FORMS}]


def _to_fastest(run: Run, own: str) -> float:
    """The whole-call ratio to the fastest rival."""
    return min(float(stages[TOTAL]["median"]) for stages in ratios_of(run, own).values())


def _lost(runs: Sequence[Run], ratios: Sequence[float], most: int | None) -> str:
    """In how many runs the ratio is below 1, and which they are, if not more than ``most``."""
    lost = [
        f"{run['case']} ({run['isa']}, {_plural(run['threads'])})"
        for run, ratio in zip(runs, ratios, strict=True)
        if ratio < 1
    ]
    names = f": {'; '.join(lost)}" if lost and (most is None or len(lost) <= most) else ""
    return f"in {len(lost)} of {len(runs)} runs{names}"


def cell(run: Run, rival: str) -> str:
    """Whole-call ratios to a rival, of the subject and its variants."""
    return " / ".join(filter(None, (cell_of(run, own, rival) for own in ours_of(run))))


def summary_table(result: Result) -> str:
    """One row per case and rival: whole-call ratios at every setting."""
    settings, checks, rivals = _settings(result), _check_names(result), rivals_in(result)
    several = len(rivals) > 1
    header = ["case", *(["rival"] if several else [])]
    header += [f"{isa}, {_plural(threads)}" for isa, threads in settings]
    header += ["peak memory, MiB (rival)"] + [name.replace("_", " ") for name in checks]
    rows = []
    for case, runs in _by_case(result).items():
        for rival in [r for r in rivals if any(r in run["ratios"] for run in runs)] or [""]:
            row = [case, *([rival] if several else [])]
            for setting in settings:
                there = [run for run in runs if (run["isa"], run["threads"]) == setting]
                row.append(cell(there[0], rival) if there else "")
            row.append(memory_text(runs[0], rival))
            rows.append(row + [_worst_check(runs, rival, name) for name in checks])
    return table(header, rows)


def fastest_table(result: Result) -> str:
    """One row per case: whole-call ratios to the fastest rival, of the subject and its variants."""
    settings = _settings(result)
    header = ["case", *(f"{isa}, {_plural(threads)}" for isa, threads in settings)]
    header.append("peak memory, MiB (rival)")
    rows = []
    for case, runs in _by_case(result).items():
        by_setting = {(run["isa"], run["threads"]): run for run in runs}
        cells = [_fastest_cell(by_setting[s]) if s in by_setting else "" for s in settings]
        rows.append([case, *cells, memory_text(runs[0], runs[0].get("fastest_rival", ""))])
    return table(header, rows)


def _fastest_cell(run: Run) -> str:
    compared = [ratios_of(run, own).values() for own in ours_of(run)]
    totals = [[stages[TOTAL] for stages in ratios] for ratios in compared]
    return " / ".join(
        ratio_text(min(found, key=lambda figures: figures["median"])) for found in totals if found
    )


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
    variants = list(dict.fromkeys(v for run in result["runs"] for v in ours_of(run)[1:]))
    header = ["case", "ISA", "threads", "rival", *stages, *variants, f"{subject} ms (rival)"]
    header += ["MiB (rival)", *(name.replace("_", " ") for name in checks), "times limit"]
    rows = []
    for run in result["runs"]:
        for rival in run["ratios"] or [""]:
            row = [run["case"], run["isa"], str(run["threads"]), rival]
            for stage in stages:
                figures = run["ratios"].get(rival, {}).get(stage)
                row.append(ratio_text(figures, spread=stage == TOTAL) if figures else "")
            row += [cell_of(run, own, rival) for own in variants]
            own, other = _own(run)[TOTAL]["median"], run["rivals"].get(rival)
            theirs = f" ({other['seconds'][TOTAL]['median'] * 1e3:.0f})" if other else ""
            row.append(f"{own * 1e3:.1f}{theirs}")
            row.append(memory_text(run, rival))
            row += [_check_text(run, rival, name) for name in checks]
            limit = run.get("limit", {}).get(TOTAL)
            rows.append([*row, f"{limit['times_limit']:.1f}" if limit else ""])
    return table(header, rows)


def cell_of(run: Run, own: str, rival: str) -> str:
    """The whole-call ratio of one variant to a rival."""
    stages = ratios_of(run, own).get(rival) if own in ours_of(run) else None
    return ratio_text(stages[TOTAL]) if stages else ""


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
