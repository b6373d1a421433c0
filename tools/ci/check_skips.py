# SPDX-License-Identifier: Apache-2.0
"""Lists the skipped tests of pytest runs and refuses those that nobody allowed.

    python tools/ci/check_skips.py REPORT.xml ... [--enforce]

REPORT.xml is what ``pytest --junitxml`` wrote. allowed_skips.txt beside this file holds one regular
expression per line, searched in ``test: reason``, each under a comment with its why. A skip that
matches none is an error with --enforce, which CI gives when the test pictures are there: without
them skipping is what the tests should do. The last line is the total over all reports.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ALLOWED = Path(__file__).with_name("allowed_skips.txt")


class Result(NamedTuple):
    passed: int
    failed: int
    skips: list[str]


def patterns(text: str) -> list[re.Pattern[str]]:
    lines = (line.strip() for line in text.splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def read_report(path: Path) -> Result:
    """Counts of one report; a skip reads ``test: reason``. An expected failure is no skip."""
    passed = failed = 0
    skips = []
    for case in ElementTree.parse(path).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif skipped is not None and skipped.get("type") == "pytest.skip":
            name = f"{case.get('classname')}::{case.get('name')}".removeprefix("::")
            skips.append(f"{name}: {skipped.get('message')}")
        else:
            passed += 1
    return Result(passed, failed, skips)


def refused(skips: Iterable[str], allowed: Sequence[re.Pattern[str]]) -> list[str]:
    return [skip for skip in skips if not any(pattern.search(skip) for pattern in allowed)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="List skipped tests, refuse unexpected ones.")
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--enforce", action="store_true", help="fail on a skip not in the list")
    parser.add_argument("--allowed", type=Path, default=ALLOWED)
    options = parser.parse_args(arguments)
    results = [read_report(path) for path in options.reports]
    skips = [skip for result in results for skip in result.skips]
    bad = refused(skips, patterns(options.allowed.read_text(encoding="utf-8")))
    for skip in skips:
        print(f"skipped{' (not on the list)' if skip in bad else ''}: {skip}")
    passed, failed = (sum(result[i] for result in results) for i in (0, 1))
    print(f"total: {passed} passed, {failed} failed, {len(skips)} skipped")
    if passed + failed == 0:
        print("check_skips: no test ran")
        return 1
    return 1 if failed or (options.enforce and bad) else 0


if __name__ == "__main__":
    sys.exit(main())
