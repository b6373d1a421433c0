# SPDX-License-Identifier: Apache-2.0
"""Runs clang-tidy over the torch-free build: each source, for each of its instruction sets.

    python tools/ci/clang_tidy.py [BUILD_DIR]       # default: build/lint; MAX_JOBS at a time

Headers are checked through the sources that include them. The torch and NumPy doors and CUDA are
not part of that build; compilers check them with warnings as errors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A test may throw out of main, step through floats and grow a vector as it likes.
TEST_CHECKS = "-bugprone-exception-escape,-bugprone-float-loop-counter,-performance-*"
FINDING = re.compile(r"(?m)^(?=/\S+:\d+:\d+: (?:error|warning):)")


def tool(name: str) -> str:
    """The program beside this interpreter first: that is the pinned one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"clang_tidy: {name} is missing: pip install -r tools/ci/requirements.txt")
    return found


def configure(build: Path) -> list[str]:
    """Sources of the torch-free build with its C++ tests."""
    # No -Werror: .clang-tidy says what is an error, and clang dislikes some of libstdc++'s headers.
    options = ["-DPYDENSE_TESTS=ON", "-DPYDENSE_CUDA=OFF", "-DPYDENSE_WERROR=OFF"]
    options.append(f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    subprocess.run(
        [tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    commands = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    return sorted({command["file"] for command in commands})


def main() -> int:
    build = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "lint"
    sources = configure(build)
    clang_tidy = tool("clang-tidy")

    def check(source: str) -> tuple[str, str, int]:
        command = [clang_tidy, "-p", str(build), "--quiet", source]
        if Path(source).is_relative_to(ROOT / "tests"):
            command.append(f"--checks={TEST_CHECKS}")
        done = subprocess.run(command, capture_output=True, text=True)
        return source, done.stdout + done.stderr, done.returncode

    failed = 0
    seen: set[str] = set()
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        for source, output, status in pool.map(check, sources):
            failed += status != 0
            # A header's finding comes once per source and instruction set; once is enough.
            for finding in FINDING.split(output):
                headline = finding.split("\n", 1)[0]
                if status != 0 and headline not in seen:
                    seen.add(headline)
                    print(finding, end="")
            if status != 0:
                print(f"clang_tidy: {Path(source).relative_to(ROOT)} failed")
    print(f"clang_tidy: {len(sources)} sources, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
