# SPDX-License-Identifier: Apache-2.0
"""What the machine is and what it can do at best: memory bandwidth and float32 GEMM rate.

Both peaks are measured in a child process (``python -m benchmarks._machine THREADS``), because the
thread count of a BLAS is settled by environment variables before it loads.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ROOT

# What else, outside the program, decides how fast threads work together.
_RECORDED_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "OMP_PLACES")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as the kernel reports it; with family and model where that has no number."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name", "")
    # Virtual machines leave "AMD EPYC" of CPUs that differ by generations.
    if name and "cpu family" in fields and not any(c.isdigit() for c in name):
        name += f" family {fields['cpu family']} model {fields.get('model', '?')}"
    if name:
        return name
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe(packages: Sequence[str] = ("numpy",)) -> dict[str, Any]:
    """The machine in words: no names that tell whose it is.

    Args:
        packages: Distributions whose versions matter for the figures.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {name: version for name in packages if (version := _version(name))}
    return {
        "cpu": cpu_model(),
        "cpus": available_cpus(),
        "architecture": platform.machine(),
        "caches": _caches(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
        "packages": versions,
        "environment": {
            name: os.environ[name] for name in _RECORDED_VARIABLES if name in os.environ
        },
    }


MEASURED = ("csrc", "pydense", "CMakeLists.txt", "setup.py")  # what a result depends on


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(paths: Sequence[str] = MEASURED) -> str:
    """Commit of the source tree, ``-dirty`` where ``paths`` differ from it; empty outside git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return ""
    return head + ("-dirty" if _git("status", "--porcelain", "--", *paths) else "")


def same_sources(measured: str) -> bool:
    """Whether what a result of the commit ``measured`` depends on is what is there now."""
    if measured.endswith("-dirty") or commit().endswith("-dirty"):
        return False
    return _git("diff", "--quiet", measured, "HEAD", "--", *MEASURED) is not None


def bandwidth(threads: int, mib: int = 128, repeats: int = 5) -> dict[str, float]:
    """Bytes per second of ``a = b`` (copy) and ``a = b + c`` (add), the best of the repeats.

    As in STREAM, the bytes are those the program names (2 and 3 arrays): what a cache fetches
    before it overwrites a line is not counted.

    Args:
        threads: Each works on its own part of the arrays; NumPy lets go of the GIL meanwhile.
        mib: Size of one array; it should be several times the last-level cache.
        repeats: How often each is done.
    """
    count = mib * 2**20 // 4
    source, other, target = (np.full(count, value, np.float32) for value in (1, 2, 0))
    edges = np.linspace(0, count, threads + 1).astype(int)
    slices = [slice(a, b) for a, b in itertools.pairwise(edges)]

    def best(work: Callable[[slice], object], arrays: int) -> float:
        elapsed = []
        for _ in range(repeats):
            workers = [threading.Thread(target=work, args=(part,)) for part in slices]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            elapsed.append(time.perf_counter() - start)
        return arrays * 4 * count / min(elapsed)

    return {
        "copy": best(lambda part: np.copyto(target[part], source[part]), 2),
        "add": best(lambda part: np.add(source[part], other[part], out=target[part]), 3),
    }


def gemm(size: int = 2048, repeats: int = 5) -> dict[str, float]:
    """FLOP per second of a square float32 product by library, the best of the repeats.

    Uses the thread count that the environment sets. torch is asked as well where it is installed,
    since its BLAS is often another one.
    """
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    out = np.empty_like(left)
    products: dict[str, Callable[[], object]] = {"numpy": lambda: np.matmul(left, right, out=out)}
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(int(os.environ.get(_THREAD_VARIABLES[0], torch.get_num_threads())))
        a, b = torch.from_numpy(left), torch.from_numpy(right)
        products["torch"] = lambda: torch.mm(a, b)
    rates = {}
    for name, product in products.items():
        product()
        elapsed = []
        for _ in range(repeats):
            start = time.perf_counter()
            product()
            elapsed.append(time.perf_counter() - start)
        rates[name] = 2.0 * size**3 / min(elapsed)
    return rates


def measure_peaks(threads: int, quick: bool = False) -> dict[str, float]:
    """The two limits at a thread count, measured in a child process.

    Args:
        threads: Threads for both.
        quick: Small sizes, for tests: the figures are then those of a cache.

    Returns:
        ``bandwidth`` (bytes per second, the better of copy and add), ``gemm`` (FLOP per second, the
        best library), and what they were taken from: ``copy``, ``add``, ``gemm_<library>``.
    """
    environment = dict(os.environ)
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    command = [sys.executable, "-m", "benchmarks._machine", str(threads)]
    done = subprocess.run(
        command + (["--quick"] if quick else []),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    peaks: dict[str, float] = json.loads(done.stdout)
    return peaks


def _main(arguments: Sequence[str]) -> None:
    quick = "--quick" in arguments
    memory = bandwidth(int(arguments[0]), **({"mib": 8, "repeats": 2} if quick else {}))
    rates = gemm(**({"size": 256, "repeats": 2} if quick else {}))
    figures = {"bandwidth": max(memory.values()), "gemm": max(rates.values()), **memory}
    figures.update({f"gemm_{name}": rate for name, rate in rates.items()})
    print(json.dumps(figures))


if __name__ == "__main__":
    _main(sys.argv[1:])
