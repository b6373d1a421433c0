# SPDX-License-Identifier: Apache-2.0
"""Times CUDA kernels on the current GPU, at the shapes that their predictions are for."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks._cuda_cases import CASES
from benchmarks._cuda_operators import OPERATORS
from benchmarks._machine import commit

ROUNDS = 20
FLUSH_BYTES = 1 << 28  # more than any second-level cache


def kernel_seconds(kernel: str, call: Callable[[], object]) -> float | None:
    """Median over calls of the time in the kernel, as the profiler of torch sees it.

    Caches are emptied before each call. None where the profiler saw no such kernel.
    """
    from torch.profiler import ProfilerActivity, profile

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(ROUNDS):
            flush.zero_()
            torch.cuda.synchronize()
            call()
            torch.cuda.synchronize()
    name = re.compile(rf"\b{kernel}\b")
    found = sorted(
        (event.time_range.start, 1e-6 * event.device_time)
        for event in profiler.events()
        if name.search(event.name)
    )
    return per_call([seconds for _, seconds in found])


def per_call(seconds: Sequence[float]) -> float | None:
    """Median over calls of the sum of a call's launches, all in the order of time; None of none."""
    launches, odd = divmod(len(seconds), ROUNDS)
    if odd:  # calls differ
        return sum(seconds) / ROUNDS
    calls = [sum(seconds[i * launches : (i + 1) * launches]) for i in range(ROUNDS)]
    return statistics.median(calls) if launches else None


def call_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median time of each call on the GPU, measured in turns, with whatever it launches."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(ROUNDS + 3):
        for index, call in enumerate(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                times[index].append(1e-3 * start.elapsed_time(end))
    return [statistics.median(each) for each in times]


def measure_all(
    wanted: Sequence[tuple[str, str]], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Seconds of every (kernel, shape), with the card and the commit.

    Args:
        wanted: In the order in which they are measured.
        save: Called after each: what is measured stays when time is up.
    """
    from pydense import _library

    _library.load()
    torch.backends.cudnn.benchmark = True  # the rival may look for its best kernel
    card, state = torch.cuda.get_device_name(), commit()
    kernels: dict[str, Any] = {}
    results = {"card": card, "commit": state, "kernels": kernels}
    for kernel, shape in wanted:
        key = f"{kernel}|{shape}"
        ours, rival, _ = CASES[key]()
        seconds = kernel_seconds(kernel, ours)
        if seconds is not None:
            kernels[key] = {"seconds": seconds, "card": card, "commit": state}
            kernels[key]["call"], *theirs = call_seconds([ours, rival] if rival else [ours])
            kernels[key]["rival"] = theirs[0] if theirs else None
        save(results)
        torch.cuda.empty_cache()
    return results


def beside_compiled(ours: Callable[[], object], compiled: Callable[[], object]) -> dict[str, Any]:
    """Times of a call and of torch.compile's form of it, or why there is none."""
    torch.compiler.reset()
    try:
        own, theirs = call_seconds([ours, compiled])
    except Exception as error:  # what it cannot compile is a result, too
        return {"error": str(error).splitlines()[0]}
    return {"call": own, "rival": theirs}


def add_operators(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Adds the times of operators as users call them; arguments as of :func:`add_compiled`."""
    from pydense import _library

    _library.load()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    for name, make in OPERATORS.items():
        ours, rival, compiled = make()
        assert rival is not None and compiled is not None
        own, theirs = call_seconds([ours, rival])
        entry = {"call": own, "rival": theirs, "compiled": beside_compiled(ours, compiled)}
        results.setdefault("operators", {})[name] = entry
        save()
        torch.cuda.empty_cache()


def add_compiled(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Adds the time of torch.compile's form of each call, measured in turns with pydense's.

    Calls that several kernels share are measured once, for the first of them.

    Args:
        results: As :func:`measure_all` returns it.
        save: Called after each: what is measured stays when time is up.
    """
    from pydense import _library

    _library.load()
    torch.backends.cudnn.benchmark = True
    seen = set()
    for key, make in CASES.items():
        if key not in results["kernels"] or make in seen:
            continue
        seen.add(make)
        ours, _, compiled = make()
        if compiled is None:
            continue
        results["kernels"][key]["compiled"] = beside_compiled(ours, compiled)
        save()
        torch.cuda.empty_cache()
