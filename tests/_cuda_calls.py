# SPDX-License-Identifier: Apache-2.0
"""One call of each operator that has CUDA kernels: what tests/test_cuda.py holds them to.

A room adds its calls to ``CALLS``. Inputs are made on the CPU, in float64; the tests cast and move
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pydense import _library
from pydense.ops import upsample_cross_entropy

_library.load()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """A public function with fixed arguments.

    Attributes:
        run: Takes the floating-point tensors of ``inputs``, returns a tensor.
        inputs: Makes them, float64 on the CPU.
        dtypes: That the function takes.
        tolerance: Of the largest value, against float64, by dtype; 0 for equal bits.
        gradient: Whether ``run`` has one.
        images: Whether the first input is (N, C, H, W), so that memory formats apply.
        large: Makes an input of more than 2^31 elements on a device and checks the result.
    """

    run: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    tolerance: Callable[[torch.dtype], float] = lambda dtype: 4 * torch.finfo(dtype).eps
    gradient: bool = True
    images: bool = True
    large: Callable[[torch.device], None] | None = None


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def large_selftest(device: torch.device) -> None:
    x = torch.ones(2**31 + 3, device=device)
    x[-1] = 5
    y = torch.ops.pydense._selftest(x)
    assert float(y[-1]) == 11
    assert float(y[-2]) == 3
    assert float(y[0]) == 3
    del x
    assert bool((y[: 2**31] == 3).all())


def labels_like(x: Tensor, height: int, width: int) -> Tensor:
    """Labels made on the device of the logits; of 20 the last is to be ignored."""
    index = torch.arange(x.shape[0] * height * width, device=x.device)
    return (7 * index % 20).view(x.shape[0], height, width)


def cross_entropy(x: Tensor) -> Tensor:
    return upsample_cross_entropy(  # type: ignore[return-value]
        x, labels_like(x, 33, 41), ignore_index=19, label_smoothing=0.1
    )


def cross_entropy_map(x: Tensor) -> Tensor:
    labels = labels_like(x, 33, 41)
    return upsample_cross_entropy(  # type: ignore[return-value]
        x, labels, ignore_index=19, reduction="none", pixel_weight=1 + labels % 3
    )


def large_cross_entropy(device: torch.device) -> None:
    """The last image is its own; past 2^31 logits, gradients and labels' offsets."""
    images = 2**31 // (19 * 256 * 256) + 2
    x = torch.zeros(images, 19, 256, 256, dtype=torch.bfloat16, device=device)
    x[-1, 5] = 8
    x.requires_grad_()
    target = torch.full((images, 256, 256), 5, dtype=torch.uint8, device=device)
    loss = upsample_cross_entropy(x, target, reduction="sum")
    sure = math.exp(8) / (math.exp(8) + 18)
    expected = 256**2 * ((images - 1) * math.log(19) - math.log(sure))
    assert abs(float(loss) / expected - 1) < 1e-5
    (gradient,) = torch.autograd.grad(loss, x)
    for image, probability in ((0, 1 / 19), (images - 2, 1 / 19), (images - 1, sure)):
        of_target = gradient[image, 5].float()
        assert float((of_target - (probability - 1)).abs().max()) < 0.01 * (1 - probability)


CALLS: dict[str, Call] = {
    "cross_entropy": Call(
        run=cross_entropy,
        inputs=lambda: (normal(2, 19, 9, 11),),
        tolerance=lambda dtype: 32 * torch.finfo(dtype).eps,
        large=large_cross_entropy,
    ),
    "cross_entropy_map": Call(
        run=cross_entropy_map,
        inputs=lambda: (normal(2, 19, 9, 11),),
        tolerance=lambda dtype: 32 * torch.finfo(dtype).eps,
    ),
    "selftest": Call(
        run=lambda x: torch.ops.pydense._selftest(x),
        inputs=lambda: (normal(2, 3, 17, 19),),
        dtypes=(torch.float32,),
        gradient=False,
        large=large_selftest,
    ),
}
