# SPDX-License-Identifier: Apache-2.0
"""Cases of the upsampling benchmark: what is called, on what, by which rivals.

Every rival gets its inputs in the memory format it is named for, made beforehand. Forward and
backward are stages of one call through autograd; the gradient that backward starts from is made
beforehand too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv_transpose2d, interpolate, pad

from benchmarks._harness import Case, Rival

OURS = "pydense"
OURS_LAST = "pydense channels_last"
SEED = 1

Shape = tuple[int, int, int, int]
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """One operation on inputs of given shapes; ``rivals`` are (function, memory format)."""

    name: str
    inputs: tuple[Shape, ...]
    size: tuple[int, int]
    dtype: torch.dtype
    rivals: Mapping[str, tuple[Function, torch.memory_format]]
    every: Mapping[str, int] = field(default_factory=dict)

    @property
    def moved(self) -> Mapping[str, float]:
        """Bytes of inputs and output, once each."""
        n, c = self.inputs[0][:2]
        elements = n * c * self.size[0] * self.size[1]
        elements += sum(s[0] * s[1] * s[2] * s[3] for s in self.inputs)
        each = float(elements * self.dtype.itemsize)
        return {"forward": each, "backward": each}


def compiled(function: Function) -> Function:
    """``torch.compile``, compiled when first called."""
    made: Function = torch.compile(function)
    return made


def setup(problem: Problem) -> Mapping[str, Rival]:
    """The stages of every rival, with inputs of its own."""
    return {
        label: stages(function, problem, layout)
        for label, (function, layout) in problem.rivals.items()
    }


def stages(function: Function, problem: Problem, layout: torch.memory_format) -> Rival:
    """Forward, then the gradients of all inputs."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = [
        torch.randn(shape, generator=generator)
        .to(problem.dtype)
        .contiguous(memory_format=layout)
        .requires_grad_()
        for shape in problem.inputs
    ]
    n, c = problem.inputs[0][:2]
    grad = torch.randn((n, c, *problem.size), generator=generator).to(problem.dtype)
    grad = grad.contiguous(memory_format=layout)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))

    return {"forward": lambda _: function(*inputs), "backward": backward}


def compare(results: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """The largest difference of any result or gradient from pydense's, relative to the largest."""
    return {
        label: {
            "max_relative_difference": max(
                float((a.float() - b.float()).abs().max() / b.float().abs().max())
                for a, b in zip(theirs, results[OURS], strict=True)
            )
        }
        for label, theirs in results.items()
        if label != OURS
    }


def case_of(problem: Problem) -> Case:
    """The harness case of a problem."""
    return Case(
        name=problem.name,
        setup=partial(setup, problem),
        variants=[OURS_LAST] if OURS_LAST in problem.rivals else [],
        params={
            "inputs": [list(shape) for shape in problem.inputs],
            "size": list(problem.size),
            "dtype": str(problem.dtype).removeprefix("torch."),
        },
        every=problem.every,
        check=compare,
        moved=lambda: problem.moved,
    )


def _forms(own: Function, theirs: Function) -> dict[str, tuple[Function, torch.memory_format]]:
    plain, last = torch.contiguous_format, torch.channels_last
    return {
        OURS: (own, plain),
        OURS_LAST: (own, last),
        "torch NCHW": (theirs, plain),
        "torch channels_last": (theirs, last),
        "torch.compile": (compiled(theirs), plain),
    }


def interpolation(shape: Shape, size: tuple[int, int], dtype: torch.dtype) -> Problem:
    """F.interpolate, align_corners=False."""
    from pydense.ops import upsample_bilinear

    return Problem(
        f"bilinear/{shape[1]}x{shape[2]}x{shape[3]}-{size[0]}x{size[1]}/{_short(dtype)}",
        (shape,),
        size,
        dtype,
        _forms(
            lambda x: upsample_bilinear(x, size),
            lambda x: interpolate(x, size=size, mode="bilinear"),
        ),
    )


def fcn(stride: int, low: int, offset: int, dtype: torch.dtype) -> Problem:
    """FCN's deconvolution and crop to 500 x 500, 21 classes."""
    from pydense.ops import bilinear_filler, upsample_crop

    kernel, size, plain = 2 * stride, (500, 500), torch.contiguous_format
    dense = bilinear_filler(21, kernel, dtype=dtype)
    grouped = bilinear_filler(21, kernel, groups=21, dtype=dtype)

    def own(x: Tensor) -> Tensor:
        return upsample_crop(x, stride=stride, kernel_size=kernel, offset=offset, size=size)

    def deconvolution(x: Tensor, weight: Tensor, groups: int) -> Tensor:
        full = conv_transpose2d(x, weight, stride=stride, groups=groups)
        return full[:, :, offset : offset + 500, offset : offset + 500]

    def padded(x: Tensor) -> Tensor:
        """The same numbers, for an even stride: one ring of zeros, F.interpolate and a crop."""
        full = interpolate(pad(x, (1, 1, 1, 1)), scale_factor=stride, mode="bilinear")
        start = stride // 2 + offset
        return full[:, :, start : start + 500, start : start + 500]

    return Problem(
        f"fcn/k{kernel}s{stride}-21x{low}x{low}-500x500/{_short(dtype)}",
        ((1, 21, low, low),),
        size,
        dtype,
        {
            OURS: (own, plain),
            "dense deconvolution": (lambda x: deconvolution(x, dense, 1), plain),
            "grouped deconvolution": (lambda x: deconvolution(x, grouped, 21), plain),
            "pad, F.interpolate": (padded, plain),
        },
        # bfloat16 transposed convolutions take seconds.
        {} if dtype == torch.float32 else {"dense deconvolution": 4, "grouped deconvolution": 4},
    )


def fusion(name: str, shapes: tuple[Shape, ...], relu: bool, dtype: torch.dtype) -> Problem:
    """A sum of maps at the size of the first one."""
    from pydense.ops import fuse_sum_upsample

    size = (shapes[0][2], shapes[0][3])

    def theirs(*maps: Tensor) -> Tensor:
        total = maps[0]
        for x in maps[1:]:
            total = total + interpolate(x, size=size, mode="bilinear")
        return total.relu() if relu else total

    return Problem(
        f"{name}/{shapes[0][1]}x{size[0]}x{size[1]}/{_short(dtype)}",
        shapes,
        size,
        dtype,
        _forms(lambda *maps: fuse_sum_upsample(maps, size, relu), theirs),
    )


def problems() -> list[Problem]:
    """What the benchmark measures."""
    hrnet = tuple((1, 48, 128 >> k, 256 >> k) for k in range(4))
    refine = ((1, 256, 128, 128), (1, 256, 64, 64))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [
            interpolation((1, 21, 65, 65), (513, 513), dtype),
            interpolation((1, 150, 128, 128), (512, 512), dtype),
            interpolation((1, 19, 256, 512), (1024, 2048), dtype),
            fcn(32, 16, 19, dtype),
            fcn(8, 70, 31, dtype),
            fusion("hrnet", hrnet, True, dtype),
            fusion("refinenet", refine, False, dtype),
        ]
    return found


def quick_problems() -> list[Problem]:
    """Small ones, to see that everything works."""
    return [
        interpolation((1, 5, 9, 9), (33, 33), torch.float32),
        fusion("hrnet", ((1, 16, 16, 16), (1, 16, 8, 8)), True, torch.bfloat16),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
