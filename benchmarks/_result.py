# SPDX-License-Identifier: Apache-2.0
"""The result files, benchmarks/results/<name>.json; benchmarks/README.md lists their keys."""

from __future__ import annotations

import datetime
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks._harness import TOTAL

SCHEMA = "pydense-benchmark/1"
KINDS = ("comparison", "scaling")
RESULTS = ROOT / "benchmarks" / "results"
NOTE = (
    "Measured on a shared machine: compare ratios (rival / subject of the same round, median over "
    "the rounds), not the absolute seconds, which are medians kept for reading only."
)

_TOP = {
    "schema": str,
    "name": str,
    "title": str,
    "note": str,
    "date": str,
    "commit": str,
    "command": str,
    "machine": dict,
    "peaks": dict,
    "runs": list,
}
_RUN = {
    "case": str,
    "params": dict,
    "threads": int,
    "isa": str,
    "rounds": int,
    "warmup": int,
    "order": str,
    "subject": str,
    "rivals": dict,
    "ratios": dict,
    "checks": dict,
}
_SUMMARY = ("median", "q1", "q3", "min", "max", "rounds")


def make_result(
    name: str,
    title: str,
    *,
    runs: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    peaks: Mapping[int, Mapping[str, float]],
    command: str,
    commit: str = "",
    kind: str = "comparison",
) -> dict[str, Any]:
    """Puts the parts of a result together.

    Args:
        name: Base name of the file and of the report's marker.
        title: One line for a reader.
        runs: What :func:`benchmarks._harness.run_cases` returned, each with ``isa`` added.
        machine: :func:`benchmarks._machine.describe`.
        peaks: :func:`benchmarks._machine.measure_peaks` by thread count.
        command: The command that repeats the measurement.
        commit: Commit that was measured.
        kind: ``comparison`` of rivals, or ``scaling``: a run is an axis, its rivals are sizes.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "kind": kind,
        "title": title,
        "note": NOTE,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "command": command,
        "machine": dict(machine),
        "peaks": {str(threads): dict(peak) for threads, peak in peaks.items()},
        "runs": [dict(run) for run in runs],
    }


def _require(condition: bool, where: str, what: str, got: object) -> None:
    if not condition:
        raise ValueError(f"result: {where} must {what}, got {got!r}")


def _check_keys(value: Mapping[str, Any], keys: Mapping[str, type], where: str) -> None:
    for key, kind in keys.items():
        _require(key in value, where, f"have '{key}'", sorted(value))
        right = isinstance(value[key], kind) and not (kind is int and value[key] is True)
        _require(right, f"{where}.{key}", f"be of type {kind.__name__}", value[key])


def _check_summaries(stages: Mapping[str, Any], where: str) -> None:
    _require(TOTAL in stages, where, f"have '{TOTAL}'", sorted(stages))
    for stage, figures in stages.items():
        at = f"{where}.{stage}"
        for key in _SUMMARY:
            _require(key in figures, at, f"have '{key}'", sorted(figures))
        ordered = [figures[key] for key in ("min", "q1", "median", "q3", "max")]
        _require(all(math.isfinite(x) and x > 0 for x in ordered), at, "be positive", ordered)
        _require(ordered == sorted(ordered), at, "be ordered min..max", ordered)


def validate(result: Mapping[str, Any]) -> None:
    """Checks that a result has the documented form.

    Raises:
        ValueError: Names the first key that is missing or wrong.
    """
    _require(result.get("schema") == SCHEMA, "schema", f"be {SCHEMA!r}", result.get("schema"))
    _check_keys(result, _TOP, "top level")
    kind = result.get("kind", KINDS[0])
    _require(kind in KINDS, "kind", f"be one of {', '.join(KINDS)}", kind)
    _require(len(result["runs"]) > 0, "runs", "not be empty", [])
    for index, run in enumerate(result["runs"]):
        at = f"runs[{index}]"
        _check_keys(run, _RUN, at)
        rivals = run["rivals"]
        _require(run["subject"] in rivals, f"{at}.subject", "be a rival", run["subject"])
        for label, rival in rivals.items():
            _check_keys(rival, {"threads": int, "seconds": dict}, f"{at}.rivals.{label}")
            _check_summaries(rival["seconds"], f"{at}.rivals.{label}.seconds")
        variants = run.get("variants", {})
        _require(set(variants) <= set(rivals), f"{at}.variants", "be rivals", sorted(variants))
        others = sorted(set(rivals) - {run["subject"], *variants})
        _require(sorted(run["ratios"]) == others, f"{at}.ratios", f"have {others}", run["ratios"])
        for label, stages in run["ratios"].items():
            _check_summaries(stages, f"{at}.ratios.{label}")
        for variant, compared in variants.items():
            where = f"{at}.variants.{variant}"
            _require(sorted(compared) == others, where, f"have {others}", sorted(compared))
            for label, stages in compared.items():
                _check_summaries(stages, f"{where}.{label}")
        if others:
            _require(
                run.get("fastest_rival") in others, f"{at}.fastest_rival", "be a rival", others
            )


def _rounded(value: Any) -> Any:
    """Floats to five significant digits: more would only be noise in the diff."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def write_result(result: Mapping[str, Any], path: Path | None = None) -> Path:
    """Validates a result and writes it, whole or not at all.

    Args:
        result: From :func:`make_result`.
        path: Default is benchmarks/results/<name>.json.
    """
    result = _rounded(result)
    validate(result)
    path = path or RESULTS / f"{result['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(result, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def load_result(path: Path) -> dict[str, Any]:
    """Reads and validates a result file."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        validate(result)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return result
