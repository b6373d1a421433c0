# SPDX-License-Identifier: Apache-2.0
"""How each CUDA kernel is reached from Python at the shape of its prediction, and its rival.

A key is ``kernel|shape`` as in ``benchmarks/cuda/counts.json``; a value makes the inputs on the GPU
and returns the calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks._cuda_atrous_cases import ATROUS_CASES
from benchmarks._cuda_calls import Calls, pictures
from benchmarks._cuda_crf_cases import CRF_CASES


def _selftest() -> Calls:
    x = torch.ones(1 << 26, device="cuda")
    return Calls(lambda: torch.ops.pydense._selftest(x), lambda: x * 2 + 1)


def _cross_entropy(layout: str = "", gradient: bool = True) -> Calls:
    from torch.nn.functional import cross_entropy

    from pydense.ops import upsample_cross_entropy

    x = torch.randn(1, 19, 256, 512, device="cuda", requires_grad=gradient)
    if layout:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_(gradient)
    target = torch.randint(19, (1, 1024, 2048), device="cuda")

    def ours() -> object:
        loss = upsample_cross_entropy(x, target)
        return torch.autograd.grad(loss, x) if gradient else loss

    def theirs() -> object:
        loss = cross_entropy(_full(x), target)
        return torch.autograd.grad(loss, x) if gradient else loss

    return Calls(ours, theirs)


HEAD = "1x19x256x512 to 1024x2048"
HEAD_BACK = "1x19x256x512 from 1024x2048"
HEAD_SIZE = (1024, 2048)


def _head_logits(layout: str = "", areas: bool = False) -> Tensor:
    x = torch.randn(1, 19, 256, 512, device="cuda")
    if areas:  # two of them, as the counted launch has
        x[:, 7, :, :320] = 20
        x[:, 11, :, 320:] = 20
    return x.to(memory_format=torch.channels_last) if layout else x


def _full(x: Tensor) -> Tensor:
    return interpolate(x, HEAD_SIZE, mode="bilinear")


def _argmax(layout: str = "", areas: bool = False) -> Calls:
    from pydense.ops import upsample_argmax

    x = _head_logits(layout, areas)
    return Calls(lambda: upsample_argmax(x, HEAD_SIZE), lambda: _full(x).argmax(1))


def _softmax(layout: str = "") -> Calls:
    from pydense.ops import upsample_softmax

    x = _head_logits(layout)
    return Calls(lambda: upsample_softmax(x, HEAD_SIZE), lambda: _full(x).softmax(1))


def _softmax_backward(layout: str = "") -> Calls:
    x = _head_logits(layout)
    leaf = x.clone().requires_grad_()
    upstream = torch.randn_like(_full(x))
    out = _full(leaf).softmax(1)
    op = torch.ops.pydense.upsample_softmax_backward
    return Calls(
        lambda: op(upstream, x, False),
        lambda: torch.autograd.grad(out, leaf, upstream, retain_graph=True),
    )


def _accumulate(layout: str = "") -> Calls:
    from pydense.ops import upsample_accumulate

    x = _head_logits(layout)
    dst = torch.zeros_like(_full(x))
    weight = torch.rand(HEAD_SIZE, device="cuda")
    return Calls(
        lambda: upsample_accumulate(dst, x, 0, 0, HEAD_SIZE, weight=weight),
        lambda: dst.add_(_full(x) * weight),
    )


def _upsample(
    shape: tuple[int, int, int, int], size: tuple[int, int], dtype: torch.dtype, last: bool = False
) -> Callable[[], Calls]:
    def make() -> Calls:
        from pydense.ops import upsample_bilinear

        x = pictures(*shape, dtype=dtype, last=last)
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
        grad = pictures(*shape, dtype=dtype, last=last)
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
    return [pictures(12, 48, 128 >> k, 256 >> k, dtype=torch.float32) for k in range(4)]


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
    grad = pictures(12, 48, 128, 256, dtype=torch.float32)
    ours = torch.ops.pydense.fuse_sum_upsample_backward
    return Calls(lambda: ours(grad, None, [128], [256], "bilinear", False), lambda: grad.clone())


def _max_pool(
    dtype: torch.dtype, last: bool = False, gradient: bool = False
) -> Callable[[], Calls]:
    def make() -> Calls:
        from torch.nn.functional import max_pool2d

        from pydense.ops import max_pool2d_same

        x = pictures(*POOL, dtype=dtype, last=last).requires_grad_(gradient)
        return Calls(lambda: max_pool2d_same(x), lambda: max_pool2d(x, 5, 1, 2))

    return make


def _max_pool_backward(
    dtype: torch.dtype, last: bool = False, addend: bool = False
) -> Callable[[], Calls]:
    def make() -> Calls:
        x = pictures(*POOL, dtype=dtype, last=last)
        grad = torch.randn_like(x)
        more = torch.randn_like(x) if addend else None
        _, offsets = torch.ops.pydense.max_pool2d_same_with_offsets(x, 5)
        _, indices = torch.ops.aten.max_pool2d_with_indices(x, [5, 5], [1, 1], [2, 2])
        ours = torch.ops.pydense.max_pool2d_same_backward
        aten = torch.ops.aten.max_pool2d_with_indices_backward

        def rival() -> Tensor:
            result = aten(grad, x, [5, 5], [1, 1], [2, 2], [1, 1], False, indices)
            return result if more is None else result.add_(more)

        return Calls(lambda: ours(grad, offsets, more, 5), rival)

    return make


def _residual_pool(
    dtype: torch.dtype,
    last: bool = False,
    stages: int = 1,
    pool_size: int = 5,
    gradient: bool = False,
) -> Callable[[], Calls]:
    """One stage, or several whose sum is looked at: there the pool comes second.

    Windows of 7 have the pool in a kernel of its own, and the product alone in the one looked at.
    """

    def make() -> Calls:
        from pydense import reference
        from pydense.ops import chained_residual_pool

        x = pictures(*POOL, dtype=dtype, last=last).requires_grad_(gradient)
        weights = [
            (torch.randn(256, 256, 1, 1, device="cuda").to(dtype) / 16).requires_grad_(gradient)
            for _ in range(stages)
        ]
        variant = "pool_conv" if stages == 1 else "conv_pool"
        return Calls(
            lambda: chained_residual_pool(x, weights, variant=variant, pool_size=pool_size),
            lambda: reference.chained_residual_pool(
                x, weights, variant=variant, pool_size=pool_size
            ),
        )

    return make


POOL = (8, 256, 128, 128)
POOL_NAME = "8 x 256 x 128 x 128"


CASES: dict[str, Callable[[], Calls]] = {
    **ATROUS_CASES,
    **CRF_CASES,
    f"max_pool_forward_kernel|{POOL_NAME}, float32, offsets": _max_pool(
        torch.float32, gradient=True
    ),
    f"max_pool_forward_kernel|{POOL_NAME}, bfloat16": _max_pool(torch.bfloat16),
    f"max_pool_forward_kernel|{POOL_NAME}, bfloat16, offsets, channels_last": _max_pool(
        torch.bfloat16, last=True, gradient=True
    ),
    f"max_pool_backward_kernel|{POOL_NAME}, float32, addend": _max_pool_backward(
        torch.float32, addend=True
    ),
    f"max_pool_backward_kernel|{POOL_NAME}, bfloat16, channels_last": _max_pool_backward(
        torch.bfloat16, last=True
    ),
    f"upsample_argmax_kernel|{HEAD}, noise": _argmax,
    f"upsample_argmax_kernel|{HEAD}, noise, channels last": lambda: _argmax("channels last"),
    f"upsample_argmax_kernel|{HEAD}, areas": lambda: _argmax(areas=True),
    f"upsample_softmax_kernel|{HEAD}": _softmax,
    f"upsample_softmax_kernel|{HEAD}, channels last": lambda: _softmax("channels last"),
    f"upsample_softmax_backward_kernel|{HEAD_BACK}": _softmax_backward,
    f"upsample_softmax_backward_kernel|{HEAD_BACK}, channels last": (
        lambda: _softmax_backward("channels last")
    ),
    f"softmax_backward_sum_kernel|{HEAD_BACK}": _softmax_backward,
    f"softmax_backward_sum_kernel|{HEAD_BACK}, channels last": (
        lambda: _softmax_backward("channels last")
    ),
    f"upsample_accumulate_kernel|{HEAD}": _accumulate,
    f"upsample_accumulate_kernel|{HEAD}, channels last": lambda: _accumulate("channels last"),
    f"cross_entropy_kernel|{HEAD}": _cross_entropy,
    f"cross_entropy_finish_kernel|{HEAD}": _cross_entropy,
    f"cross_entropy_kernel|{HEAD}, channels last": lambda: _cross_entropy("channels last"),
    f"cross_entropy_finish_kernel|{HEAD}, channels last": (lambda: _cross_entropy("channels last")),
    f"cross_entropy_kernel|{HEAD}, no gradient": lambda: _cross_entropy(gradient=False),
    f"cross_entropy_finish_kernel|{HEAD}, no gradient": (lambda: _cross_entropy(gradient=False)),
    f"residual_mma_kernel|{POOL_NAME}, bfloat16, 1 addend": _residual_pool(
        torch.bfloat16, pool_size=7
    ),
    f"residual_mma_kernel|{POOL_NAME}, bfloat16, 1 addend, channels_last": _residual_pool(
        torch.bfloat16, last=True, pool_size=7
    ),
    f"residual_mma_kernel|{POOL_NAME}, bfloat16, 5 x 5, 1 addend": _residual_pool(torch.bfloat16),
    f"residual_mma_kernel|{POOL_NAME}, bfloat16, 5 x 5, 1 addend, offsets, channels_last": (
        _residual_pool(torch.bfloat16, last=True, gradient=True)
    ),
    f"residual_fma_kernel|{POOL_NAME}, float32, 1 addend": _residual_pool(
        torch.float32, pool_size=7
    ),
    f"residual_fma_kernel|{POOL_NAME}, float32, 5 x 5, 1 addend": _residual_pool(torch.float32),
    f"residual_sum_kernel|{POOL_NAME}, bfloat16, 5 addends": _residual_pool(
        torch.bfloat16, stages=4
    ),
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
