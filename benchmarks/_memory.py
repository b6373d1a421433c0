# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one rival of one case, measured from outside the allocator.

``python -m benchmarks._memory MODULE CASE RIVAL THREADS`` is the child process: it makes the
case's inputs, calls the rival on a tiny problem where the case offers one (its code and what it
sets up once are not what is asked for), gives freed pages back to the system, notes the resident
set, resets its high-water mark, calls the rival once and prints how far the mark rose. Native
allocations count, which ``tracemalloc`` does not see.

The mark is ``VmHWM`` of ``/proc/self/status``. ``getrusage`` is only the way out where that cannot
be reset: Linux lets a child inherit the figure of its parent through ``fork``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import ROOT
from benchmarks._harness import set_threads, stages_of, time_call


def _status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _return_freed_pages() -> None:
    """Hands memory that was freed before the measurement back, so that reusing it is seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    """Sets the high-water mark to the present resident set; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak(resettable: bool) -> int:
    if resettable:
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_here(module: str, case: str, rival: str, threads: int) -> int:
    """Bytes by which the resident set's peak rises during one call, in this process."""
    found = importlib.import_module(module).make_case(case)
    stages = stages_of(found.setup()[rival])
    set_threads(threads)
    if found.prime is not None:
        found.prime(rival)
    if rival in found.before:
        found.before[rival]()
    _return_freed_pages()
    resettable = _reset_peak()
    before = _status("VmRSS")
    _, result = time_call(stages)
    peak = _peak(resettable)
    del result
    return max(0, peak - before)


def peak_memory(
    module: str, case: str, rival: str, threads: int, env: Mapping[str, str] | None = None
) -> int:
    """Bytes that a call of a rival needs beyond its inputs, at its peak; runs in a child process.

    Args:
        module: Importable module with ``make_case(name) -> Case``.
        case: Name of the case.
        rival: Label of the rival.
        threads: Number of threads.
        env: Environment variables to add.
    """
    command = [sys.executable, "-m", "benchmarks._memory", module, case, rival, str(threads)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    if done.returncode != 0:
        raise RuntimeError(f"peak_memory: {case} with {rival} failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
