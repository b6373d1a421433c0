# SPDX-License-Identifier: Apache-2.0
"""Comparisons of one operation, through autograd, with every form that torch offers.

Every rival gets its inputs in the memory format it is named for, made beforehand. Forward and
backward are stages of one call through autograd, with gradients of every input and weight; cases
called inference are forward alone, without autograd. With everything that has a backward stand the
bytes that are kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._driver import Benchmark
from benchmarks._harness import Case, Rival

OURS = "pydense"
OURS_LAST = "pydense channels_last"
FLOOR = "GEMM + pool"  # no rival: it leaves the sums out
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # in names
SEED = 1

Shape = tuple[int, int, int, int]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One operation on maps and weights of given shapes, ours and in torch's operators."""

    name: str
    maps: tuple[Shape, ...]
    weights: tuple[Shape, ...]
    out: Shape
    dtype: torch.dtype
    own: Function
    theirs: Function
    flop: float
    backward: bool = True
    floor: Function | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the steps of a call."""
        return ("forward", "backward") if self.backward else ("forward",)


def rivals(problem: Problem) -> Mapping[str, tuple[Function, torch.memory_format]]:
    """Functions by label, with the memory format of their inputs."""
    plain, last = torch.contiguous_format, torch.channels_last
    floor = {} if problem.floor is None else {FLOOR: (problem.floor, plain)}
    return {
        OURS: (problem.own, plain),
        OURS_LAST: (problem.own, last),
        **floor,
        "torch NCHW": (problem.theirs, plain),
        "torch channels_last": (problem.theirs, last),
        "torch.compile": (torch.compile(problem.theirs), plain),
        "torch.compile channels_last": (torch.compile(problem.theirs), last),
    }


def setup(problem: Problem) -> Mapping[str, Rival]:
    """The stages of every rival, with inputs of its own."""
    return {
        label: stages(function, problem, layout)
        for label, (function, layout) in rivals(problem).items()
    }


def _inputs(problem: Problem, layout: torch.memory_format) -> list[Tensor]:
    """Maps and weights, and the gradient of the output at the end."""
    generator = torch.Generator().manual_seed(SEED)

    def made(shape: Shape, scale: float) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale
        return x.to(problem.dtype).contiguous(memory_format=layout)

    inputs = [made(shape, 1) for shape in problem.maps]
    inputs += [made(w, (w[1] * w[2] * w[3]) ** -0.5) for w in problem.weights]
    return [*(x.requires_grad_(problem.backward) for x in inputs), made(problem.out, 1)]


def stages(function: Function, problem: Problem, layout: torch.memory_format) -> Rival:
    """Forward, then the gradients of all inputs."""
    *inputs, grad = _inputs(problem, layout)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))

    steps: dict[str, Callable[[Any], Any]] = {"forward": lambda _: function(*inputs)}
    if problem.backward:
        steps["backward"] = backward
    return steps


def saved_bytes(problem: Problem, label: str) -> int:
    """Bytes of the tensors that a rival keeps for backward, the weights aside."""
    function, layout = rivals(problem)[label]
    *inputs, _ = _inputs(problem, layout)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = function(*inputs)
    weights = {w.untyped_storage().data_ptr() for w in inputs[len(problem.maps) :]}
    del out  # it holds the tensors: no address came twice
    return sum(size for place, size in kept.items() if place not in weights)


def add_figures(problem: Problem, run: dict[str, Any]) -> None:
    """What is kept for backward as a share of eager torch's, and speed as one of the floor's."""
    if problem.backward:
        eager = [label for label in run["rivals"] if not label.startswith("torch.compile")]
        run["saved"] = {label: saved_bytes(problem, label) for label in eager}
        for label in (x for x in eager if x in run["ratios"]):
            share = run["saved"][OURS] / run["saved"][label]
            run["checks"][label]["share_of_saved_bytes"] = share
    if problem.floor is not None:
        times = {label: r["seconds"]["total"]["median"] for label, r in run["rivals"].items()}
        for label in run["ratios"]:
            run["checks"][label]["share_of_floor"] = times[FLOOR] / times[OURS]


def compare(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """The largest difference of the output from pydense's, relative to the largest number."""
    outputs = {label: r[0] if isinstance(r, tuple) else r for label, r in results.items()}
    own = outputs[OURS].float()
    return {
        label: {"max_relative_difference": float((out.float() - own).abs().max() / own.abs().max())}
        for label, out in outputs.items()
        if label not in (OURS, FLOOR)
    }


def case_of(problem: Problem) -> Case:
    """The harness case of a problem."""
    shapes = (*problem.maps, *problem.weights, problem.out)
    elements = sum(s[0] * s[1] * s[2] * s[3] for s in shapes)
    each = float(elements * problem.dtype.itemsize)
    work = {"forward": problem.flop, "backward": 2 * problem.flop}
    return Case(
        name=problem.name,
        setup=partial(setup, problem),
        variants=[OURS_LAST] if problem.floor is None else [OURS_LAST, FLOOR],
        params={
            "maps": [list(shape) for shape in problem.maps],
            "weights": [list(shape) for shape in problem.weights],
            "dtype": str(problem.dtype).removeprefix("torch."),
        },
        check=compare,
        moved=lambda: dict.fromkeys(problem.stages, each),
        flop=lambda: {stage: work[stage] for stage in problem.stages},
    )


def benchmark(
    name: str,
    title: str,
    problems: Callable[[], Sequence[Problem]],
    quick_problems: Callable[[], Sequence[Problem]],
) -> Benchmark:
    """The benchmark of these problems; see :class:`benchmarks._driver.Benchmark`."""

    def complete(run: dict[str, Any]) -> None:
        found = {p.name: p for p in (*problems(), *quick_problems())}
        add_figures(found[run["case"]], run)

    return Benchmark(
        name=name,
        title=title,
        cases=lambda quick: [case_of(p) for p in (quick_problems() if quick else problems())],
        complete=complete,
        # It would measure the compiler.
        memoryless=("torch.compile", "torch.compile channels_last"),
    )
