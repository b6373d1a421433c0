# SPDX-License-Identifier: Apache-2.0
"""Throw odd inputs at pydense.densecrf; report crashes, hangs, wrong results and odd exceptions.

    python tools/fuzz_densecrf.py [--examples 10000] [--seed 0] [--minutes 5] [--timeout 30]

Every case is a function of its seed. Cases run in a child process that announces each seed, so that
a crash or a hang is pinned to one; the run then goes on with the next seed. Reproduce with
``python tools/fuzz_densecrf.py --case SEED``. Exit status 1 when anything was found.

What must hold: a call returns or raises ValueError or TypeError; a result is finite and its columns
sum to 1; a case whose arguments are all valid does not raise; two thread counts agree bit by bit.
"""

from __future__ import annotations

import argparse
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

REFUSALS = (ValueError, TypeError)
NORMAL_SIGMAS = (0.5, 1, 2.0, 3, 7.5, 13, 80, 1000, 1e6, 1e30, 1e300)
ODD_SIGMAS = (0, -1, 1e-300, 1e-44, 1e-30, 1e-6, 1e-3, np.nan, np.inf, "3", None, (3,), [[3, 3]])
ODD_COMPATS = (np.nan, np.inf, 1e30, "3", None, [], [[1.0]], np.ones((2, 2, 2)), 1j)
IMAGE_TYPES = (
    np.uint8,
    np.uint8,
    np.int16,
    np.uint16,
    np.int64,
    np.float16,
    np.float32,
    np.float64,
)


class Case:
    """One random model. ``odd`` says whether any argument may rightly be refused."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.odd = False
        self.probability = self.rng.choice([0.0, 0.02, 0.2])  # of an odd value per argument

    def oddly(self) -> bool:
        odd = bool(self.rng.random() < self.probability)
        self.odd |= odd
        return odd

    def pick(self, values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def layout(self, array: np.ndarray) -> np.ndarray:
        kind = self.rng.integers(5)
        if kind == 0:
            return np.asfortranarray(array)
        if kind == 1:
            return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
        if kind == 2:
            spread = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
            spread[..., ::2] = array
            return spread[..., ::2]
        if kind == 3:
            array.flags.writeable = False
        return array

    def sizes(self) -> tuple[int, int, int]:
        special = [(1, 1), (1, 50), (50, 1), (2, 2), (1, 3000), (3000, 1), (97, 89)]
        w, h = self.pick(special) if self.rng.random() < 0.3 else self.rng.integers(1, 33, 2)
        return int(w), int(h), int(self.pick((1, 2, 2, 3, 4, 5, 8, 9, 17, 21, 33, 150)))

    def unary(self, labels: int, points: int) -> Any:
        size = float(self.pick((0.0, 1e-30, 1.0, 10.0, 1e4, 1e30, 3e38)))
        energy = (size * self.rng.uniform(-1, 1, (labels, points))).astype(
            self.pick((np.float32, np.float64))
        )
        if self.rng.random() < 0.2:
            energy[1:, self.rng.random(points) < 0.5] = np.inf  # label 0 stays possible
        if self.oddly():
            point = int(self.rng.integers(points))
            kind = self.rng.integers(6)
            if kind == 0:
                energy[-1, point] = np.nan
            elif kind == 1:
                energy[:, point] = np.inf
            elif kind == 2:
                energy[0, point] = -np.inf
            else:
                wrong = [energy.T, energy[:, 1:], energy[None], None, "u", energy.astype(complex)]
                return self.pick(wrong)
        return self.layout(energy)

    def sigma(self, count: int) -> Any:
        if self.oddly():
            return self.pick(ODD_SIGMAS)
        if self.rng.random() < 0.5:
            return self.pick(NORMAL_SIGMAS)
        return [self.pick(NORMAL_SIGMAS) for _ in range(count)]

    def compat(self, labels: int) -> Any:
        if self.oddly():
            return self.pick(ODD_COMPATS)
        size = float(self.pick((0.0, 1e-20, 1.0, 10.0, 1e6, 1e20)))
        shape = self.pick(((), (labels,), (labels, labels)))
        return size * self.rng.uniform(-1, 1, shape)

    def image(self, w: int, h: int) -> tuple[Any, int]:
        channels = int(self.pick((1, 1, 2, 3, 3, 3, 3, 4, 7)))
        dtype = self.pick(IMAGE_TYPES)
        if self.rng.random() < 0.3:
            pixels = np.full((h, w, channels), self.rng.integers(0, 256))
        else:
            pixels = self.rng.integers(0, int(self.pick((2, 30, 256))), (h, w, channels))
        array = self.layout(pixels.astype(dtype))
        if self.oddly():
            if array.dtype.kind == "f" and self.rng.random() < 0.5:
                array = array.copy()
                array[0, 0, 0] = self.pick((np.nan, np.inf, 6e4))
                return array, channels
            wrong = [array[:0], array[:, :0], array[..., :0], array[None], np.moveaxis(array, 0, 1)]
            return self.pick([*wrong, None, "image", array.astype(complex)]), channels
        return (
            (array[..., 0], 1) if channels == 1 and self.rng.random() < 0.5 else (array, channels)
        )

    def features(self, points: int) -> Any:
        d = int(self.rng.integers(1, 21))
        spread = float(self.pick((0.0, 1e-30, 0.3, 2.0, 50.0, 3000.0)))
        values = spread * self.rng.normal(size=(d, points))
        if self.oddly():
            values[0, 0] = self.pick((np.nan, np.inf, -1e30, 1e9))
            return self.pick([values, values.T, values[:0], values[:, 1:], values[0], None])
        return self.layout(values.astype(self.pick((np.float32, np.float64))))

    def build(self) -> Any:
        import pydense.densecrf as dcrf

        w, h, labels = self.sizes()
        if self.oddly():
            w = self.pick((0, -1, 2.0, None, 10**20))
        model = dcrf.DenseCRF2D(w, h, labels)
        w, h = int(w), int(h)
        if self.rng.random() < 0.9:
            model.setUnaryEnergy(self.unary(labels, w * h))
        for _ in range(int(self.rng.integers(0, 4))):
            norm = self.pick((-1, 4, "x", None)) if self.oddly() else int(self.rng.integers(4))
            kind = self.rng.integers(3)
            if kind == 0:
                model.addPairwiseGaussian(self.sigma(2), self.compat(labels), normalization=norm)
            elif kind == 1:
                image, channels = self.image(w, h)
                colour = self.sigma(channels)
                model.addPairwiseBilateral(
                    self.sigma(2), colour, image, self.compat(labels), normalization=norm
                )
            else:
                features = self.features(w * h)
                model.addPairwiseEnergy(features, self.compat(labels), normalization=norm)
        return model


def check_distribution(q: np.ndarray) -> None:
    """Fail unless every column is a probability distribution."""
    assert np.isfinite(q).all(), "result is not finite"
    assert q.min() >= 0, "negative probability"
    assert np.abs(q.sum(axis=0, dtype=np.float64) - 1).max() < 1e-4, "columns do not sum to 1"


def run_case(seed: int) -> str:
    """Run one case: "ok", or "refused" for an odd one. Anything else is an AssertionError."""
    from pydense import _core

    case = Case(seed)
    try:
        model = case.build()
        iterations = case.pick((-1, 1.5, None, 2**40)) if case.oddly() else case.rng.integers(0, 6)
        _core.set_num_threads(1)
        q = model.inference(iterations)
    except REFUSALS as error:
        assert case.odd, f"valid arguments were refused: {type(error).__name__}: {error}"
        return "refused"
    check_distribution(q)
    assert np.isfinite(model.klDivergence(q)), "the objective is not finite"
    _core.set_num_threads(3)
    stepped, tmp1, tmp2 = model.startInference()
    for _ in range(int(iterations)):
        model.stepInference(stepped, tmp1, tmp2)
    check_distribution(stepped)
    assert np.array_equal(q, stepped), "steps on three threads differ from a run on one"
    return "ok"


def worker(first: int, count: int) -> int:
    """Child: announce each seed before running it."""
    import pydense.densecrf  # noqa: F401  - if this fails, no case is to blame

    for seed in range(first, first + count):
        print("start", seed, flush=True)
        try:
            outcome = run_case(seed)
        except Exception as error:  # whatever it is, it is a finding
            outcome = f"FOUND {type(error).__name__}: {error}".replace("\n", " ")[:300]
        print("end", seed, outcome, flush=True)
    return 0


def watch(first: int, count: int, timeout: float, deadline: float, tally: dict[str, int]) -> int:
    """Parent: run one child, return the seed to go on with."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--worker", str(first), str(count)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    # A thread reads, because select() would not see lines that are already in the file's buffer.
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read(stream: Iterable[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, args=(child.stdout,), daemon=True).start()
    current, running, begun = first, False, False
    try:
        while True:
            try:
                line = lines.get(timeout=timeout)
            except queue.Empty:
                report(current, f"no answer within {timeout:g} s", tally)
                return current + 1
            if not line:  # end of file: finished, or dead
                if not begun:
                    raise SystemExit("fuzz: the child process does not start")
                if child.wait() != 0 or running:
                    report(current, f"the process died with status {child.returncode}", tally)
                return current + 1
            word, number, *outcome = line.split(maxsplit=2)
            current, running, begun = int(number), word == "start", True
            if outcome:
                key = outcome[0].strip()
                if key.startswith("FOUND"):
                    report(current, key.removeprefix("FOUND "), tally)
                else:
                    tally[key] = tally.get(key, 0) + 1
                if time.monotonic() > deadline:
                    return current + 1
    finally:
        child.kill()
        child.wait()


def report(seed: int, text: str, tally: dict[str, int]) -> None:
    """Print a finding."""
    tally["found"] = tally.get("found", 0) + 1
    print(f"seed {seed}: {text}\n  reproduce: python {sys.argv[0]} --case {seed}", flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time")
    parser.add_argument("--timeout", type=float, default=30, help="seconds a case may take")
    parser.add_argument("--case", type=int, metavar="SEED", help="run one case in this process")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    if args.case is not None:
        print(run_case(args.case))
        return 0
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    seed, end, tally = args.seed, args.seed + args.examples, {}
    while seed < end and time.monotonic() < deadline:
        seed = watch(seed, end - seed, args.timeout, deadline, tally)
    counts = ", ".join(f"{tally.get(key, 0)} {key}" for key in ("ok", "refused", "found"))
    print(f"{seed - args.seed} cases in {time.monotonic() - started:.0f} s: {counts}")
    return 1 if tally.get("found") else 0


if __name__ == "__main__":
    raise SystemExit(main())
