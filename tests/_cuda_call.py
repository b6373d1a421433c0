# SPDX-License-Identifier: Apache-2.0
"""What a call of an operator that has CUDA kernels says of itself."""

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
        graph: Whether a CUDA graph can capture it, once it has run.
        large: Makes an input of more than 2^31 elements on a device and checks the result.
    """

    run: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    tolerance: Callable[[torch.dtype], float] = lambda dtype: 4 * torch.finfo(dtype).eps
    gradient: bool = True
    images: bool = True
    graph: bool = True
    large: Callable[[torch.device], None] | None = None


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
