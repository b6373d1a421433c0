# SPDX-License-Identifier: Apache-2.0
"""Upsampling: values and gradients against float64, torch's own operators and Caffe's."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from _ops import layouts, one_number, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv_transpose2d, interpolate

from pydense import _core, reference
from pydense.ops import bilinear_filler, fuse_sum_upsample, upsample_bilinear, upsample_crop

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
NAN, INF = float("nan"), float("inf")
# (channels, height, width, out height, out width): up, down, mixed, odd, single, wide, one vector,
# just above it, equal sizes on one or both axes, columns out of two and of four vectors.
SIZES = [
    (3, 7, 9, 20, 31),
    (21, 17, 17, 129, 130),
    (5, 33, 40, 17, 11),
    (2, 16, 500, 40, 90),
    (1, 1, 1, 4, 5),
    (4, 5, 6, 1, 1),
    (1, 2, 700, 5, 2500),
    (40, 9, 3, 10, 9),
    (17, 6, 6, 6, 12),
    (19, 8, 5, 8, 5),
    (150, 4, 4, 16, 17),
    (300, 3, 2, 9, 7),
    (3, 9, 60, 7, 40),
    (20, 9, 120, 30, 40),
]


def errors(function, torch_function, x, grad):
    """Largest errors of forward and backward against float64, ours and torch's in x's dtype."""
    wide = x.detach().double().requires_grad_()
    expected = torch_function(wide)
    expected.backward(grad.double())
    found = []
    for run in (function, torch_function):
        own = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = run(own)
        out.backward(grad)
        assert out.dtype == x.dtype and own.grad.dtype == x.dtype
        found.append(
            [
                float((a.detach().double() - b.detach()).abs().max())
                for a, b in ((out, expected), (own.grad, wide.grad))
            ]
        )
    return found


def within_budget(function, torch_function, x, grad, floor=None):
    """DESIGN: at most twice torch's own error; the floor is two roundings of the largest number."""
    ours, torchs = errors(function, torch_function, x, grad)
    eps = torch.finfo(x.dtype).eps if x.dtype == torch.float64 else 2**-24
    sizes = float(x.detach().abs().max()), float(grad.abs().max())
    for own, other, size in zip(ours, torchs, sizes, strict=True):
        assert own <= 2 * other + (floor or 4 * eps * size), (ours, torchs)


class TestBilinear:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("sizes", SIZES)
    def test_against_torch(self, backend, sizes, dtype, align_corners, form):
        c, h, w, height, width = sizes
        on = {"device": backend.device}
        x = random(2, c, h, w, **on).to(dtype).contiguous(memory_format=form)
        grad = random(2, c, height, width, seed=1, **on).to(dtype).contiguous(memory_format=form)

        def run(function):
            return lambda x: function(x, (height, width), align_corners=align_corners)

        def torchs(x, size, align_corners):
            return interpolate(x, size=size, mode="bilinear", align_corners=align_corners)

        # torch's float64 takes the floor of a coordinate in float32: 1e-7 of a cell.
        floor = 1e-6 if dtype == torch.float64 else None
        within_budget(run(upsample_bilinear), run(torchs), x, grad, floor)
        out = upsample_bilinear(x, (height, width), align_corners=align_corners)
        assert out.stride() == torchs(x, (height, width), align_corners=align_corners).stride()

    @pytest.mark.small
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_against_the_reference(self, backend, sizes, align_corners):
        c, h, w, height, width = sizes
        x = random(2, c, h, w, dtype=torch.float64, device=backend.device)
        out = upsample_bilinear(x, (height, width), align_corners=align_corners)
        expected = reference.upsample_bilinear(x, (height, width), align_corners=align_corners)
        assert (out - expected).abs().max() < 1e-12

    @pytest.mark.parametrize("scale", [2, 2.7, 0.6, (1.31, 0.77), 1.05, (3, 1.02)])
    def test_given_scale_factor(self, backend, scale):
        """It enters the formula: 10 rows times 1.31 are 13, a step of 1 / 1.31 and not 10 / 13."""
        for dtype in (torch.float32, torch.float64):
            x = random(2, 3, 10, 37, dtype=dtype, device=backend.device)
            own = upsample_bilinear(x, scale_factor=scale)
            theirs = interpolate(x, scale_factor=scale, mode="bilinear")
            assert own.shape == theirs.shape and (own - theirs).abs().max() < 2e-6
            corners = upsample_bilinear(x, scale_factor=scale, align_corners=True)
            theirs = interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)
            assert (corners - theirs).abs().max() < 2e-6
        x = random(1, 1, 10, 1, dtype=torch.float64, device=backend.device)
        stretched = upsample_bilinear(x, scale_factor=(1.31, 1))
        assert (stretched - upsample_bilinear(x, (13, 1))).abs().max() > 1e-3

    def test_coordinates_are_torchs(self, backend):
        """On a ramp the output is the coordinate: the same bits, where torch's kernels have fma."""
        if _core.cpu_capability() == "baseline":
            pytest.skip("torch fuses the half-pixel formula only where the CPU has fma")
        for n, out in ((65, 513), (128, 513), (37, 100), (500, 333), (129, 1000)):
            eye = torch.eye(n).view(n, 1, 1, n).expand(n, 1, 2, n).contiguous()
            for corners in (False, True):
                own = upsample_bilinear(eye.to(backend.device), (2, out), align_corners=corners)
                theirs = interpolate(eye, size=(2, out), mode="bilinear", align_corners=corners)
                assert torch.equal(own.cpu(), theirs)

    def test_gradcheck(self, backend):
        for form in FORMATS:
            for shape, size in (((2, 3, 3, 4), (7, 5)), ((1, 2, 5, 6), (3, 9))):
                x = random(*shape, dtype=torch.float64, device=backend.device)
                x = x.contiguous(memory_format=form).requires_grad_()
                for corners in (False, True):

                    def run(x, size=size, corners=corners):
                        return upsample_bilinear(x, size, align_corners=corners)

                    assert gradcheck(run, x) and gradgradcheck(run, x)

    def test_not_finite(self, backend):
        """w0 a + w1 b: an infinity reaches its cells, with a weight of 0 as NaN, as in torch."""
        for form in FORMATS:
            for bad in (NAN, INF, -INF):
                x = random(1, 20, 6, 7).contiguous(memory_format=form)
                x[0, 2, 3, 4] = bad
                for size in ((12, 14), (6, 14), (11, 13)):
                    own = upsample_bilinear(x.to(backend.device), size, align_corners=True).cpu()
                    theirs = interpolate(x, size=size, mode="bilinear", align_corners=True)
                    assert torch.equal(own.isnan(), theirs.isnan())
                    assert torch.equal(own.isinf(), theirs.isinf())


def deconvolution(x, stride, kernel_size, padding, offset, size):
    """Caffe: the full output, then the crop."""
    weight = bilinear_filler(x.shape[1], kernel_size, dtype=x.dtype)
    full = conv_transpose2d(x, weight, stride=stride, padding=padding)
    return full[:, :, offset : offset + size[0], offset : offset + size[1]]


CROPS = [  # stride, kernel, padding, offset, input, size
    (32, 64, 0, 19, (4, 5), (100, 90)),
    (8, 16, 0, 31, (9, 8), (33, 31)),
    (2, 4, 0, 5, (9, 12), (7, 9)),
    (32, 63, 0, 18, (3, 3), (70, 81)),
    (2, 4, 1, 0, (7, 5), (14, 10)),
    (2, 3, 1, 0, (7, 5), (13, 9)),
    (3, 6, 2, 1, (5, 6), (12, 11)),
    (5, 9, 0, 2, (4, 3), (11, 17)),
    (1, 2, 0, 1, (6, 6), (4, 5)),
    (1, 1, 0, 2, (6, 6), (3, 4)),
]


class TestCrop:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CROPS)
    def test_against_deconvolution(self, backend, case, dtype, form):
        stride, kernel, padding, offset, shape, size = case
        on = {"device": backend.device}
        x = random(2, 5, *shape, **on).to(dtype).contiguous(memory_format=form)
        grad = random(2, 5, *size, seed=1, **on).to(dtype).contiguous(memory_format=form)

        def own(x):
            return upsample_crop(
                x, stride=stride, kernel_size=kernel, padding=padding, offset=offset, size=size
            )

        def torchs(x):
            return deconvolution(x, stride, kernel, padding, offset, size)

        floor = 1e-13 if dtype == torch.float64 else None
        within_budget(own, torchs, x, grad, floor)
        assert own(x).is_contiguous(memory_format=form)

    @settings(max_examples=60)
    @given(
        stride=st.tuples(st.integers(1, 9), st.integers(1, 9)),
        odd=st.booleans(),
        padding=st.integers(0, 5),
        offset=st.fractions(-30, 60, max_denominator=12),
        shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
        size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
        channels=st.integers(1, 20),
        last=st.booleans(),
        border=st.sampled_from(["zeros", "clamp"]),
    )
    def test_any_crop(
        self, backend, stride, odd, padding, offset, shape, size, channels, last, border
    ):
        options = {
            "stride": stride,
            "kernel_size": tuple(2 * s - odd for s in stride),
            "padding": padding,
            "offset": offset,
            "size": size,
            "border": border,
        }
        on = {"dtype": torch.float64, "device": backend.device}
        x = random(2, channels, *shape, **on).requires_grad_()
        y = x.contiguous(memory_format=torch.channels_last) if last else x
        out, expected = upsample_crop(y, **options), reference.upsample_crop(x, **options)
        assert out.shape == expected.shape and (out - expected).abs().max() < 1e-12
        grad = random(*out.shape, seed=1, **on)
        (own,) = torch.autograd.grad(out, x, grad)
        (theirs,) = torch.autograd.grad(expected, x, grad)
        assert (own - theirs).abs().max() < 1e-11
        single = upsample_crop(y.detach().float(), **options)
        assert (single - expected).abs().max() < 1e-5

    def test_exact_at_any_size(self, backend):
        """Where an output lies is decided in integers: no float32 coordinate could do this."""
        n = 70_001
        x = torch.arange(2 * n, dtype=torch.float32, device=backend.device)
        x = x.remainder(251).view(1, 2, 1, n)
        out = upsample_crop(
            x, stride=(1, 3), kernel_size=(1, 5), offset=(0, 2), size=(1, 3 * n - 2)
        )
        assert torch.equal(out[..., ::3], x)
        third = (2 * x[..., :-1].double() + x[..., 1:]) / 3
        assert (out[..., 1::3] - third).abs().max() < 1e-4

    def test_gradcheck(self, backend):
        for form in FORMATS:
            for border in ("zeros", "clamp"):
                x = random(1, 2, 3, 4, dtype=torch.float64, device=backend.device)
                x = x.contiguous(memory_format=form)

                def run(x, border=border):
                    return upsample_crop(
                        x, stride=3, kernel_size=5, offset=-1.3, size=(12, 9), border=border
                    )

                assert gradcheck(run, x.requires_grad_()) and gradgradcheck(run, x)

    def test_an_input_without_weight_takes_no_part(self, backend):
        on = {"device": backend.device}
        for form in FORMATS:
            x = torch.ones(1, 17, 4, 4, **on).contiguous(memory_format=form)
            x[:, :, 2, 2] = INF
            out = upsample_crop(x, stride=2, kernel_size=3, padding=1, size=(7, 7))
            assert not out.isnan().any()
            assert out.isinf().nonzero()[:9, 2:].min(0)[0].tolist() == [3, 3]
            assert int(out.isinf().sum()) == 9 * 17
            edge = torch.full((1, 3, 1, 1), INF, **on).contiguous(memory_format=form)
            out = upsample_crop(edge, stride=2, kernel_size=4, offset=-3, size=(12, 12))
            assert out.isinf().sum((2, 3)).tolist() == [[16, 16, 16]]
            assert not out.isnan().any()
            grad = torch.zeros(1, 17, 7, 7, **on).contiguous(memory_format=form)
            grad[:, :, 4, 4] = INF
            y = torch.ones(1, 17, 4, 4, **on).contiguous(memory_format=form).requires_grad_()
            upsample_crop(y, stride=2, kernel_size=3, padding=1, size=(7, 7)).backward(grad)
            assert int(y.grad.isinf().sum()) == 17 and not y.grad.isnan().any()


def every_function(x):
    """All three on one tensor, by name."""
    size = (2 * x.shape[2] + 3, 3 * x.shape[3])
    yield "bilinear", upsample_bilinear(x, size)
    yield "crop", upsample_crop(x, stride=3, kernel_size=6, offset=1, size=size)
    yield "fuse", fuse_sum_upsample([x, x[:, :, ::2, ::3]], size)


class TestEverything:
    @pytest.mark.small
    def test_layouts(self, backend):
        x = random(2, 5, 6, 7, device=backend.device)
        expected = dict(every_function(x))
        grads = {}
        for name, y in layouts(x):
            before = y.clone()
            for function, out in every_function(y):
                # Rows lie in another order: sums over channels_last rows round the same.
                assert same_bits(out, expected[function]), (name, function)
            assert torch.equal(y, before), name
        for function, out in every_function(x.requires_grad_()):
            for name, grad in layouts(random(*out.shape, seed=3, device=backend.device)):
                (own,) = torch.autograd.grad(out, x, grad, retain_graph=True)
                grads.setdefault(function, own)
                assert (own - grads[function]).abs().max() < 1e-5, (name, function)

    def test_expanded(self, backend):
        x = one_number((2, 20, 4, 5), device=backend.device)
        for name, out in every_function(x):
            assert same_bits(out, dict(every_function(x.contiguous()))[name]), name
        y = random(1, 3, 4, 5, device=backend.device).requires_grad_()
        upsample_bilinear(y, 20).sum().backward()  # the gradient is one number, expanded
        assert abs(float(y.grad.sum()) - 20 * 20 * 3) < 1e-2

    def test_empty_batch(self, backend):
        for dtype in (torch.float32, torch.float16):
            x = torch.zeros(0, 3, 4, 5, dtype=dtype, device=backend.device)
            for _, out in every_function(x.requires_grad_()):
                assert out.shape[:2] == (0, 3) and out.dtype == x.dtype
                out.sum().backward()
                assert x.grad.shape == x.shape

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_threads_and_runs(self, dtype, form):
        """Large enough for several tasks, forward and backward."""
        x = random(2, 21, 65, 90).to(dtype).contiguous(memory_format=form).requires_grad_()
        results = []
        for count in (1, 2, 4, 4):
            with threads(count):
                row = []
                for out in (
                    upsample_bilinear(x, (513, 700)),
                    upsample_crop(x, stride=8, kernel_size=16, offset=31, size=(400, 500)),
                    fuse_sum_upsample([x, x[:, :, :33, :45], x[:, :, :9, :12]], relu=True),
                ):
                    grad = random(*out.shape, seed=2).to(dtype).contiguous(memory_format=form)
                    row += [out.detach(), *torch.autograd.grad(out, x, grad)]
                results.append(row)
        for row in results[1:]:
            assert all(map(same_bits, row, results[0]))

    def test_an_image_alone_and_in_a_batch(self, backend):
        x = random(3, 5, 9, 11, device=backend.device).requires_grad_()
        for (_, out), *alone in zip(
            every_function(x), *(every_function(x[i : i + 1]) for i in range(3)), strict=True
        ):
            assert same_bits(out, torch.cat([own for _, own in alone]))

    def test_more_than_2_to_the_31_elements(self):
        """The last plane is right: offsets are held in 64 bits."""
        planes = 2**31 // (1024 * 2048) + 1
        x = torch.arange(4.0).view(1, 1, 2, 2).expand(1, planes, 2, 2).to(torch.float16)
        if _memory_gib() < 6:
            pytest.skip("needs 6 GiB of free memory")
        out = upsample_bilinear(x, (1024, 2048))
        assert out.numel() > 2**31
        one = upsample_bilinear(x[:, :1], (1024, 2048))
        assert torch.equal(out[:, -1:], one) and torch.equal(out[:, planes // 2], one[:, 0])


def _memory_gib():
    with open("/proc/meminfo") as info:
        (line,) = [line for line in info if line.startswith("MemAvailable")]
    return int(line.split()[1]) / 2**20


def test_filler():
    """FCN's surgery for all sizes, and the tent that a bilinear deconvolution needs."""
    for k in (1, 2, 3, 4, 5, 7, 16, 63, 64):
        factor = (k + 1) // 2
        center = factor - 1 if k % 2 else factor - 0.5
        row = 1 - (torch.arange(k, dtype=torch.float64) - center).abs() / factor
        dense = bilinear_filler(3, k, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                expected = torch.outer(row, row) if i == j else torch.zeros(k, k)
                assert torch.equal(dense[i, j], expected.double())
        grouped = bilinear_filler(3, k, groups=3, dtype=torch.float64)
        assert torch.equal(grouped[:, 0], dense[torch.arange(3), torch.arange(3)])
    assert bilinear_filler(1, (1, 4)).dtype == torch.get_default_dtype()
    assert bilinear_filler(4, 2, groups=2).shape == (4, 2, 2, 2)


def test_fractions_are_exact():
    x = random(1, 1, 5, 5, dtype=torch.float64)
    options = {"stride": 3, "kernel_size": 5, "size": 9}
    third = upsample_crop(x, offset=Fraction(1, 3), **options)
    assert (
        third - reference.upsample_crop(x, offset=Fraction(1, 3), **options)
    ).abs().max() < 1e-14
    assert same_bits(third, upsample_crop(x, offset=1 / 3, **options))
