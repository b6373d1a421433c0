# SPDX-License-Identifier: Apache-2.0
"""Interleaved A/B timing: cases, rounds, ratios.

A benchmark on a machine that others use as well measures its neighbours too. What survives is the
*ratio* of two calls made a moment apart. So every round runs each rival once, neighbours in time,
the order changes from round to round, and the figure that is quoted is the median over the rounds
of

    ratio = seconds of the rival / seconds of the subject          (above 1: the subject is faster)

together with its quartiles and extremes. Absolute seconds are kept as medians, for reading only.

A benchmark script makes :class:`Case` objects and hands them to :func:`run_cases`;
:func:`benchmarks._result.write_result` turns what comes back into a JSON file. Nothing here knows
an operator: a case that compares an operator with eager torch in two memory formats and with
``torch.compile`` has four rivals, one that separates forward from backward has two stages.
"""

from __future__ import annotations

import gc
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Stages = Mapping[str, Callable[[Any], Any]]
"""Named steps of one call; each gets what the step before returned (the first gets None)."""

Rival = Callable[[], Any] | Stages
"""One competitor: a function without arguments, or the stages it consists of."""

Clock = Callable[[], float]
TOTAL = "total"


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Case:
    """One comparison: the same work done by several rivals.

    Attributes:
        name: Unique in its benchmark; words separated by ``/``.
        setup: Makes the inputs and returns the rivals by label. Called once, so that the inputs of
            a case live only while it runs. The time it takes is not measured.
        subject: Label of the rival whose speed is judged; ratios are rival / subject.
        variants: Labels of further ways to call what is judged (another interface, a filled cache):
            no rivals of the subject, but compared with every rival as it is.
        params: What a reader needs to know of the case, put into the JSON file as it is.
        fixed_threads: Labels of rivals that cannot be told a number of threads, with the number
            they use (1 for a single-threaded package).
        every: For slow rivals, the number of rounds between two measurements; 1 if not named.
        before: What has to happen before each call of a rival, outside the timing.
        prime: Calls the rival with this label on a tiny problem, so that its code is loaded before
            its memory is measured.
        check: Gets the results of all rivals by label and returns figures by rival, such as the
            largest difference from the subject's result. Runs outside the timing.
        moved: Bytes that the subject's algorithm has to move, by stage.
        flop: Floating-point operations that it has to do, by stage.
        sync: Called before the clock is read, for devices that work asynchronously.
    """

    name: str
    setup: Callable[[], Mapping[str, Rival]]
    subject: str = "pydense"
    variants: Sequence[str] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    fixed_threads: Mapping[str, int] = field(default_factory=dict)
    every: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    prime: Callable[[str], object] | None = None
    check: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, float]]] | None = None
    moved: Callable[[], Mapping[str, float]] | None = None
    flop: Callable[[], Mapping[str, float]] | None = None
    sync: Callable[[], None] = _nothing


def stages_of(rival: Rival) -> Stages:
    """The stages of a rival; a plain function is a single one called ``total``."""
    if callable(rival):
        return {TOTAL: lambda _: rival()}
    if TOTAL in rival or not rival:
        raise ValueError(f"stages_of: rival must have stages, none called '{TOTAL}', got {rival!r}")
    return rival


def time_call(
    stages: Stages,
    *,
    number: int = 1,
    clock: Clock = time.perf_counter,
    sync: Any = _nothing,
    before: Callable[[], object] = _nothing,
) -> tuple[dict[str, float], Any]:
    """Mean seconds of each stage and of the whole over ``number`` calls, and the last result."""
    seconds = dict.fromkeys(stages, 0.0)
    value: Any = None
    for _ in range(number):
        value = None
        before()
        for name, call in stages.items():
            sync()
            start = clock()
            value = call(value)
            sync()
            seconds[name] += clock() - start
    mean = {name: spent / number for name, spent in seconds.items()}
    mean[TOTAL] = sum(mean.values())
    return mean, value


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and count of the samples."""
    if not samples:
        raise ValueError("summary: samples must not be empty, got []")
    low, q1, median, q3, high = np.percentile(np.asarray(samples, float), [0, 25, 50, 75, 100])
    return {
        "median": float(median),
        "q1": float(q1),
        "q3": float(q3),
        "min": float(low),
        "max": float(high),
        "rounds": len(samples),
    }


def ratios(
    rival: Sequence[Mapping[str, float]], subject: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Summary of the per-round ratios rival / subject, for every stage that both have."""
    if len(rival) != len(subject):
        raise ValueError(f"ratios: rounds must be equal, got {len(rival)} and {len(subject)}")
    shared = [name for name in subject[0] if name in rival[0]]
    return {
        name: summary([r[name] / s[name] for r, s in zip(rival, subject, strict=True)])
        for name in shared
    }


def round_order(labels: Sequence[str], index: int, order: str, rng: random.Random) -> list[str]:
    """The order of the rivals in a round: 'alternate' (A B, B A, ...), 'random' or 'fixed'."""
    turn = list(labels)
    if order == "alternate":
        return turn[::-1] if index % 2 else turn
    if order == "random":
        rng.shuffle(turn)
        return turn
    if order == "fixed":
        return turn
    raise ValueError(f"round_order: order must be alternate, random or fixed, got {order!r}")


def set_threads(count: int) -> None:
    """Tells the number of threads to the libraries that this process has imported."""
    for library in ("pydense", "torch"):
        if library in sys.modules:
            sys.modules[library].set_num_threads(count)


def forget_compiled() -> None:
    """Empties ``torch.compile``'s caches: with many cases behind it, it would stay eager."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the cyclic garbage collector out of the timing."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def limit_of(
    moved: Mapping[str, float],
    flop: Mapping[str, float],
    peaks: Mapping[str, float],
    medians: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """How far each stage is from what the machine allows.

    Args:
        moved: Bytes by stage.
        flop: Floating-point operations by stage.
        peaks: Measured ``bandwidth`` (bytes per second) and ``gemm`` (FLOP per second).
        medians: Measured seconds of the subject by stage.

    Returns:
        By stage: ``bytes``, ``flop``, ``seconds`` = max(bytes / bandwidth, flop / gemm), and
        ``times_limit`` = measured seconds / that, 1 being as fast as the machine can.
    """
    total = {TOTAL: sum(moved.values())}, {TOTAL: sum(flop.values())}
    all_bytes, all_flop = {**moved, **total[0]}, {**flop, **total[1]}
    result = {}
    for stage in medians:
        seconds = max(
            all_bytes.get(stage, 0.0) / peaks["bandwidth"], all_flop.get(stage, 0.0) / peaks["gemm"]
        )
        if seconds > 0:
            result[stage] = {
                "bytes": all_bytes.get(stage, 0.0),
                "flop": all_flop.get(stage, 0.0),
                "seconds": seconds,
                "times_limit": medians[stage] / seconds,
            }
    return result


def run_case(
    case: Case,
    *,
    rounds: int,
    threads: int,
    peaks: Mapping[str, float] | None = None,
    warmup: int = 1,
    order: str = "alternate",
    min_seconds: float = 0.01,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> dict[str, Any]:
    """Times one case at one thread count.

    Args:
        case: What to run.
        rounds: How often every rival is measured.
        threads: Threads given to all rivals that take a number.
        peaks: ``bandwidth`` and ``gemm`` measured at this thread count; None leaves the limit out.
        warmup: Unmeasured calls of every rival before the first round, at least 1.
        order: See :func:`round_order`.
        min_seconds: A measurement repeats a shorter call until it lasts about this long.
        seed: Of the random order.
        clock: Returns seconds.
        cpu_clock: Returns the seconds of CPU time that this process has used.

    Returns:
        One entry of ``runs`` in the JSON file (benchmarks/README.md lists its keys).
    """
    if rounds < 1 or warmup < 1:
        raise ValueError(f"run_case: rounds, warmup must be positive, got {rounds}, {warmup}")
    forget_compiled()
    rivals = {label: stages_of(rival) for label, rival in case.setup().items()}
    if case.subject not in rivals:
        raise ValueError(f"run_case: subject must be one of {list(rivals)}, got {case.subject!r}")
    set_threads(threads)
    results: dict[str, Any] = {}
    number: dict[str, int] = {}
    samples: dict[str, dict[int, dict[str, float]]] = {label: {} for label in rivals}
    busy: dict[str, list[float]] = {label: [] for label in rivals}

    def measure(label: str, count: int) -> tuple[dict[str, float], Any]:
        return time_call(
            rivals[label],
            number=count,
            clock=clock,
            sync=case.sync,
            before=case.before.get(label, _nothing),
        )

    for label in rivals:
        for _ in range(warmup):
            spent, results[label] = measure(label, 1)
        number[label] = min(1000, max(1, math.ceil(min_seconds / max(spent[TOTAL], 1e-9))))
    checks = case.check(results) if case.check else {}
    results.clear()

    rng = random.Random(seed)
    with _no_collection():
        for index in range(rounds):
            turn = [label for label in rivals if index % case.every.get(label, 1) == 0]
            for label in round_order(turn, index, order, rng):
                cpu, wall = cpu_clock(), clock()
                samples[label][index], _ = measure(label, number[label])
                busy[label].append((cpu_clock() - cpu) / max(clock() - wall, 1e-9))

    seconds = {
        label: {
            stage: summary([s[stage] for s in rows.values()]) for stage in next(iter(rows.values()))
        }
        for label, rows in samples.items()
    }

    def against(own: str) -> dict[str, Any]:
        compared = {}
        for label in rivals:
            if label != case.subject and label not in case.variants:
                both = [i for i in samples[label] if i in samples[own]]
                compared[label] = ratios(
                    [samples[label][i] for i in both], [samples[own][i] for i in both]
                )
        return compared

    compared = against(case.subject)
    run: dict[str, Any] = {
        "case": case.name,
        "params": dict(case.params),
        "threads": threads,
        "rounds": rounds,
        "warmup": warmup,
        "order": order,
        "subject": case.subject,
        "rivals": {
            label: {
                "threads": case.fixed_threads.get(label, threads),
                "calls_per_round": number[label],
                "busy_cpus": float(np.median(busy[label])),
                "seconds": seconds[label],
            }
            for label in rivals
        },
        "ratios": compared,
        "variants": {label: against(label) for label in case.variants if label in rivals},
        "checks": {label: dict(figures) for label, figures in checks.items()},
    }
    if compared:
        run["fastest_rival"] = min(compared, key=lambda label: compared[label][TOTAL]["median"])
    if peaks and (case.moved or case.flop):
        medians = {name: s["median"] for name, s in seconds[case.subject].items()}
        moved = case.moved() if case.moved else {}
        run["limit"] = limit_of(moved, case.flop() if case.flop else {}, peaks, medians)
    return run


def run_cases(
    cases: Sequence[Case],
    *,
    rounds: int,
    threads: Sequence[int],
    peaks: Mapping[int, Mapping[str, float]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Runs every case at every thread count.

    Args:
        cases: Cases with distinct names.
        rounds: Rounds of each.
        threads: Thread counts.
        peaks: Measured limits by thread count (:func:`benchmarks._machine.measure_peaks`).
        progress: Gets one line per finished run.
        **options: Passed to :func:`run_case`.

    Returns:
        The ``runs`` list of a result.
    """
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"run_cases: names must be distinct, got {names}")
    runs = []
    for case in cases:
        for count in threads:
            run = run_case(
                case, rounds=rounds, threads=count, peaks=(peaks or {}).get(count), **options
            )
            runs.append(run)
            progress(one_line(run))
    return runs


def one_line(run: Mapping[str, Any]) -> str:
    """A run in one line of text, for the terminal."""
    text = f"{run['case']}, {run['threads']} thread(s):"
    for label, stages in run["ratios"].items():
        figures = ", ".join(
            f"{stage} {s['median']:.2f}x [{s['min']:.2f}..{s['max']:.2f}]"
            for stage, s in stages.items()
        )
        text += f" vs {label}: {figures}"
    for variant, compared in run.get("variants", {}).items():
        for label, stages in compared.items():
            text += f"; {variant} vs {label}: {stages[TOTAL]['median']:.2f}x"
    if not run["ratios"]:
        own = run["rivals"][run["subject"]]["seconds"][TOTAL]["median"]
        text += f" {own * 1e3:.1f} ms, no rival to compare with"
    for label, figures in run["checks"].items():
        text += f"; {label}: " + ", ".join(f"{k} {v:.3g}" for k, v in figures.items())
    return text
