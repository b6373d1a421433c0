# SPDX-License-Identifier: Apache-2.0
"""Training through the dense CRF: a step (forward and backward) against the forward pass alone.

The subject is one step through ``pydense.nn.CRFasRNN`` with everything that a caller pays: both
lattices, five iterations, gradients of the logits and of all parameters. Rivals, each on the same
tensors and parameters:

* ``forward``: the same layer under ``torch.no_grad``. step / forward is 1 / the ratio shown: the
  aim is at most 2.5, a ratio of 0.4.
* ``recompute``: the step that keeps no marginals. Not beside batches: between two steps it would
  cost the pages that the first one leaves to the second, which no training loop does.
* ``plain torch``: autograd through ``pydense.reference.dense_crf``.
* ``pydensecrf``, forward only, one thread: what the peers' figures are scaled by.

``scalar`` cases have one trained weight per kernel, ``matrix`` cases the full matrices of the
paper, ``batch`` cases show how time grows with the batch, ``bandwidths`` what trained bandwidths
cost.

    python -m benchmarks.bench_dense_crf_training [--quick]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks._crf_cases import PARAMETERS, Problem, available, load_picture, make_unary
from benchmarks._crf_rivals import clear_cache, pydensecrf
from benchmarks._driver import Benchmark
from benchmarks._harness import Case, Rival

ITERATIONS = 5
STEP, FORWARD, RECOMPUTE, PLAIN = "pydense", "forward", "recompute", "plain torch"
PYDENSECRF = "pydensecrf forward"


@dataclass(frozen=True)
class Training:
    """One picture, a parameter set and a parametrisation."""

    problem: Problem
    kind: str  # scalar, label or matrix
    batch: int = 1
    bandwidths: bool = False
    rivals: bool = False  # plain torch and pydensecrf too

    @property
    def name(self) -> str:
        """Unique."""
        parts = [self.problem.name, self.kind]
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        return "/".join([*parts, *(["bandwidths"] if self.bandwidths else [])])


def _problem(
    parameters: str,
    height: int = 321,
    width: int = 481,
    labels: int = 21,
    picture: str = "coffee",
) -> Problem:
    return Problem(picture, height, width, parameters, labels, False)


CASES = (
    Training(_problem("default"), "scalar", rivals=True),
    Training(_problem("default"), "matrix"),
    Training(_problem("crfrnn"), "matrix", rivals=True),
    Training(_problem("deeplab"), "matrix"),
    Training(_problem("default"), "matrix", batch=8),
    Training(_problem("default", 160, 240), "scalar", bandwidths=True),
)
QUICK = (
    Training(_problem("default", 60, 80, 5, "noise"), "matrix", rivals=True),
    Training(_problem("default", 30, 40, 3, "noise"), "scalar", batch=2, bandwidths=True),
)
BY_NAME = {case.name: case for case in CASES + QUICK}


def inputs_of(case: Training) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that require a gradient, the image, and the gradient of the result."""
    p = case.problem
    shape = (1, p.labels, p.height, p.width)
    logits = -torch.from_numpy(make_unary(p.height, p.width, p.labels)).view(shape)
    image = torch.from_numpy(load_picture(p.picture, p.height, p.width)).permute(2, 0, 1)[None]
    logits = logits.repeat(case.batch, 1, 1, 1).requires_grad_()
    gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return logits, image.repeat(case.batch, 1, 1, 1).contiguous(), gradient


def rivals_of(case: Training) -> Mapping[str, Rival]:
    """All rivals by label."""
    from pydense.nn import CRFasRNN

    p, numbers = case.problem, PARAMETERS[case.problem.parameters]
    logits, image, gradient = inputs_of(case)

    def layer(recompute: bool) -> CRFasRNN:
        return CRFasRNN(
            p.labels,
            ITERATIONS,
            kernel_weights=case.kind,
            spatial_weight=numbers.gaussian_weight,
            bilateral_weight=numbers.bilateral_weight,
            spatial_sxy=numbers.gaussian_sxy,
            bilateral_sxy=numbers.bilateral_sxy,
            bilateral_srgb=numbers.bilateral_srgb,
            train_bandwidths=case.bandwidths,
            recompute=recompute,
        )

    def step(crf: CRFasRNN) -> tuple[torch.Tensor, ...]:
        out = crf(logits, image)
        return torch.autograd.grad(out, [logits, *crf.parameters()], gradient)

    def forward(crf: CRFasRNN) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = crf(logits, image)
            return result

    found: dict[str, Rival] = {
        STEP: partial(step, layer(False)),
        FORWARD: partial(forward, layer(False)),
    }
    if case.batch == 1:
        found[RECOMPUTE] = partial(step, layer(True))
    if case.rivals:
        found[PLAIN] = _plain(case, logits, image, gradient)
        module = pydensecrf()
        if module is not None:
            found[PYDENSECRF] = _pydensecrf(case, module)
    return found


def _plain(
    case: Training, logits: torch.Tensor, image: torch.Tensor, gradient: torch.Tensor
) -> Callable[[], Any]:
    from pydense.reference import dense_crf

    labels, numbers = case.problem.labels, PARAMETERS[case.problem.parameters]
    matrices = [
        (weight * torch.eye(labels)).requires_grad_()
        for weight in (numbers.gaussian_weight, numbers.bilateral_weight)
    ]

    def call() -> Any:
        out = dense_crf(
            logits,
            image,
            gaussian={"sxy": numbers.gaussian_sxy, "compat": matrices[0]},
            bilateral={
                "sxy": numbers.bilateral_sxy,
                "srgb": numbers.bilateral_srgb,
                "compat": matrices[1],
            },
            iterations=ITERATIONS,
            normalization="after",
            output="logits",
        )
        return torch.autograd.grad(out, [logits, *matrices], gradient)

    return call


def _pydensecrf(case: Training, module: Any) -> Callable[[], Any]:
    from benchmarks._crf_rivals import build

    p = case.problem
    image, unary = (
        load_picture(p.picture, p.height, p.width),
        make_unary(p.height, p.width, p.labels),
    )
    return lambda: build(module, image, unary, PARAMETERS[p.parameters]).inference(ITERATIONS)


def compare(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Largest difference of the logits' gradient, relative to its largest entry."""
    own = results[STEP][0]
    return {
        label: {"max_relative": float((results[label][0] - own).abs().max() / own.abs().max())}
        for label in (RECOMPUTE, PLAIN)
        if label in results
    }


def case_of(case: Training) -> Case:
    """The harness case."""
    p = case.problem
    labels = (STEP, FORWARD, RECOMPUTE, PLAIN)
    return Case(
        name=case.name,
        setup=partial(rivals_of, case),
        subject=STEP,
        params={
            "picture": p.picture,
            "height": p.height,
            "width": p.width,
            "labels": p.labels,
            "batch": case.batch,
            "iterations": ITERATIONS,
            "kernels": str(PARAMETERS[p.parameters]),
            "kernel_weights": case.kind,
            "train_bandwidths": case.bandwidths,
            "marginals_kept_bytes": 4
            * ITERATIONS
            * case.batch
            * p.height
            * p.width
            * (-(-p.labels // 8) * 8),
        },
        fixed_threads={PYDENSECRF: 1},
        every={PLAIN: 3},
        before=dict.fromkeys(labels, clear_cache),
        check=compare,
    )


def missing(case: Case) -> str:
    """Why the case cannot run on this machine."""
    return "" if available([BY_NAME[case.name].problem]) else "no picture, see PYDENSE_TEST_DATA"


BENCHMARK = Benchmark(
    name="dense_crf_training",
    title=(
        f"Training through the dense CRF on the CPU, {ITERATIONS} mean-field iterations: a step "
        "(forward, backward to logits and all parameters, lattices included) of pydense.nn.CRFasRNN"
    ),
    cases=lambda quick: [case_of(case) for case in (QUICK if quick else CASES)],
    packages=("torch", "pydensecrf2", "pydensecrf", "numpy", "scikit-image"),
    missing=missing,
)
make_case = BENCHMARK.make_case

if __name__ == "__main__":
    BENCHMARK.main()
