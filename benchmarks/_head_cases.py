# SPDX-License-Identifier: Apache-2.0
"""The inputs of the segmentation-head benchmark, and the rivals in plain torch.

* ``torch``: interpolate and what follows, on contiguous tensors.
* ``torch channels_last``: the same on tensors in that format.
* ``torch max`` (argmax alone): ``.max(1).indices`` instead of ``.argmax(1)``, which is faster.
* ``torch.compile``: the first form, compiled. Not for cross-entropy with torch held to AVX2, where
  the code that torch 2.13 makes ends in a segmentation fault.

With 16-bit logits every rival upsamples in 16 bits, as a network under autocast does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks._harness import Case, Rival, set_threads

PYDENSE, TORCH, LAST, MAX, COMPILED = (
    "pydense",
    "torch",
    "torch channels_last",
    "torch max",
    "torch.compile",
)
IGNORED = 255
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """One case.

    Attributes:
        task: "argmax", "cross-entropy" (forward and backward) or "softmax".
        shape: (N, C, h, w) of the logits.
        size: (H, W).
        dtype: Name of the logits' dtype.
        logits: "noise": normal numbers; "regions": a score of 10 in the area of one class, blurred,
            and noise.
    """

    task: str
    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    dtype: str = "float32"
    logits: str = "noise"

    @property
    def name(self) -> str:
        """Task, shapes and dtype."""
        images, classes, height, width = self.shape
        text = f"{self.task}/{images}x{classes}x{height}x{width} to {self.size[0]}x{self.size[1]}"
        text += "" if self.dtype == "float32" else f"/{self.dtype}"
        return text + ("" if self.logits == "noise" else f"/{self.logits}")


def _problems() -> tuple[Problem, ...]:
    shapes = (
        ((1, 21, 65, 65), (513, 513)),
        ((1, 150, 128, 128), (512, 512)),
        ((1, 19, 256, 512), (1024, 2048)),
    )
    batches = (
        ((2, 21, 65, 65), (513, 513)),
        ((4, 150, 128, 128), (512, 512)),
        ((2, 19, 256, 512), (1024, 2048)),
    )
    rows = [Problem("argmax", *shape) for shape in shapes]
    rows += [Problem("argmax", *shape, logits="regions") for shape in shapes]
    rows += [Problem("argmax", *shape, dtype="bfloat16") for shape in shapes[1:2]]
    rows += [Problem("cross-entropy", *shape) for shape in batches]
    rows += [Problem("cross-entropy", *batches[2], dtype="bfloat16")]
    rows += [Problem("softmax", *shape) for shape in shapes[1:]]
    rows += [Problem("softmax", *shapes[2], dtype="bfloat16")]
    return tuple(rows)


PROBLEMS = _problems()
QUICK = (
    Problem("argmax", (1, 5, 17, 17), (65, 65)),
    Problem("cross-entropy", (1, 5, 17, 17), (65, 65)),
    Problem("softmax", (1, 5, 17, 17), (65, 65)),
)


def make_logits(problem: Problem) -> Tensor:
    """The logits, contiguous, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(problem.shape, generator=generator)
    if problem.logits == "regions":
        images, classes, height, width = problem.shape
        coarse = torch.randn(images, classes, height // 16, width // 16, generator=generator)
        field = functional.interpolate(coarse, (height, width), mode="bicubic")
        areas = functional.one_hot(field.argmax(1), classes).movedim(3, 1).float()
        noise += 10 * functional.avg_pool2d(areas, 5, 1, 2)
    return noise.to(DTYPES[problem.dtype])


def make_target(problem: Problem) -> Tensor:
    """Labels of which one in twenty is ignored."""
    generator = torch.Generator().manual_seed(1)
    shape = (problem.shape[0], *problem.size)
    labels = torch.randint(problem.shape[1], shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.05] = IGNORED
    return labels


def _upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


def _torch_argmax(x: Tensor, size: tuple[int, int]) -> Tensor:
    return _upsample(x, size).argmax(1)


def _torch_max(x: Tensor, size: tuple[int, int]) -> Tensor:
    return _upsample(x, size).max(1).indices


def _torch_softmax(x: Tensor, size: tuple[int, int]) -> Tensor:
    return _upsample(x, size).softmax(1)


def _torch_loss(x: Tensor, target: Tensor) -> Tensor:
    size = (target.shape[1], target.shape[2])
    return functional.cross_entropy(_upsample(x, size), target, ignore_index=IGNORED)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def _step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor) -> Rival:
    def run() -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    return run


def rivals_of(problem: Problem) -> Mapping[str, Rival]:
    """Everybody, on inputs of their own format."""
    from pydense import ops

    x, size = make_logits(problem), problem.size
    last = x.to(memory_format=torch.channels_last)
    if problem.task == "cross-entropy":
        target = make_target(problem)

        def ours(x: Tensor, target: Tensor) -> Tensor:
            loss = ops.upsample_cross_entropy(x, target, ignore_index=IGNORED)
            assert isinstance(loss, Tensor)
            return loss

        steps = {
            PYDENSE: _step(ours, x, target),
            TORCH: _step(_torch_loss, x, target),
            LAST: _step(_torch_loss, last, target),
        }
        if os.environ.get("ATEN_CPU_CAPABILITY") != "avx2":
            steps[COMPILED] = _step(_compiled(_torch_loss), x, target)
        return steps
    function = {"argmax": _torch_argmax, "softmax": _torch_softmax}[problem.task]
    own: Callable[..., Any] = getattr(ops, f"upsample_{problem.task}")

    def call(function: Callable[..., Any], x: Tensor) -> Rival:
        return lambda: function(x, size)

    rivals = {PYDENSE: call(own, x), TORCH: call(function, x), LAST: call(function, last)}
    if problem.task == "argmax":
        rivals[MAX] = call(_torch_max, x)
    rivals[COMPILED] = call(_compiled(function), x)
    return rivals


def prime(label: str) -> None:
    """Calls a rival on tiny inputs, so that its code is loaded."""
    set_threads(1)
    for problem in QUICK:
        rivals = rivals_of(problem)
        if label in rivals:
            rivals[label]()  # type: ignore[operator]


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of a."""
    return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-30))


def compare(problem: Problem, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """How far each rival's result is from pydense's."""
    own = results[PYDENSE]
    found: dict[str, dict[str, float]] = {}
    for label, other in results.items():
        if label == PYDENSE:
            continue
        if problem.task == "argmax":
            found[label] = {"labels_differ": float((own != other).float().mean())}
        elif problem.task == "softmax":
            found[label] = {"largest_difference": _difference(other, own)}
        else:
            found[label] = {
                "loss_difference": _difference(other[0], own[0]),
                "gradient_difference": _difference(other[1], own[1]),
            }
    return found


def moved_bytes(problem: Problem) -> dict[str, float]:
    """Logits read (and their gradient written) once, targets or results once."""
    images, classes, height, width = problem.shape
    element = DTYPES[problem.dtype].itemsize
    sources = images * classes * height * width * element
    pixels = images * problem.size[0] * problem.size[1]
    if problem.task == "cross-entropy":
        return {"total": 2 * sources + 8 * pixels}
    return {"total": sources + pixels * (8 if problem.task == "argmax" else classes * element)}


def case_of(problem: Problem) -> Case:
    """The harness case of a problem."""
    return Case(
        name=problem.name,
        setup=partial(rivals_of, problem),
        params={
            "shape": list(problem.shape),
            "size": list(problem.size),
            "dtype": problem.dtype,
            "logits": problem.logits,
        },
        prime=prime,
        check=partial(compare, problem),
        moved=lambda: moved_bytes(problem),
    )
