# SPDX-License-Identifier: Apache-2.0
"""One call of each operator that has CUDA kernels: what tests/test_cuda.py holds them to.

A room adds its calls to ``CALLS``. Inputs are made on the CPU, in float64; the tests cast and move
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pydense import _library

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


CALLS: dict[str, Call] = {
    "selftest": Call(
        run=lambda x: torch.ops.pydense._selftest(x),
        inputs=lambda: (normal(2, 3, 17, 19),),
        dtypes=(torch.float32,),
        gradient=False,
        large=large_selftest,
    ),
}
