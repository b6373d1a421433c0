# SPDX-License-Identifier: Apache-2.0
"""What the packaging tests share: clean source trees, environments, and a look into binaries."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sysconfig.get_path("scripts")
# A GPU must not be needed; pytest's and pydense's own switches must not reach the builds.
DROPPED = re.compile(
    r"^(PYTEST_.*|PYTHONPATH|PYDENSE_.*|CUDACXX|CMAKE_(?!CUDA_COMPILER_LAUNCHER$).*|VIRTUAL_ENV)$"
)


def environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not DROPPED.match(key)}
    return {"MAX_JOBS": "2", **kept, "CUDA_VISIBLE_DEVICES": "", **changes}


def run(
    command: Sequence[str | Path], cwd: Path, check: bool = True, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Runs in a clean environment; a failure shows what was printed (stderr goes to stdout)."""
    __tracebackhide__ = True
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if check and done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-80:])
        raise AssertionError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{tail}")
    return done


def project_files() -> list[str]:
    """Paths that git knows or would add: the tree as a clone has it."""
    listing = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_tree(target: Path, names: Sequence[str]) -> Path:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def new_venv(folder: Path, borrow: bool = False) -> Path:
    """Path of a new environment's Python; ``borrow`` shows it the packages of the running one.

    A borrowed package has no program in the new environment's bin folder.
    """
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    if borrow:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    return run(command, python.parent, **changes)


def undefined_symbols(library: Path) -> dict[str, str]:
    """Symbol -> version ("" for none) of what the dynamic linker must find elsewhere."""
    symbols = {}
    for line in run(["nm", "-D", "--undefined-only", library], library.parent).stdout.splitlines():
        name, _, version = line.split()[-1].partition("@")
        symbols[name] = version.lstrip("@")
    return symbols


def dynamic_section(library: Path) -> dict[str, list[str]]:
    """Tag -> values, e.g. NEEDED, RPATH and RUNPATH."""
    entries: dict[str, list[str]] = {}
    for line in run(["readelf", "-d", "-W", library], library.parent).stdout.splitlines():
        if match := re.search(r"\((\w+)\)\s.*\[(.*)\]", line):
            entries.setdefault(match[1], []).append(match[2])
    return entries
