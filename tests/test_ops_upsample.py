# SPDX-License-Identifier: Apache-2.0
"""Upsampling: values and gradients against float64, torch's own operators and Caffe's."""

from __future__ import annotations

import re
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
    def test_against_torch(self, sizes, dtype, align_corners, form):
        c, h, w, height, width = sizes
        x = random(2, c, h, w).to(dtype).contiguous(memory_format=form)
        grad = random(2, c, height, width, seed=1).to(dtype).contiguous(memory_format=form)

        def run(function):
            return lambda x: function(x, (height, width), align_corners=align_corners)

        def torchs(x, size, align_corners):
            return interpolate(x, size=size, mode="bilinear", align_corners=align_corners)

        # torch's float64 takes the floor of a coordinate in float32: 1e-7 of a cell.
        floor = 1e-6 if dtype == torch.float64 else None
        within_budget(run(upsample_bilinear), run(torchs), x, grad, floor)
        out = upsample_bilinear(x, (height, width), align_corners=align_corners)
        assert out.stride() == torchs(x, (height, width), align_corners=align_corners).stride()

    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_against_the_reference(self, sizes, align_corners):
        c, h, w, height, width = sizes
        x = random(2, c, h, w, dtype=torch.float64)
        out = upsample_bilinear(x, (height, width), align_corners=align_corners)
        expected = reference.upsample_bilinear(x, (height, width), align_corners=align_corners)
        assert (out - expected).abs().max() < 1e-12

    @pytest.mark.parametrize("scale", [2, 2.7, 0.6, (1.31, 0.77), 1.05, (3, 1.02)])
    def test_given_scale_factor(self, scale):
        """It enters the formula: 10 rows times 1.31 are 13, a step of 1 / 1.31 and not 10 / 13."""
        for dtype in (torch.float32, torch.float64):
            x = random(2, 3, 10, 37, dtype=dtype)
            own = upsample_bilinear(x, scale_factor=scale)
            theirs = interpolate(x, scale_factor=scale, mode="bilinear")
            assert own.shape == theirs.shape and (own - theirs).abs().max() < 2e-6
            corners = upsample_bilinear(x, scale_factor=scale, align_corners=True)
            theirs = interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)
            assert (corners - theirs).abs().max() < 2e-6
        x = random(1, 1, 10, 1, dtype=torch.float64)
        stretched = upsample_bilinear(x, scale_factor=(1.31, 1))
        assert (stretched - upsample_bilinear(x, (13, 1))).abs().max() > 1e-3

    def test_coordinates_are_torchs(self):
        """On a ramp the output is the coordinate: the same bits, where torch's kernels have fma."""
        if _core.cpu_capability() == "baseline":
            pytest.skip("torch fuses the half-pixel formula only where the CPU has fma")
        for n, out in ((65, 513), (128, 513), (37, 100), (500, 333), (129, 1000)):
            eye = torch.eye(n).view(n, 1, 1, n).expand(n, 1, 2, n).contiguous()
            for corners in (False, True):
                own = upsample_bilinear(eye, (2, out), align_corners=corners)
                theirs = interpolate(eye, size=(2, out), mode="bilinear", align_corners=corners)
                assert torch.equal(own, theirs)

    def test_gradcheck(self):
        for form in FORMATS:
            for shape, size in (((2, 3, 3, 4), (7, 5)), ((1, 2, 5, 6), (3, 9))):
                x = random(*shape, dtype=torch.float64).contiguous(memory_format=form)
                x.requires_grad_()
                for corners in (False, True):

                    def run(x, size=size, corners=corners):
                        return upsample_bilinear(x, size, align_corners=corners)

                    assert gradcheck(run, x) and gradgradcheck(run, x)

    def test_not_finite(self):
        """w0 a + w1 b: an infinity reaches its cells, with a weight of 0 as NaN, as in torch."""
        for form in FORMATS:
            for bad in (NAN, INF, -INF):
                x = random(1, 20, 6, 7).contiguous(memory_format=form)
                x[0, 2, 3, 4] = bad
                for size in ((12, 14), (6, 14), (11, 13)):
                    own = upsample_bilinear(x, size, align_corners=True)
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
    def test_against_deconvolution(self, case, dtype, form):
        stride, kernel, padding, offset, shape, size = case
        x = random(2, 5, *shape).to(dtype).contiguous(memory_format=form)
        grad = random(2, 5, *size, seed=1).to(dtype).contiguous(memory_format=form)

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
    def test_any_crop(self, stride, odd, padding, offset, shape, size, channels, last, border):
        options = {
            "stride": stride,
            "kernel_size": tuple(2 * s - odd for s in stride),
            "padding": padding,
            "offset": offset,
            "size": size,
            "border": border,
        }
        x = random(2, channels, *shape, dtype=torch.float64).requires_grad_()
        y = x.contiguous(memory_format=torch.channels_last) if last else x
        out, expected = upsample_crop(y, **options), reference.upsample_crop(x, **options)
        assert out.shape == expected.shape and (out - expected).abs().max() < 1e-12
        grad = random(*out.shape, seed=1, dtype=torch.float64)
        (own,) = torch.autograd.grad(out, x, grad)
        (theirs,) = torch.autograd.grad(expected, x, grad)
        assert (own - theirs).abs().max() < 1e-11
        single = upsample_crop(y.detach().float(), **options)
        assert (single - expected).abs().max() < 1e-5

    def test_exact_at_any_size(self):
        """Where an output lies is decided in integers: no float32 coordinate could do this."""
        n = 70_001
        x = torch.arange(2 * n, dtype=torch.float32).remainder(251).view(1, 2, 1, n)
        out = upsample_crop(
            x, stride=(1, 3), kernel_size=(1, 5), offset=(0, 2), size=(1, 3 * n - 2)
        )
        assert torch.equal(out[..., ::3], x)
        third = (2 * x[..., :-1].double() + x[..., 1:]) / 3
        assert (out[..., 1::3] - third).abs().max() < 1e-4

    def test_gradcheck(self):
        for form in FORMATS:
            for border in ("zeros", "clamp"):
                x = random(1, 2, 3, 4, dtype=torch.float64).contiguous(memory_format=form)

                def run(x, border=border):
                    return upsample_crop(
                        x, stride=3, kernel_size=5, offset=-1.3, size=(12, 9), border=border
                    )

                assert gradcheck(run, x.requires_grad_()) and gradgradcheck(run, x)

    def test_an_input_without_weight_takes_no_part(self):
        for form in FORMATS:
            x = torch.ones(1, 17, 4, 4).contiguous(memory_format=form)
            x[:, :, 2, 2] = INF
            out = upsample_crop(x, stride=2, kernel_size=3, padding=1, size=(7, 7))
            assert not out.isnan().any()
            assert torch.equal(out.isinf().nonzero()[:9, 2:].min(0)[0], torch.tensor([3, 3]))
            assert int(out.isinf().sum()) == 9 * 17
            edge = torch.full((1, 3, 1, 1), INF).contiguous(memory_format=form)
            out = upsample_crop(edge, stride=2, kernel_size=4, offset=-3, size=(12, 12))
            assert torch.equal(out.isinf().sum((2, 3)), torch.full((1, 3), 16))
            assert not out.isnan().any()
            grad = torch.zeros(1, 17, 7, 7).contiguous(memory_format=form)
            grad[:, :, 4, 4] = INF
            y = torch.ones(1, 17, 4, 4).contiguous(memory_format=form).requires_grad_()
            upsample_crop(y, stride=2, kernel_size=3, padding=1, size=(7, 7)).backward(grad)
            assert int(y.grad.isinf().sum()) == 17 and not y.grad.isnan().any()


SHAPES = [  # sizes of the maps; the output has the first one's
    [(32, 24), (16, 12), (8, 6), (4, 3)],
    [(9, 7), (9, 7), (5, 3)],
    [(12, 40), (12, 20), (5, 40)],
    [(6, 6)],
    [(5, 5), (11, 9), (5, 5), (1, 1), (5, 5)],
]


class TestFuse:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("mode", ["bilinear", "corners", "nearest"])
    @pytest.mark.parametrize("shapes", SHAPES)
    def test_against_torch(self, shapes, mode, relu, dtype, form):
        maps = [
            random(2, 18, *shape, seed=i).to(dtype).contiguous(memory_format=form)
            for i, shape in enumerate(shapes)
        ]
        size, corners = shapes[0], mode == "corners"
        kind = "nearest" if mode == "nearest" else "bilinear"
        options = {"align_corners": corners} if kind == "bilinear" else {}

        def own(maps):
            return fuse_sum_upsample(maps, size, relu, corners, kind)

        def torchs(maps):
            total = 0
            for x in maps:
                same = tuple(x.shape[2:]) == size
                total = total + (x if same else interpolate(x, size, mode=kind, **options))
            return total.relu() if relu else total

        grad = random(2, 18, *size, seed=9).to(dtype).contiguous(memory_format=form)
        results = {}
        for name, run, kind_of in (
            ("exact", torchs, torch.float64),
            ("torch", torchs, dtype),
            ("own", own, dtype),
        ):
            leaves = [x.to(kind_of).detach().clone().requires_grad_() for x in maps]
            out = run(leaves)
            # The mask of the ReLU is a rounding away from being another one.
            safe = torch.where(torchs([x.double() for x in maps]).abs() < 0.1, 0, grad.double())
            out.backward((safe if relu else grad).to(kind_of))
            results[name] = [out.detach(), *[x.grad for x in leaves]]
        eps = torch.finfo(dtype).eps
        for exact, theirs, mine in zip(*results.values(), strict=True):
            own_error = float((mine.double() - exact).abs().max())
            torch_error = float((theirs.double() - exact).abs().max())
            floor = 1e-6 if dtype == torch.float64 else 2 * eps
            assert own_error <= 2 * torch_error + floor
        assert results["own"][0].is_contiguous(memory_format=form)

    @pytest.mark.parametrize("mode", ["bilinear", "nearest"])
    def test_against_the_reference(self, mode):
        maps = [random(1, 3, *shape, dtype=torch.float64) for shape in SHAPES[4]]
        for relu in (False, True):
            out = fuse_sum_upsample(maps, 20, relu, mode=mode)
            expected = reference.fuse_sum_upsample(maps, 20, relu, mode=mode)
            assert (out - expected).abs().max() < 1e-12

    def test_nearest_is_torchs(self):
        """The same index everywhere, also where the product of step and index is rounded."""
        for n in range(1, 40):
            x = torch.arange(n, dtype=torch.float32).view(1, 1, 1, n)
            for out in range(1, 130, 3):
                own = fuse_sum_upsample([x], (1, out), mode="nearest")
                assert torch.equal(own, interpolate(x, size=(1, out), mode="nearest"))

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("relu", [False, True])
    def test_gradcheck(self, relu, form):
        maps = [
            random(1, 2, *shape, seed=i, dtype=torch.float64)
            .contiguous(memory_format=form)
            .requires_grad_()
            for i, shape in enumerate([(6, 5), (3, 3), (6, 5), (2, 5)])
        ]

        def run(*maps):
            return fuse_sum_upsample(list(maps), relu=relu)

        assert gradcheck(run, maps) and gradgradcheck(run, maps)

    def test_gradients_that_nobody_wants(self):
        maps = [random(1, 2, 4, 4), random(1, 2, 2, 2), random(1, 2, 4, 4)]
        for wanted in ([0], [1], [2], [0, 2], [1, 2]):
            for relu in (False, True):
                leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(maps)]
                fuse_sum_upsample(leaves, relu=relu).sum().backward()
                assert [x.grad is not None for x in leaves] == [i in wanted for i in range(3)]

    def test_nan_passes_the_relu(self):
        x = torch.tensor([[[[NAN, -1.0, 2.0, INF]]]]).expand(1, 3, 1, 4)
        out = fuse_sum_upsample([x, torch.zeros(1, 3, 1, 2)], relu=True)
        assert torch.equal(out.nan_to_num(9.0, INF), torch.tensor([9.0, 0, 2, INF]).expand_as(out))


def every_function(x):
    """All three on one tensor, by name."""
    size = (2 * x.shape[2] + 3, 3 * x.shape[3])
    yield "bilinear", upsample_bilinear(x, size)
    yield "crop", upsample_crop(x, stride=3, kernel_size=6, offset=1, size=size)
    yield "fuse", fuse_sum_upsample([x, x[:, :, ::2, ::3]], size)


class TestEverything:
    def test_layouts(self):
        x = random(2, 5, 6, 7)
        expected = dict(every_function(x))
        grads = {}
        for name, y in layouts(x):
            before = y.clone()
            for function, out in every_function(y):
                # Rows lie in another order: sums over channels_last rows round the same.
                assert same_bits(out, expected[function]), (name, function)
            assert torch.equal(y, before), name
        for function, out in every_function(x.requires_grad_()):
            for name, grad in layouts(random(*out.shape, seed=3)):
                (own,) = torch.autograd.grad(out, x, grad, retain_graph=True)
                grads.setdefault(function, own)
                assert (own - grads[function]).abs().max() < 1e-5, (name, function)

    def test_expanded(self):
        x = one_number((2, 20, 4, 5))
        for name, out in every_function(x):
            assert same_bits(out, dict(every_function(x.contiguous()))[name]), name
        y = random(1, 3, 4, 5).requires_grad_()
        upsample_bilinear(y, 20).sum().backward()  # the gradient is one number, expanded
        assert abs(float(y.grad.sum()) - 20 * 20 * 3) < 1e-2

    def test_empty_batch(self):
        for x in (torch.zeros(0, 3, 4, 5), torch.zeros(0, 3, 4, 5, dtype=torch.float16)):
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

    def test_an_image_alone_and_in_a_batch(self):
        x = random(3, 5, 9, 11).requires_grad_()
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


X = torch.zeros(1, 2, 3, 4)
CROP = {"stride": 2, "kernel_size": 4, "size": 5}


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: upsample_bilinear(None, 3), TypeError, "x must be a tensor, got None"),
        (lambda: upsample_bilinear(X.int(), 3), TypeError, "x must be of dtype float32, float64"),
        (lambda: upsample_bilinear(X[0], 3), ValueError, "x must have a shape out of (N, C, H, W)"),
        (lambda: upsample_bilinear(X[:, :0], 3), ValueError, "with C >= 1, got (1, 0, 3, 4)"),
        (lambda: upsample_bilinear(X[..., :0], 3), ValueError, "x must have H and W >= 1, got"),
        (lambda: upsample_bilinear(X), ValueError, "one of size and scale_factor must be given"),
        (lambda: upsample_bilinear(X, 3, 2.0), ValueError, "one of size and scale_factor must"),
        (lambda: upsample_bilinear(X, 0), ValueError, "size must be at least 1, got 0"),
        (
            lambda: upsample_bilinear(X, 2**40),
            ValueError,
            "size must be in [1, 2147483647], got (10",
        ),
        (lambda: upsample_bilinear(X, (3,)), ValueError, "size must be a number or (y, x), got"),
        (lambda: upsample_bilinear(X, 2.5), TypeError, "size must hold integers, got 2.5"),
        (lambda: upsample_bilinear(X, True), TypeError, "size must hold integers, got True"),
        (lambda: upsample_bilinear(X, scale_factor=0.0), ValueError, "must be positive and finite"),
        (lambda: upsample_bilinear(X, scale_factor=NAN), ValueError, "must be positive and finite"),
        (lambda: upsample_bilinear(X, scale_factor=0.1), ValueError, "must give a size that must"),
        (lambda: upsample_bilinear(X, scale_factor="2"), TypeError, "must hold real numbers"),
        (lambda: upsample_bilinear(X, 3, align_corners=1), TypeError, "must be a bool, got int"),
        (lambda: upsample_bilinear(X.to("meta"), 3), NotImplementedError, "must be on the CPU"),
        (lambda: upsample_crop(X, **{**CROP, "kernel_size": 5}), ValueError, "must be 2 * stride"),
        (lambda: upsample_crop(X, **{**CROP, "stride": 0}), ValueError, "stride must be in [1, "),
        (lambda: upsample_crop(X, **{**CROP, "stride": 1.5}), TypeError, "must be an integer"),
        (lambda: upsample_crop(X, **CROP, padding=-1), ValueError, "padding must be in [0, "),
        (lambda: upsample_crop(X, **CROP, offset=INF), ValueError, "offset must be finite, got"),
        (lambda: upsample_crop(X, **CROP, offset=1e13), ValueError, "offset must be within"),
        (lambda: upsample_crop(X, **CROP, offset="1"), TypeError, "offset must hold real numbers"),
        (lambda: upsample_crop(X, **CROP, border="wrap"), ValueError, "'zeros', 'clamp', got"),
        (lambda: fuse_sum_upsample(X), TypeError, "inputs must be a sequence of tensors, got"),
        (lambda: fuse_sum_upsample([]), ValueError, "inputs must be 1 to 16 tensors, got 0"),
        (lambda: fuse_sum_upsample([X] * 17), ValueError, "inputs must be 1 to 16 tensors, got 17"),
        (lambda: fuse_sum_upsample([X, X.half()]), TypeError, "inputs[1] must be of dtype"),
        (lambda: fuse_sum_upsample([X, X[:, :1]]), ValueError, "inputs[1] must have shape (1, 2,"),
        (lambda: fuse_sum_upsample([X], mode="area"), ValueError, "mode must be one of"),
        (lambda: fuse_sum_upsample([X], 3, False, True, "nearest"), ValueError, "must be False"),
        (lambda: bilinear_filler(0, 4), ValueError, "channels must be in [1, "),
        (lambda: bilinear_filler(4, 4, groups=3), ValueError, "groups must divide channels = 4"),
    ],
)
def test_bad_arguments(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_bad_arguments_of_the_operators():
    """What Python cannot pass wrongly, C++ callers can."""
    ops = torch.ops.pydense
    for call, text in (
        (lambda: ops.upsample_bilinear(X, 0, 3, False, 0.0, 0.0), "size must be in"),
        (lambda: ops.upsample_bilinear(X[0], 3, 3, False, 0.0, 0.0), "4 dimensions"),
        (lambda: ops.upsample_bilinear(X.int(), 3, 3, False, 0.0, 0.0), "must be of dtype"),
        (lambda: ops.upsample_bilinear_backward(X, 0, 3, False, 0.0, 0.0), "must be in [1, "),
        (lambda: ops.upsample_crop(X, 3, 3, 0, 1, 0.0, 0.0, "zeros"), "stride must be in"),
        (lambda: ops.upsample_crop(X, 3, 3, 1, 1, NAN, 0.0, "zeros"), "offset must be within"),
        (lambda: ops.upsample_crop(X, 3, 3, 1, 1, 0.0, 0.0, "wrap"), "border must be"),
        (lambda: ops.fuse_sum_upsample([X], 3, 3, "area", False, False), "mode must be"),
        (
            lambda: ops.fuse_sum_upsample_backward(X, None, [3, 3], [4, 4], "nearest", False),
            "at most one gradient",
        ),
        (
            lambda: ops.fuse_sum_upsample_backward(X, X[..., 1:], [1], [1], "nearest", False),
            "out must have the shape of grad",
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(text)):
            call()


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
