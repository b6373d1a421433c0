# SPDX-License-Identifier: Apache-2.0
"""How each CUDA kernel is reached from Python at the shape of its prediction, and its rival.

A key is ``kernel|shape`` as in ``benchmarks/cuda/counts.json``; a value makes the inputs on the GPU
and returns the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate


class Calls(NamedTuple):
    """Calls of the same work: pydense's, and the best that torch has for it."""

    ours: Callable[[], object]
    rival: Callable[[], object] | None = None


def _selftest() -> Calls:
    x = torch.ones(1 << 26, device="cuda")
    return Calls(lambda: torch.ops.pydense._selftest(x), lambda: x * 2 + 1)


def _pictures(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=form)


def _upsample(
    shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype, last: bool = False
) -> Callable[[], Calls]:
    def make() -> Calls:
        from pydense.ops import upsample_bilinear

        x = _pictures(*shape, dtype=dtype, last=last)
        return Calls(
            lambda: upsample_bilinear(x, size),
            lambda: interpolate(x, size=size, mode="bilinear"),
        )

    return make


def _upsample_backward(
    shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype, last: bool = False
) -> Callable[[], Calls]:
    """``shape`` is that of the gradient of the output."""

    def make() -> Calls:
        grad = _pictures(*shape, dtype=dtype, last=last)
        input_size = [*shape[:2], *size]
        rival = torch.ops.aten.upsample_bilinear2d_backward
        ours = torch.ops.pydense.upsample_bilinear_backward
        return Calls(
            lambda: ours(grad, *size, False, 0.0, 0.0),
            lambda: rival(grad, shape[2:], input_size, False, None, None),
        )

    return make


def _exchange_maps() -> list[Tensor]:
    """Of a stage of HRNet with four resolutions."""
    return [_pictures(12, 48, 128 >> k, 256 >> k, dtype=torch.float32) for k in range(4)]


def _fuse() -> Calls:
    from pydense.ops import fuse_sum_upsample

    maps = _exchange_maps()

    def rival() -> Tensor:
        total = maps[0]
        for x in maps[1:]:
            total = total + interpolate(x, size=(128, 256), mode="bilinear")
        return total.relu_()

    return Calls(lambda: fuse_sum_upsample(maps, relu=True), rival)


def _mask() -> Calls:
    grad = _pictures(12, 48, 128, 256, dtype=torch.float32)
    ours = torch.ops.pydense.fuse_sum_upsample_backward
    return Calls(lambda: ours(grad, None, [128], [256], "bilinear", False), lambda: grad.clone())


CASES: dict[str, Callable[[], Calls]] = {
    "selftest_kernel|2^26 floats": _selftest,
    "upsample_forward_kernel|16 x 21 x 65 x 65 to 513 x 513, float32": _upsample(
        (16, 21, 65, 65), (513, 513), torch.float32
    ),
    "upsample_forward_kernel|8 x 150 x 128 x 128 to 512 x 512, bfloat16": _upsample(
        (8, 150, 128, 128), (512, 512), torch.bfloat16
    ),
    "upsample_forward_kernel|128 x 64 x 32 x 32 to 64 x 64, bfloat16, channels_last": _upsample(
        (128, 64, 32, 32), (64, 64), torch.bfloat16, last=True
    ),
    "upsample_forward_kernel|12 x 48 x 128 x 256 of 4 maps, float32, ReLU": _fuse,
    "upsample_backward_kernel|16 x 21 x 513 x 513 to 65 x 65, float32": _upsample_backward(
        (16, 21, 513, 513), (65, 65), torch.float32
    ),
    "upsample_backward_kernel|128 x 64 x 64 x 64 to 32 x 32, bfloat16, channels_last": (
        _upsample_backward((128, 64, 64, 64), (32, 32), torch.bfloat16, last=True)
    ),
    "upsample_mask_kernel|12 x 48 x 128 x 256, float32": _mask,
}
