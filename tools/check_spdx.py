# SPDX-License-Identifier: Apache-2.0
"""Every source file names its licence in its first line (the second, after a shebang).

python tools/check_spdx.py [FILE ...]      # default: all files git knows or would add
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = "SPDX-License-Identifier: Apache-2.0"
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".sh", ".toml", ".yaml", ".in"}
NAMES = {
    "CMakeLists.txt",
    "allowed_skips.txt",
    "requirements.txt",
    ".clang-format",
    ".clang-tidy",
    ".gitignore",
    "run",
}


def is_source(path: Path) -> bool:
    return path.suffix in SUFFIXES or path.name in NAMES


def has_line(path: Path) -> bool:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = lines[1:2] if lines and lines[0].startswith("#!") else lines[:1]
    return bool(first) and first[0].lstrip("#/ ") == LINE


def project_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name]


def main(arguments: Sequence[str]) -> int:
    paths = [Path(name) for name in arguments] or project_files()
    sources = [path for path in paths if path.is_file() and is_source(path)]
    missing = [path for path in sources if not has_line(path)]
    for path in missing:
        print(f"{path}: the first line must be '{LINE}' in a comment")
    print(f"check_spdx: {len(sources)} source files, {len(missing)} without the licence line")
    return 1 if missing or not (sources or arguments) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
