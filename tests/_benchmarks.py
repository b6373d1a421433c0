# SPDX-License-Identifier: Apache-2.0
"""What the benchmark tests share: the modules under test and a clock that moves only by work."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # at the end: an installed pydense stays in front of the tree's

from benchmarks import _harness, _result  # noqa: E402
from benchmarks._harness import Case  # noqa: E402

PEAKS = {"bandwidth": 1e10, "gemm": 1e12}


class FakeClock:
    """A clock that moves only when work is done."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def work(self, label, seconds):
        """A function that takes the next of ``seconds``, the last one for ever."""
        left = list(seconds)

        def call(_=None):
            self.log.append(label)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return label

        return call


def make_case(clock, ours, theirs, **kwargs):
    return Case(
        "a/case",
        lambda: {"pydense": clock.work("A", ours), "rival": clock.work("B", theirs)},
        **kwargs,
    )


def run_fake(ours, theirs, *, rounds, order="alternate", **kwargs):
    clock = FakeClock()
    case = make_case(clock, ours, theirs, **kwargs)
    run = _harness.run_case(
        case, rounds=rounds, threads=1, clock=clock, cpu_clock=clock, order=order, min_seconds=0,
        peaks=PEAKS,
    )  # fmt: skip
    return run, clock


def example(ours=(2, 2, 2), theirs=(2, 8, 10)):
    """A result with two cases, one of them lost."""
    won, _ = run_fake(ours, theirs, rounds=2, moved=lambda: {"total": 1e10}, check=lambda _: CHECKS)
    lost, _ = run_fake([1, 4, 4], [1, 3, 3], rounds=2, check=lambda _: CHECKS)
    lost["case"] = "b/case"
    for run in (won, lost):
        run["isa"] = "avx2"
        run["memory"] = {"pydense": 3 * 2**20, "rival": 30 * 2**20}
    lost["memory"]["pydense"] = 40 * 2**20
    return _result.make_result(
        "demo",
        "A demo",
        runs=[won, lost],
        machine={"cpu": "A CPU", "cpus": 2, "packages": {"numpy": "2"}},
        peaks={1: PEAKS},
        command="python -m demo",
    )


CHECKS = {"rival": {"max_abs_dq": 1.5e-7, "labels_differ": 0}}
