# SPDX-License-Identifier: Apache-2.0
"""How each CUDA kernel is reached from Python at the shape of its prediction, and its rival.

A key is ``kernel|shape`` as in ``benchmarks/cuda/counts.json``; a value makes the inputs on the GPU
and returns the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate


class Calls(NamedTuple):
    """Calls of the same work: pydense's, and the best that torch has for it."""

    ours: Callable[[], object]
    rival: Callable[[], object] | None = None


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


CRF_BUILD = "1x5x321x481, bilateral 80, 13"
CRF_KEYS = "1x9x321x481, keys of two words"
CRF_FIELD = "1x21x321x481, bilateral 80, 13, 1 iteration"


def _crf_features() -> Tensor:
    """Of a picture with smooth colours and some noise, as the counted launch has."""
    y, x = torch.meshgrid(torch.arange(321.0), torch.arange(481.0), indexing="ij")
    noise = torch.rand(3, 321, 481, generator=torch.Generator().manual_seed(8))
    colours = [100 + 40 * torch.sin(0.05 * (x + c * y)) + 12 * noise[c] - 6 for c in range(3)]
    return torch.stack([x / 80, y / 80, *(c / 13 for c in colours)])[None].cuda()


def _crf_lattice(wide: bool = False) -> Calls:
    from pydense.ops import permutohedral_filter  # noqa: F401  (loads the operators)

    features = _crf_features()
    if wide:
        features = torch.cat([features, 40 * features[:, :4]], 1)
    return Calls(lambda: torch.ops.pydense.dense_crf_lattice(features, "symmetric", True))


def _crf_field() -> Calls:
    from pydense.ops import permutohedral_filter  # noqa: F401

    op = torch.ops.pydense
    lattice = op.dense_crf_lattice(_crf_features(), "symmetric", True)
    unary = torch.randn(1, 21, 321, 481, device="cuda")
    compat = torch.tensor(10.0, device="cuda")
    arguments = (unary, [lattice], [compat], 1, False, None, "probabilities")
    return Calls(lambda: op.dense_crf_mean_field(*arguments))


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


def _max_pool(
    dtype: torch.dtype, last: bool = False, gradient: bool = False
) -> Callable[[], Calls]:
    def make() -> Calls:
        from torch.nn.functional import max_pool2d

        from pydense.ops import max_pool2d_same

        x = _pictures(*POOL, dtype=dtype, last=last).requires_grad_(gradient)
        return Calls(lambda: max_pool2d_same(x), lambda: max_pool2d(x, 5, 1, 2))

    return make


def _max_pool_backward(
    dtype: torch.dtype, last: bool = False, addend: bool = False
) -> Callable[[], Calls]:
    def make() -> Calls:
        x = _pictures(*POOL, dtype=dtype, last=last)
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

        x = _pictures(*POOL, dtype=dtype, last=last).requires_grad_(gradient)
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


def _aspp_sum(
    dtype: torch.dtype, last: bool = False, gradient: bool = False
) -> Callable[[], Calls]:
    """DeepLab v2's head; torch's is four convolutions and three sums."""

    def make() -> Calls:
        from pydense import reference
        from pydense.ops import aspp_sum

        rates = (6, 12, 18, 24)
        x = _pictures(1, 2048, 65, 65, dtype=dtype, last=last).requires_grad_(gradient)
        form = torch.channels_last if last else torch.contiguous_format
        weights = [
            torch.randn(21, 2048, 3, 3, device="cuda").mul_(0.01).to(dtype).requires_grad_(gradient)
            for _ in rates
        ]
        theirs = [
            w.detach().contiguous(memory_format=form).requires_grad_(gradient) for w in weights
        ]
        grad = torch.randn(1, 21, 65, 65, device="cuda").to(dtype)

        def call(function: Callable[..., Tensor], row: list[Tensor]) -> object:
            out = function(x, row, rates=rates)
            return torch.autograd.grad(out, [x, *row], grad) if gradient else out

        return Calls(lambda: call(aspp_sum, weights), lambda: call(reference.aspp_sum, theirs))

    return make


def _convolutions(
    size: int,
    channels: int,
    branches: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    last: bool = True,
) -> tuple[Tensor, list[Tensor], list[int]]:
    """A map, and weights and rates of branches of (outputs, kernel, rate)."""
    # The rival may look for its best kernel.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    form = torch.channels_last if last else torch.contiguous_format
    weights = [
        (torch.randn(o, channels, k, k, device="cuda") / 64)
        .to(dtype)
        .contiguous(memory_format=form)
        for o, k, _ in branches
    ]
    x = _pictures(1, channels, size, size, dtype=dtype, last=last)
    return x, weights, [rate for _, _, rate in branches]


def _atrous(
    size: int,
    channels: int,
    branches: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    last: bool = True,
) -> Callable[[], Calls]:
    """Against torch's convolutions, and its ``cat`` where there are several."""

    def make() -> Calls:
        x, weights, rates = _convolutions(size, channels, branches, dtype, last)
        outputs = sum(len(weight) for weight in weights)
        out = _pictures(1, outputs, size, size, dtype=dtype, last=last)
        ours = torch.ops.pydense._dense_atrous_conv2d_branches_into

        def rival() -> object:
            made = [
                conv2d(x, weight, padding=rate * (weight.shape[2] // 2), dilation=rate)
                for weight, rate in zip(weights, rates, strict=True)
            ]
            return made[0] if len(made) == 1 else torch.cat(made, 1)

        return Calls(lambda: ours(x, weights, [], [], out, rates, False), rival)

    return make


def _depthwise(
    dtype: torch.dtype, last: bool = False, gradient: bool = False
) -> Callable[[], Calls]:
    """One branch of DeepLab v3+, depthwise."""

    def make() -> Calls:
        from torch.nn.functional import conv2d

        x = _pictures(1, 2048, 65, 65, dtype=dtype, last=last)
        weight = torch.randn(2048, 1, 3, 3, device="cuda").to(dtype)
        geometry = (12, 12, 12, 12)
        if not gradient:
            ours = torch.ops.pydense.depthwise_atrous_conv2d
            return Calls(
                lambda: ours(x, weight, None, 65, 65, *geometry, False, False),
                lambda: conv2d(x, weight, padding=12, dilation=12, groups=2048),
            )
        grad = torch.randn_like(x)
        backward = torch.ops.pydense.depthwise_atrous_conv2d_weight_gradient
        aten = torch.ops.aten.convolution_backward
        pair, needed = [12, 12], [False, True, False]
        return Calls(
            lambda: backward(grad, x, 3, 3, *geometry),
            lambda: aten(grad, x, weight, None, [1, 1], pair, pair, False, [0, 0], 2048, needed),
        )

    return make


def _atrous_weight_gradient() -> Calls:
    x, (weight,), _ = _convolutions(33, 2048, [(256, 3, 12)], torch.bfloat16)
    grad = _pictures(1, 256, 33, 33, dtype=torch.bfloat16, last=True)
    ours = torch.ops.pydense.dense_atrous_conv2d_weight_gradient
    rival = torch.ops.aten.convolution_backward
    mask = [False, True, False]
    return Calls(
        lambda: ours(grad, x, 3, 3, 12, 12, 12, 12),
        lambda: rival(grad, x, weight, None, [1, 1], [12, 12], [12, 12], False, [0, 0], 1, mask),
    )


PYRAMID = [(256, 1, 1), (256, 3, 6), (256, 3, 12), (256, 3, 18)]
PYRAMID_NAME = "1 x 2048 x 33 x 33 to 256 1x1 and 3 x 256 with rates 6, 12, 18, bfloat16"
LARGE_FOV_NAME = "1 x 512 x 41 x 41 to 1024, rate 12"
CONTIGUOUS_NAME = "1 x 2048 x 33 x 33 to 256, rate 12, float16, contiguous"
GRADIENT_NAME = "1 x 2048 x 33 x 33 by 256, rate 12, bfloat16, channels_last"
_contiguous_atrous = _atrous(33, 2048, [(256, 3, 12)], torch.float16, last=False)

POOL = (8, 256, 128, 128)
POOL_NAME = "8 x 256 x 128 x 128"


BRANCH = "1 x 2048 x 65 x 65, rate 12"
TAPS = "1 x 21 x 65 x 65, 33 taps"


CASES: dict[str, Callable[[], Calls]] = {
    f"depthwise_kernel|{BRANCH}, bfloat16": _depthwise(torch.bfloat16),
    f"depthwise_kernel|{BRANCH}, float32": _depthwise(torch.float32),
    f"depthwise_last_kernel|{BRANCH}, bfloat16, channels_last": _depthwise(
        torch.bfloat16, last=True
    ),
    **{
        f"depthwise_gradient{part}_kernel|{BRANCH}, {name}": _depthwise(dtype, last, gradient=True)
        for part in ("", "_sum")
        for name, dtype, last in (
            ("bfloat16", torch.bfloat16, False),
            ("bfloat16, channels_last", torch.bfloat16, True),
            ("float32", torch.float32, False),
        )
    },
    f"tap_add_kernel|{TAPS}, bfloat16": _aspp_sum(torch.bfloat16),
    f"tap_add_kernel|{TAPS}, bfloat16, channels_last": _aspp_sum(torch.bfloat16, last=True),
    f"tap_add_kernel|{TAPS}, float32": _aspp_sum(torch.float32),
    f"tap_gather_kernel|{TAPS}, bfloat16": _aspp_sum(torch.bfloat16, gradient=True),
    f"tap_gather_kernel|{TAPS}, bfloat16, channels_last": _aspp_sum(
        torch.bfloat16, last=True, gradient=True
    ),
    f"tap_gather_kernel|{TAPS}, float32": _aspp_sum(torch.float32, gradient=True),
    "tap_stack_kernel|4 x 21 x 2048 x 3 x 3, bfloat16": _aspp_sum(torch.bfloat16),
    "tap_unstack_kernel|21 x 2048 x 3 x 3, bfloat16": _aspp_sum(torch.bfloat16, gradient=True),
    f"dense_mma_kernel|{PYRAMID_NAME}, channels_last": _atrous(33, 2048, PYRAMID, torch.bfloat16),
    f"dense_sum_kernel|{PYRAMID_NAME}": _atrous(33, 2048, PYRAMID, torch.bfloat16),
    f"dense_mma_kernel|{LARGE_FOV_NAME}, bfloat16, channels_last": _atrous(
        41, 512, [(1024, 3, 12)], torch.bfloat16
    ),
    f"dense_mma_kernel|{LARGE_FOV_NAME}, TF32, channels_last": _atrous(
        41, 512, [(1024, 3, 12)], torch.float32
    ),
    "dense_mma_kernel|1 x 2048 x 4 x 4 to 256, 1x1, bfloat16, channels_last": _atrous(
        4, 2048, [(256, 1, 1)], torch.bfloat16
    ),
    f"dense_mma_kernel|{CONTIGUOUS_NAME}": _contiguous_atrous,
    f"dense_pixels_kernel|{CONTIGUOUS_NAME}": _contiguous_atrous,
    f"dense_weight_kernel|{CONTIGUOUS_NAME}": _contiguous_atrous,
    f"dense_gradient_mma_kernel|{GRADIENT_NAME}": _atrous_weight_gradient,
    f"dense_gradient_sum_kernel|{GRADIENT_NAME}": _atrous_weight_gradient,
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
    f"lattice_blur_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_bounds_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_chunk_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_embed_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_heads_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_link_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_norm_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_number_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_plan_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_splat_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_splat_long_kernel|{CRF_BUILD}": _crf_lattice,
    f"lattice_bounds_kernel|{CRF_KEYS}": lambda: _crf_lattice(wide=True),
    f"lattice_embed_kernel|{CRF_KEYS}": lambda: _crf_lattice(wide=True),
    f"lattice_gather_keys_kernel|{CRF_KEYS}": lambda: _crf_lattice(wide=True),
    f"lattice_heads_kernel|{CRF_KEYS}": lambda: _crf_lattice(wide=True),
    f"lattice_plan_kernel|{CRF_KEYS}": lambda: _crf_lattice(wide=True),
    f"lattice_blur_kernel|{CRF_FIELD}": _crf_field,
    f"lattice_splat_kernel|{CRF_FIELD}": _crf_field,
    f"lattice_splat_long_kernel|{CRF_FIELD}": _crf_field,
    f"mean_field_update_kernel|{CRF_FIELD}": _crf_field,
    f"rows_load_kernel|{CRF_FIELD}": _crf_field,
    f"rows_store_kernel|{CRF_FIELD}": _crf_field,
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
