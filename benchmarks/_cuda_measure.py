# SPDX-License-Identifier: Apache-2.0
"""Times CUDA kernels on the current GPU, at the shapes that their predictions are for."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch

from benchmarks._cuda_calls import Calls
from benchmarks._cuda_cases import CASES
from benchmarks._machine import commit

ROUNDS = 20
WAIT_CYCLES = 1 << 20  # of the GPU, half a millisecond
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
    """Median time of each call on the GPU, measured in turns, with whatever it launches.

    The GPU waits before each call, so that what the host does for it is not counted.
    """
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(ROUNDS + 3):
        for index, call in enumerate(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT_CYCLES)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 3:
                times[index].append(1e-3 * start.elapsed_time(end))
    return [statistics.median(each) for each in times]


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returns; what could not be run is a result, too."""
    try:
        return measure()
    except Exception as error:
        return {"error": repr(error)[:200].replace("|", "/").replace("\n", " ")}


def measure_all(
    wanted: Sequence[tuple[str, str]],
    save: Callable[[dict[str, Any]], None],
    results: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Seconds of every (kernel, shape), with the card and the commit.

    Args:
        wanted: In the order in which they are measured.
        save: Called after each: what is measured stays when time is up.
        results: To which they are added.
    """
    _ready()
    card, state = torch.cuda.get_device_name(), commit()
    results = {"card": card, "commit": state, "kernels": {}} if results is None else results
    for kernel, shape in wanted:
        key = f"{kernel}|{shape}"
        calls = CASES[key]()

        def measure(kernel: str = kernel, calls: Calls = calls) -> dict[str, Any]:
            seconds = kernel_seconds(kernel, calls.ours)
            if seconds is None:
                return {}
            own, *theirs = call_seconds([calls.ours, *([calls.rival] if calls.rival else [])])
            return {
                "seconds": seconds,
                "card": card,
                "commit": state,
                "call": own,
                "rival": theirs[0] if theirs else None,
            }

        with patch.dict(os.environ, calls.environment):
            found = attempt(measure)
        if "error" in found:
            results.setdefault("errors", {})[key] = found["error"]
        elif found:
            results["kernels"][key] = found
        save(results)
        torch.cuda.empty_cache()
    return results


def add_operators(
    operators: Mapping[str, Callable[[], Calls]], results: dict[str, Any], save: Callable[[], None]
) -> None:
    """Adds the times of operators as users call them; arguments as of :func:`add_compiled`."""
    _ready()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    for name, make in operators.items():

        def measure(make: Callable[[], Calls] = make) -> dict[str, Any]:
            calls = make()
            assert calls.rival is not None
            with patch.dict(os.environ, calls.environment):
                own, theirs = call_seconds([calls.ours, calls.rival])
            return {"call": own, "rival": theirs}

        results.setdefault("operators", {})[name] = attempt(measure)
        save()
        torch.cuda.empty_cache()


def add_compiled(
    operators: Mapping[str, Callable[[], Calls]], results: dict[str, Any], save: Callable[[], None]
) -> None:
    """Adds the time of torch.compile's form of each call, measured in turns with pydense's.

    Calls that several kernels share are measured once, for the first of them.

    Args:
        operators: Before the kernels' calls.
        results: As :func:`measure_all` returns it.
        save: Called after each: what is measured stays when time is up.
    """
    _ready()
    entries = [(results.get("operators", {}).get(name), make) for name, make in operators.items()]
    entries += [(results["kernels"].get(key), make) for key, make in CASES.items()]
    seen = set()
    for entry, make in entries:
        if entry is None or make in seen:
            continue
        seen.add(make)
        calls = make()
        if calls.compiled is None:
            continue
        torch.compiler.reset()

        def measure(calls: Calls = calls) -> dict[str, Any]:
            assert calls.compiled is not None
            own, theirs = call_seconds([calls.ours, calls.compiled])
            return {"call": own, "rival": theirs}

        entry["compiled"] = attempt(measure)
        save()
        torch.cuda.empty_cache()


def _ready() -> None:
    from pydense import _library

    _library.load()
    torch.backends.cudnn.benchmark = True  # the rival may look for its best kernel
