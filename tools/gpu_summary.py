# SPDX-License-Identifier: Apache-2.0
"""One page about a run of tools/verify_gpu.sh, which calls this.

    python tools/gpu_summary.py STEPS OUTDIR

Reads ``steps.tsv`` and ``tests.xml`` in STEPS and ``kernels.json`` and the logs in OUTDIR; writes
``summary.md`` and ``verify.json`` there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Name, status (0, a number, "timeout", "no-time", "dry-run"), seconds, log of each step."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name, status, seconds, log = line.split("\t")
        steps.append({"name": name, "status": status, "seconds": int(seconds), "log": log})
    return steps


def read_tests(path: Path) -> dict[str, Any]:
    """Counts of pytest's report, and the names of failed and skipped tests."""
    counts: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}
    if not path.exists():
        return counts
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(name)
        elif (skipped := case.find("skipped")) is not None:
            counts["skipped"].append(f"{name}: {skipped.get('message')}")
        else:
            counts["passed"] += 1
    return counts


def sanitizer_verdict(status: str, log: str) -> str:
    """What one tool of compute-sanitizer said: a tool that did not start is no verdict."""
    if status in ("timeout", "no-time", "dry-run"):
        return status
    found = [int(a or b) for a, b in FOUND.findall(log)]
    if not found or "Device not supported" in log:
        return "did not start on this machine"
    if sum(found) == 0 and status == "0":
        return "nothing found"
    return f"{sum(found)} errors" if sum(found) else f"tests failed under it (status {status})"


def sections(log: str) -> dict[str, str]:
    """The log of each tool, cut at the headlines that verify_gpu.sh writes."""
    parts = re.split(r"(?m)^==> (\w+): .*$", log)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def gain(times: Mapping[str, Any]) -> str:
    """A rival's time over that of pydense's call, of the same turns, or why there is none."""
    known = times.get("rival") and times.get("call")
    return f"{times['rival'] / times['call']:.2f}x" if known else times.get("error", "-")


def kernel_rows(kernels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for key, kernel in sorted(kernels.items()):
        name, shape = key.split("|", 1)
        measured, predicted = kernel["seconds"], kernel.get("predicted")
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        shown = f"{1e6 * predicted:.1f} us" if predicted else "-"
        rows.append(
            f"| `{name}` | {shape} | {1e6 * measured:.1f} us | {shown} | {ratio} | {gain(kernel)} "
            f"| {gain(kernel.get('compiled', {}))} |"
        )
    return rows


def summary(
    result: Mapping[str, Any],
    kernels: Mapping[str, Any],
    operators: Mapping[str, Any],
    errors: Mapping[str, str],
) -> str:
    """The page."""
    tests = result["tests"]
    lines = [f"# pydense on {result['card'] or 'a GPU'}", ""]
    lines += [f"Commit {result['commit']}; {result['environment']}.", ""]
    lines += ["| step | status | seconds |", "|---|---|--:|"]
    for step in result["steps"]:
        status = {"0": "ok"}.get(step["status"], step["status"])
        lines.append(
            f"| {step['name']} | {result['sanitizer'].get(step['name'], status)} "
            f"| {step['seconds']} |"
        )
    lines += ["", f"Tests marked cuda: {tests['passed']} passed, {len(tests['failed'])} failed, "]
    lines[-1] += f"{len(tests['skipped'])} skipped."
    lines += [f"- failed: {name}" for name in tests["failed"][:20]]
    lines += [f"- skipped: {name}" for name in tests["skipped"][:20]]
    lines += ["", "| kernel | shape | measured | predicted on H200 | measured / predicted | "]
    lines[-1] += "torch / pydense, whole call | torch.compile / pydense |"
    lines += ["|---|---|--:|--:|--:|--:|--:|", *kernel_rows(kernels)]
    if operators:
        lines += ["", "| operator | pydense | torch / pydense | torch.compile / pydense |"]
        lines += ["|---|--:|--:|--:|"]
    for name, times in operators.items():
        own = f"{1e6 * times['call']:.1f} us" if "call" in times else "-"
        lines.append(f"| {name} | {own} | {gain(times)} | {gain(times.get('compiled', {}))} |")
    if errors:
        lines += ["", *(f"- not measured: {key}: {error}" for key, error in errors.items())]
    return "\n".join(lines) + "\n"


def environment() -> str:
    """Versions, as far as they can be had."""
    try:
        import torch

        text = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    except ImportError:
        return "no torch"
    return text + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str]) -> int:
    steps_folder, out = Path(arguments[0]), Path(arguments[1])
    steps = read_steps(steps_folder / "steps.tsv")
    measured = json.loads((out / "kernels.json").read_text(encoding="utf-8"))
    logs = sections((out / "sanitizer.log").read_text(encoding="utf-8", errors="replace"))
    result = {
        "card": measured["card"],
        "commit": measured["commit"] or commit(),
        "environment": environment(),
        "steps": steps,
        "tests": read_tests(steps_folder / "tests.xml"),
        "sanitizer": {
            step["name"]: sanitizer_verdict(step["status"], logs.get(step["name"], ""))
            for step in steps
            if step["name"] in TOOLS
        },
    }
    (out / "verify.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    more = (measured.get(name, {}) for name in ("operators", "errors"))
    page = summary(result, measured["kernels"], *more)
    (out / "summary.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
