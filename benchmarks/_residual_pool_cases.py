# SPDX-License-Identifier: Apache-2.0
"""Cases of the benchmark of chained residual pooling: what is called, on what, by which rivals.

Every rival gets its inputs in the memory format it is named for, made beforehand. Forward and
backward are stages of one call through autograd, with gradients of every input and weight; cases
called inference are forward alone, without autograd. Beside the light-weight block's inference
stands what it cannot do without, torch's matrix products and pydense's pools in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, max_pool2d

from benchmarks._harness import Case, Rival

OURS = "pydense"
OURS_LAST = "pydense channels_last"
FLOOR = "GEMM + pool"  # no rival: it leaves the sums out
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


def pool(channels: int, size: int, dtype: torch.dtype) -> Problem:
    """RefineNet's 5x5 max pooling."""
    from pydense.ops import max_pool2d_same

    shape = (1, channels, size, size)
    name = f"pool/{channels}x{size}x{size}/{_short(dtype)}"
    theirs = partial(max_pool2d, kernel_size=5, stride=1, padding=2)
    return Problem(name, (shape,), (), shape, dtype, max_pool2d_same, theirs, 0.0)


def chain(
    name: str, channels: int, size: int, kernel: int, dtype: torch.dtype, backward: bool = True
) -> Problem:
    """A pooling block of 4 stages: light-weight (1x1) or original (3x3)."""
    from pydense.ops import chained_residual_pool, max_pool2d_same

    shape = (1, channels, size, size)

    def floor(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            pooled = max_pool2d_same(x)
            product: Tensor = torch.mm(weight.flatten(1), pooled.view(channels, -1))
            x = product.view(shape)
        return x

    def theirs(x: Tensor, *weights: Tensor) -> Tensor:
        top = x
        for weight in weights:
            top = conv2d(max_pool2d(top, 5, 1, 2), weight, padding=kernel // 2)
            x = x + top
        return x

    return Problem(
        f"{name}/{channels}x{size}x{size}/{_short(dtype)}",
        (shape,),
        4 * ((channels, channels, kernel, kernel),),
        shape,
        dtype,
        lambda x, *weights: chained_residual_pool(x, weights),
        theirs,
        8.0 * channels * channels * kernel * kernel * size * size,
        backward,
        floor if kernel == 1 and not backward else None,
    )


def concat_head(channels: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype) -> Problem:
    """HRNet's head: upsample, concatenate, convolve 1x1."""
    from pydense.nn import UpsampleConcatConv1x1

    total = sum(channels)
    head = UpsampleConcatConv1x1(channels, total, bias=False)
    maps = tuple((1, c, size[0] >> k, size[1] >> k) for k, c in enumerate(channels))

    def own(*inputs: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": inputs[-1]}, (inputs[:-1],))

    def theirs(*inputs: Tensor) -> Tensor:
        first, *rest = inputs[:-1]
        up = [interpolate(x, size=size, mode="bilinear") for x in rest]
        return conv2d(torch.cat([first, *up], 1), inputs[-1])

    return Problem(
        f"concat-head/{total}x{size[0]}x{size[1]}/{_short(dtype)}",
        maps,
        ((total, total, 1, 1),),
        (1, total, *size),
        dtype,
        own,
        theirs,
        sum(2.0 * total * m[1] * m[2] * m[3] for m in maps),
    )


def problems() -> list[Problem]:
    """What the benchmark measures."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [
            pool(256, 128, dtype),
            pool(512, 64, dtype),
            chain("light-weight", 256, 128, 1, dtype),
            chain("light-weight-inference", 256, 128, 1, dtype, backward=False),
            chain("original", 256, 64, 3, dtype),
            concat_head((48, 96, 192, 384), (128, 256), dtype),
        ]
    return found


def quick_problems() -> list[Problem]:
    """Small ones, to see that everything works."""
    return [
        pool(16, 20, torch.float32),
        chain("light-weight", 16, 20, 1, torch.bfloat16),
        chain("light-weight-inference", 16, 20, 1, torch.float32, backward=False),
        chain("original", 8, 12, 3, torch.float32, backward=False),
        concat_head((8, 16), (16, 16), torch.float32),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
