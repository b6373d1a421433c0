# SPDX-License-Identifier: Apache-2.0
"""One call of each operator that has CUDA kernels: what tests/test_cuda.py holds them to.

A room adds its calls to ``CALLS``. Inputs are made on the CPU, in float64; the tests cast and move
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from _cuda_call import Call as Call
from _cuda_call import normal
from _cuda_calls_atrous import ATROUS_CALLS
from torch import Tensor

from pydense.ops import (
    chained_residual_pool,
    dense_crf,
    exact_gaussian_filter,
    fuse_sum_upsample,
    max_pool2d_same,
    permutohedral_filter,
    upsample_accumulate,
    upsample_argmax,
    upsample_bilinear,
    upsample_crop,
    upsample_cross_entropy,
    upsample_softmax,
)


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


def large_argmax(device: torch.device) -> None:
    logits = torch.zeros(2**19 + 1, 128, 4, 8, device=device, dtype=torch.bfloat16)
    logits[-1, 77] = 1
    labels = upsample_argmax(logits, (64, 65), dtype=torch.uint8)  # 2.18e9 of them
    assert bool((labels[-1] == 77).all())
    assert not labels[-2].any() and not labels[0].any()


def large_softmax(device: torch.device) -> None:
    logits = torch.zeros(1025, 128, 8, 8, device=device, dtype=torch.bfloat16)
    logits[-1, 5] = 30
    leaf = logits.requires_grad_()
    out = upsample_softmax(leaf, 128)  # 2.15e9 numbers
    assert bool((out[-1, 5] == 1).all()) and bool((out[-2] == 1 / 128).all())
    (gradient,) = torch.autograd.grad(
        out, leaf, torch.ones((), device=device).to(out).expand_as(out)
    )
    assert float(gradient.abs().max()) < 1e-3


def large_accumulate(device: torch.device) -> None:
    dst = torch.zeros(1, 129, 4096, 4096, device=device)
    upsample_accumulate(dst, torch.ones(1, 129, 4, 4, device=device), 4000, 4032, (96, 64))
    assert bool((dst[:, :, 4000:, 4032:] == 1).all())
    assert float(dst[0, -1].sum()) == 96 * 64 == float(dst[0, 0].sum())


def accumulated(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    layout = (
        torch.channels_last
        if logits.is_contiguous(memory_format=torch.channels_last)
        else (torch.contiguous_format)
    )
    dst = torch.ones(2, 6, 40, 50, dtype=dtype, device=logits.device).to(memory_format=layout)
    return upsample_accumulate(dst, logits, 3, 2, (33, 41), weight=0.5)


def large_upsampling(run: Callable[[Tensor], Tensor]) -> Callable[[torch.device], None]:
    """``run`` makes pictures of 1024 x 2048 from 8 x 16: the last one, and its gradient."""

    def check(device: torch.device) -> None:
        planes = 2**31 // (1024 * 2048) + 1
        x = normal(1, planes, 8, 16).to(device, torch.float16).requires_grad_()
        out = run(x)
        assert out.numel() > 2**31
        (grad,) = torch.autograd.grad(out, x, out.detach())
        one = x[:, -1:].detach().requires_grad_()
        expected = run(one)
        assert torch.equal(out[:, -1:], expected)
        assert torch.equal(grad[:, -1:], torch.autograd.grad(expected, one, expected.detach())[0])

    return check


def bilinear(x: Tensor) -> Tensor:
    return upsample_bilinear(x, (x.shape[2] * 5 // 2, 3 * x.shape[3] + 1))


def crop(x: Tensor) -> Tensor:
    size = (7 * x.shape[2], 8 * x.shape[3])
    return upsample_crop(x, stride=8, kernel_size=16, offset=2.5, size=size)


def fused(*maps: Tensor) -> Tensor:
    return fuse_sum_upsample(maps, relu=True)


def max_pool(x: Tensor) -> Tensor:
    """With gradients by both operators, whether ``x`` wants one or not."""
    small = max_pool2d_same(x.detach(), 3)
    return small + max_pool2d_same(x)


def large_max_pool(device: torch.device) -> None:
    """The last plane is its own."""
    x = torch.zeros(1, 2**31 // 2**12 + 1, 64, 64, dtype=torch.bfloat16, device=device)
    x[0, -1, 60, 61] = 3
    out = max_pool2d_same(x.requires_grad_())
    assert float(out[0, -1].sum()) == 3 * 25 == float(out.sum())
    (grad,) = torch.autograd.grad(out, x, out.detach())
    assert float(grad[0, -1, 60, 61]) == 3 * 25 == float(grad.sum())


def residual_pool(x: Tensor, *weights: Tensor) -> Tensor:
    """Both variants, and windows that are pooled with the product and before it."""
    first = chained_residual_pool(x, weights[:1])
    second = chained_residual_pool(x, weights[:1], pool_size=7)
    return first + second + chained_residual_pool(x, weights[1:], variant="conv_pool")


def large_residual_pool(device: torch.device) -> None:
    """The last image is its own."""
    x = torch.zeros(2**31 // 2**20 + 1, 16, 256, 256, dtype=torch.bfloat16, device=device)
    x[-1, 3, 60, 61] = 3
    weight = torch.eye(16, dtype=torch.bfloat16, device=device)[:, :, None, None]
    out = chained_residual_pool(x, [2 * weight])
    assert float(out[-1, 3].sum()) == 3 * 51 == float(out.sum())


def crf(x: Tensor, image: Tensor) -> Tensor:
    """One iteration: with more, errors of 16-bit input grow with the steepness of the softmax."""
    gaussian, bilateral = dict(sxy=3, compat=1), dict(sxy=8, srgb=0.75, compat=2)
    return dense_crf(x, image, gaussian=gaussian, bilateral=bilateral, iterations=1)


def crf_in_training(x: Tensor, matrix: Tensor, diagonal: Tensor) -> Tensor:
    """Backward through both kinds of compatibility that a layer trains."""
    gaussian, other = dict(sxy=3, compat=matrix), dict(features=_places(x), compat=diagonal)
    return dense_crf(x, gaussian=gaussian, features=[other], iterations=1)


def _places(x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[2], device=x.device).view(1, 1, -1, 1) / 5
    return rows.expand(1, 1, *x.shape[2:])


def exact_crf(x: Tensor, image: Tensor) -> Tensor:
    gaussian, bilateral = dict(sxy=3, compat=1), dict(sxy=8, srgb=0.75, compat=2)
    return dense_crf(
        x, image, gaussian=gaussian, bilateral=bilateral, iterations=1, backend="exact"
    )


def fast_filter(x: Tensor, f: Tensor) -> Tensor:
    """Of values of one sign: relative errors of sums are those of what is summed."""
    return exact_gaussian_filter(x.abs(), f.detach(), normalization="after", precision="fast")


def filter_tolerance(dtype: torch.dtype) -> float:
    return (4 if dtype.itemsize == 2 else 256) * torch.finfo(dtype).eps


CALLS: dict[str, Call] = {
    **ATROUS_CALLS,
    "dense_crf": Call(
        run=crf,
        inputs=lambda: (normal(2, 5, 7, 16), normal(2, 3, 7, 16, seed=1)),
        tolerance=filter_tolerance,
        graph=False,  # building a lattice waits for its size
    ),
    "dense_crf with a lattice from the cache": Call(
        run=lambda x, compat: dense_crf(x, gaussian=dict(sxy=3, compat=compat)),
        inputs=lambda: (normal(2, 5, 7, 16), normal(5).abs()),
        tolerance=lambda dtype: 16 * filter_tolerance(dtype),
    ),
    "dense_crf in training": Call(
        run=crf_in_training,
        inputs=lambda: (normal(2, 5, 7, 16), normal(5, 5, seed=2), normal(5, seed=3)),
        tolerance=lambda dtype: 16 * filter_tolerance(dtype),
        graph=False,
    ),
    "permutohedral_filter": Call(
        run=lambda x, f: permutohedral_filter(x, f, normalization="symmetric"),
        inputs=lambda: (normal(2, 5, 7, 16), normal(2, 3, 7, 16, seed=1)),
        tolerance=filter_tolerance,
        graph=False,
    ),
    "dense_crf in exact mode": Call(
        run=exact_crf,
        inputs=lambda: (normal(2, 5, 7, 8), normal(2, 3, 7, 8, seed=1)),
        tolerance=lambda dtype: 4 * filter_tolerance(dtype),
        gradient=False,  # of normalisers, torch sums channels in the order they lie
    ),
    "exact_gaussian_filter": Call(
        run=lambda x, f: exact_gaussian_filter(x, f, normalization="symmetric"),
        inputs=lambda: (normal(2, 5, 7, 16), normal(2, 3, 7, 16, seed=1)),
        tolerance=lambda dtype: 4 * filter_tolerance(dtype),
    ),
    "exact_gaussian_filter in fast mode": Call(
        run=fast_filter,
        inputs=lambda: (normal(2, 5, 7, 24), normal(2, 3, 7, 24, seed=1)),
        dtypes=(torch.float32,),
        tolerance=lambda dtype: 2e-3,
        gradient=False,
    ),
    "chained_residual_pool": Call(
        run=residual_pool,
        inputs=lambda: (  # few whole numbers: convolutions without rounding, the same maxima
            normal(2, 8, 7, 16).round().clamp(-2, 2),
            *(normal(8, 8, 1, 1, seed=i).round().clamp(-1, 1) for i in (1, 2)),
        ),
        tolerance=lambda dtype: 16 * torch.finfo(dtype).eps,
        large=large_residual_pool,
    ),
    "max_pool2d_same": Call(
        run=max_pool,
        inputs=lambda: (normal(2, 8, 11, 16),),
        large=large_max_pool,
    ),
    "upsample_argmax": Call(
        run=lambda x: upsample_argmax(x, (33, 41)),
        inputs=lambda: (normal(2, 6, 7, 9),),
        tolerance=lambda dtype: 0,
        gradient=False,
        large=large_argmax,
    ),
    "upsample_argmax with confidence": Call(
        run=lambda x: upsample_argmax(x, (33, 41), return_confidence=True).confidence,
        inputs=lambda: (normal(2, 6, 7, 9),),
        tolerance=lambda dtype: 1e-12 if dtype == torch.float64 else 4e-6,
        gradient=False,
    ),
    "upsample_softmax": Call(
        run=lambda x: upsample_softmax(x, (33, 41)),
        inputs=lambda: (normal(2, 6, 7, 9),),
        large=large_softmax,
    ),
    "upsample_accumulate": Call(
        run=accumulated,
        inputs=lambda: (normal(2, 6, 7, 9),),
        tolerance=lambda dtype: 1e-14 if dtype == torch.float64 else 1e-6,
        gradient=False,
        large=large_accumulate,
    ),
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
    "upsample_bilinear": Call(
        run=bilinear,
        inputs=lambda: (normal(2, 3, 7, 9),),
        large=large_upsampling(lambda x: upsample_bilinear(x, (1024, 2048))),
    ),
    "upsample_crop": Call(
        run=crop,
        inputs=lambda: (normal(2, 8, 5, 6),),
        large=large_upsampling(
            lambda x: upsample_crop(x, stride=128, kernel_size=256, offset=64, size=(1024, 2048))
        ),
    ),
    "fuse_sum_upsample": Call(
        run=fused,
        inputs=lambda: tuple(
            normal(2, 3, *shape, seed=i) for i, shape in enumerate([(12, 16), (6, 8), (3, 4)])
        ),
        large=large_upsampling(lambda x: fuse_sum_upsample([x], (1024, 2048), relu=True)),
    ),
}
