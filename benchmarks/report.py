# SPDX-License-Identifier: Apache-2.0
"""Turns benchmarks/results/*.json into the tables of README.md and benchmarks/README.md.

    python -m benchmarks.report            # rewrites the text between the markers
    python -m benchmarks.report --check    # exit status 1 where that would change a file

A marker is ``<!-- benchmark:NAME -->``, ``<!-- benchmark:NAME fastest -->`` or
``<!-- benchmark:NAME full -->``, NAME being that of a result file, and ends at
``<!-- /benchmark -->``. The first form gives one row per case and rival with the ratio of the whole
call, the second one row per case with the fastest rival's, the third one row per run and rival with
stages, memory and the distance from the machine's limit. A result of the kind ``scaling`` has one
form, and a plot beside its JSON file.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._comparison_report import (
    fastest_table,
    full_table,
    losses,
    peaks_line,
    preamble,
    summary_table,
    table,
    versions,
)
from benchmarks._result import RESULTS, load_result
from benchmarks._scaling_report import HEADER, plot, rows

MARKER = re.compile(
    r"^(?P<open><!-- benchmark:(?P<name>\w+)(?: (?P<form>\w+))? -->)\n"
    r"(?P<body>.*?)^(?P<close><!-- /benchmark -->)$",
    re.MULTILINE | re.DOTALL,
)
OPENING = re.compile(r"^<!-- benchmark:\w+(?: \w+)? -->$", re.MULTILINE)
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")

Result = Mapping[str, Any]


def scaling(result: Result, folder: str) -> list[str]:
    """The text of a result of the kind ``scaling``, with its plot."""
    machine, runs = result["machine"], result["runs"]
    text = (
        f"{result['title']}: the median over {runs[0]['rounds']} rounds of the ratio to the "
        f"smallest size in the same round. {machine['cpu']} ({machine['cpus']} CPUs, shared "
        f"machine), {runs[0]['isa']}; {versions(machine)}; {result['date']}"
    )
    text += (f", commit {result['commit']}" if result["commit"] else "") + "."
    image = f"![{result['title']}]({folder}/{result['name']}.svg)"
    return [text, image, table(HEADER, rows(result))]


def render(result: Result, form: str | None, folder: str = "results") -> str:
    """The text between the markers.

    Args:
        result: The result.
        form: None for the short form, "fastest" for the shortest, "full" for the long one.
        folder: Where the plots are, as seen from the document.
    """
    if form not in (None, "fastest", "full"):
        raise ValueError(f"report: form must be left out, 'fastest' or 'full', got {form!r}")
    if result.get("kind") == "scaling":
        parts = scaling(result, folder)
    elif form is None:
        parts = [preamble(result), summary_table(result), losses(result)]
    elif form == "fastest":
        against = "Ratios of a whole call to the fastest rival's."
        parts = [f"{preamble(result)} {against}", fastest_table(result), losses(result, most=8)]
    else:
        parts = [preamble(result), full_table(result), f"{losses(result)} {peaks_line(result)}"]
    return "\n" + "\n\n".join(parts) + "\n\n"


def update(text: str, results: Mapping[str, Result], where: str, folder: str = "results") -> str:
    """The document with the text between its markers made anew.

    Raises:
        ValueError: For a marker without end or without result.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in results:
            raise ValueError(f"report: {where} must name a result, got {name!r}")
        return f"{match['open']}\n{render(results[name], match['form'], folder)}{match['close']}"

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
        say: Gets one line per file.

    Returns:
        Exit status: 0, or 1 where ``check`` found a document or a plot out of date.
    """
    loaded = {path.stem: load_result(path) for path in sorted(results.glob("*.json"))}
    shown: set[str] = set()
    files: dict[Path, str] = {}
    for document in documents:
        if not document.exists():
            say(f"{document.name}: not there")
            continue
        text = document.read_text()
        shown.update(match["name"] for match in MARKER.finditer(text))
        folder = Path(os.path.relpath(results, document.parent)).as_posix()
        files[document] = update(text, loaded, document.name, folder)
    for name, result in loaded.items():
        if result.get("kind") == "scaling":
            files[results / f"{name}.svg"] = plot(result)
    outdated = 0
    for path, new in files.items():
        old = path.read_text() if path.exists() else None
        state = "up to date"
        if new != old and check:
            outdated += 1
            state = "out of date, run python -m benchmarks.report"
        elif new != old:
            path.write_text(new)
            state = "written"
        say(f"{path.parent.name}/{path.name}: {state}")
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
