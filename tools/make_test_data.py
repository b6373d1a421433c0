# SPDX-License-Identifier: Apache-2.0
"""Derive tests/data from the test-data folder (PYDENSE_TEST_DATA, default ../shared/data).

What is copied is numbers only, but for one 43 x 53 crop of a picture that is the input of the
numbers. Run it again when the sources change: the result is the same to the byte for the same
sources.

    python tools/make_test_data.py [--source DIR] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "tests" / "data"


def golden(source: Path) -> bytes:
    """What pydensecrf answers on the crop, as it was recorded."""
    return (source / "crf" / "derived" / "pydensecrf_golden.npz").read_bytes()


def monai(source: Path) -> bytes:
    """MONAI's CPU tables. Its CUDA tables encode a bug in its blur kernel, so they are no truth."""
    text = (source / "crf" / "monai" / "monai_crf_phl_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = {
        name: table for name, table in json.loads(text).items() if "_cuda" not in name
    }
    for table in tables.values():
        table.update((key, _parse(value)) for key, value in table.items() if key != "desc")
    # One table per line: readable in a diff without one line per number.
    lines = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(tables[name])}" for name in sorted(tables)
    )
    return f"{{\n{lines}\n}}\n".encode()


def _parse(value: Any) -> Any:
    """Some tables were recorded as the text of Python lists."""
    return json.loads(value.replace("None", "null")) if isinstance(value, str) else value


FILES = {"pydensecrf_golden.npz": golden, "monai_cpu.json": monai}


def main() -> int:
    """Write the files, or with --check compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(os.environ.get("PYDENSE_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--source", type=Path, default=default, help="test-data folder")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    args = parser.parse_args()
    if not (args.source / "crf").is_dir():
        parser.error(f"no crf folder in {args.source}")
    stale = []
    for name, make in FILES.items():
        content, path = make(args.source), TARGET / name
        if args.check:
            if not path.is_file() or path.read_bytes() != content:
                stale.append(name)
        else:
            path.write_bytes(content)
            print(f"{path.relative_to(ROOT)}: {len(content):,} bytes")
    if stale:
        print("differs from the sources: " + ", ".join(stale), file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
