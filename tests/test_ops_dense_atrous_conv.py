# SPDX-License-Identifier: Apache-2.0
"""The kernels of dense atrous convolution against torch's, whatever the dispatch rule takes."""

from __future__ import annotations

import pytest
import torch
from _ops import expansions, layouts, one_number, random, rms_error, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.functional import conv2d, pad
from torch.utils.flop_counter import FlopCounterMode

from pydense.ops import atrous_conv2d  # noqa: F401  loads the operators

OPS = torch.ops.pydense
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
# (batch, channels, height, width), outputs, kernel, dilation, padding (top, left, bottom, right):
# small, the published rates, rates of the map's size and beyond, one pixel, wide and high maps,
# odd kernels and pairs, without padding, much of it, of different sizes, 1x1.
CASES = [
    ((2, 5, 9, 11), 7, (3, 3), (2, 2), (2, 2, 2, 2)),
    ((1, 70, 33, 33), 37, (3, 3), (12, 12), (12, 12, 12, 12)),
    ((1, 33, 33, 33), 21, (3, 3), (18, 18), (18, 18, 18, 18)),
    ((2, 21, 7, 12), 3, (3, 3), (7, 7), (7, 7, 7, 7)),
    ((2, 3, 7, 12), 40, (3, 3), (40, 40), (40, 40, 40, 40)),
    ((3, 4, 1, 1), 5, (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 2, 3, 430), 4, (3, 3), (1, 200), (1, 200, 1, 200)),
    ((1, 2, 150, 3), 18, (3, 3), (60, 2), (60, 2, 60, 2)),
    ((1, 3, 40, 19), 2, (5, 2), (3, 4), (6, 2, 6, 2)),
    ((1, 18, 20, 21), 9, (1, 7), (5, 2), (0, 0, 0, 0)),
    ((2, 6, 5, 6), 16, (2, 3), (2, 2), (7, 0, 7, 0)),
    ((2, 6, 5, 6), 16, (4, 6), (2, 1), (1, 9, 6, 0)),
    ((1, 70, 6, 5), 33, (1, 1), (1, 1), (2, 2, 2, 2)),
    ((1, 600, 5, 4), 270, (3, 3), (2, 2), (2, 2, 2, 2)),
    ((1, 1, 9, 9), 1, (7, 7), (2, 3), (6, 9, 6, 9)),
]
# In units in the last place of the largest number. Of float64, torch itself is the reference.
FLOOR = {torch.float64: 512, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def dense(x, weight, bias, dilation, padding, relu=False, packed=None):
    top, left, bottom, right = padding
    height = x.shape[2] + top + bottom - dilation[0] * (weight.shape[2] - 1)
    width = x.shape[3] + left + right - dilation[1] * (weight.shape[3] - 1)
    return OPS.dense_atrous_conv2d(
        x, weight, packed, bias, height, width, *dilation, top, left, False, relu
    )


def torchs(x, weight, bias, dilation, padding):
    top, left, bottom, right = padding
    return conv2d(pad(x, (left, right, top, bottom)), weight, bias, dilation=dilation)


def problem(shape, outputs, kernel, dtype, form=FORMATS[0], seed=0, device="cpu"):
    x = random(*shape, seed=seed).to(device, dtype).contiguous(memory_format=form)
    scale = (shape[1] * kernel[0] * kernel[1]) ** -0.5
    weight = (scale * random(outputs, shape[1], *kernel, seed=seed + 1)).to(device, dtype)
    bias = random(outputs, seed=seed + 2).to(device, dtype)
    return x, weight.contiguous(memory_format=form), bias


def gradients(function, arguments, geometry, grad):
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in arguments
    ]
    out = function(*leaves, *geometry)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(shape, outputs, kernel, dilation, padding, dtype, form, seed=0, device="cpu", floor=None):
    """At most twice torch's own error on contiguous tensors, plus the floor."""
    geometry = (dilation, padding)
    arguments = problem(shape, outputs, kernel, dtype, form, seed, device)
    size = dense(*arguments, *geometry).shape
    grad = random(*size, seed=9).to(device, dtype).contiguous(memory_format=form)
    own = gradients(dense, arguments, geometry, grad)
    plain = [t.contiguous() for t in arguments]
    theirs = gradients(torchs, plain, geometry, grad.contiguous())
    exact = gradients(torchs, [t.double() for t in plain], geometry, grad.double())
    floor = FLOOR[dtype] * torch.finfo(dtype).eps if floor is None else floor
    for a, b, e in zip(own, theirs, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error, of_torch = (float((t.double() - e).abs().max()) for t in (a, b))
        assert error <= 2 * of_torch + floor * float(e.abs().max())
    if min(shape) > 1 and min(size) > 1:
        assert all(t.is_contiguous(memory_format=form) for t in own[:2])


class TestValues:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(self, case, dtype, form):
        check(*case, dtype, form)

    @settings(max_examples=100)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40)
        ),
        outputs=st.integers(1, 40),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        dilation=st.tuples(st.integers(1, 24), st.integers(1, 45)),
        padding=st.tuples(*[st.integers(0, 30)] * 4),
        dtype=st.sampled_from(DTYPES),
        last=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_any_shape(self, shape, outputs, kernel, dilation, padding, dtype, last, seed):
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        short = [max(0, r + 1 - n) for r, n in zip(reach, shape[2:], strict=True)]
        padding = (max(padding[0], short[0]), max(padding[1], short[1]), *padding[2:])
        check(shape, outputs, kernel, dilation, padding, dtype, FORMATS[last], seed)

    @pytest.mark.parametrize("form", FORMATS)
    def test_gradcheck(self, form):
        """First and second derivatives, also of uneven padding and kernels of two."""
        for kernel, dilation, padding in (
            ((3, 3), (2, 2), (2, 2, 2, 2)),
            ((2, 3), (3, 1), (1, 1, 2, 0)),
            ((1, 2), (1, 9), (0, 9, 0, 0)),
        ):
            arguments = problem((2, 3, 4, 5), 2, kernel, torch.float64, form)
            leaves = [t.requires_grad_() for t in arguments]

            def call(x, w, b, dilation=dilation, padding=padding):
                return dense(x, w, b, dilation, padding)

            assert gradcheck(call, leaves)
            assert gradgradcheck(call, leaves)

    def test_relu(self):
        for form in FORMATS:
            x, weight, bias = problem((2, 4, 9, 10), 6, (3, 3), torch.float32, form)
            x[0, 1, 3, 4] = float("nan")
            found = []
            for function in (
                lambda *leaves: dense(*leaves, (3, 3), (3, 3, 3, 3), relu=True),
                lambda *leaves: dense(*leaves, (3, 3), (3, 3, 3, 3)).relu(),
            ):
                leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
                out = function(*leaves)
                found.append([out.detach(), *torch.autograd.grad(out.nansum(), leaves)])
            assert found[0][0].isnan().sum() == 9 * 6
            for a, b in zip(*found, strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))

    def test_padding_is_not_multiplied(self):
        """Infinite weights meet the map alone; NaN reaches the outputs that read it, no others."""
        for form in FORMATS:
            x, weight, bias = problem((1, 3, 4, 5), 4, (3, 3), torch.float32, form)
            weight[:, :, 0] = float("inf")
            weight[:, :, 1, 0] = float("nan")
            out = dense(x, weight, bias, (5, 5), (5, 5, 5, 5))
            centre = weight[:, :, 1:2, 1:2].contiguous()
            assert torch.allclose(out, conv2d(x, centre, bias), atol=1e-6)
            x, weight, _ = problem((1, 3, 9, 40), 4, (3, 3), torch.float32, form)
            x[0, 1, 4, 17] = float("nan")
            own = dense(x, weight, None, (3, 3), (3, 3, 3, 3)).isnan()
            assert own.sum() == 9 * 4
            assert torch.equal(own, torchs(x, weight, None, (3, 3), (3, 3, 3, 3)).isnan())

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("channels", [512, 2048])
    def test_error_of_many_channels(self, channels, form):
        """Of float32: on average at most twice torch's, however many numbers a sum has."""
        arguments = problem((1, channels, 14, 15), 48, (3, 3), torch.float32, form)
        wide = problem((1, 48, 14, 15), channels, (3, 3), torch.float32, form)
        # The gradient of x is a sum over outputs: many of them, too.
        for x, weight, _ in (arguments, wide):
            geometry = ((4, 4), (4, 4, 4, 4))
            grad = random(1, weight.shape[0], 14, 15, seed=8)
            own = gradients(lambda *a: dense(*a[:2], None, *a[2:]), (x, weight), geometry, grad)
            exact, *theirs = (
                gradients(
                    lambda *a: torchs(*a[:2], None, *a[2:]),
                    [t.to(dtype).contiguous(memory_format=of) for t in (x, weight)],
                    geometry,
                    grad.to(dtype).contiguous(memory_format=of),
                )
                for dtype, of in [
                    (torch.float64, FORMATS[0]),
                    *((torch.float32, f) for f in FORMATS),
                ]
            )
            for i in range(2):
                best = min(rms_error(t[i], exact[i]) for t in theirs)
                floor = 2 * torch.finfo(torch.float32).eps
                assert rms_error(own[i], exact[i]) <= 2 * best + floor

    def test_outputs_without_taps(self):
        """Far in the padding there is the bias alone."""
        x, weight, bias = problem((1, 3, 2, 2), 4, (2, 2), torch.float32)
        out = dense(x, weight, bias, (1, 1), (20, 20, 20, 20))
        assert torch.equal(out[0, :, 3, 7], bias)
        assert not dense(x, weight, None, (1, 1), (20, 20, 20, 20))[0, :, 30].any()


class TestPromises:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layouts(self, dtype):
        """The same bits from every layout of everything."""
        x, weight, bias = problem((2, 5, 6, 7), 4, (3, 3), dtype)
        geometry = ((2, 2), (2, 2, 2, 2))
        grad = random(2, 4, 6, 7, seed=4).to(dtype)
        expected = gradients(dense, (x, weight, bias), geometry, grad)
        for (name, y), (_, w), (_, g) in zip(
            layouts(x), layouts(weight), layouts(grad), strict=True
        ):
            before = y.clone()
            assert same_bits(dense(y, w, bias, *geometry), expected[0]), name
            assert torch.equal(y, before), name
            leaves = [y.detach().requires_grad_(), w.detach().requires_grad_()]
            found = torch.autograd.grad(dense(*leaves, None, *geometry), leaves, g)
            assert same_bits(found[0], expected[1]) and same_bits(found[1], expected[2]), name
        one = one_number((2, 5, 6, 7)).to(dtype)
        assert same_bits(
            dense(one, weight, bias, *geometry), dense(one.contiguous(), weight, bias, *geometry)
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_expanded(self, dtype):
        """The same bits from maps that repeat numbers of theirs in memory."""
        x, weight, _ = problem((2, 37, 9, 11), 35, (3, 3), dtype)
        geometry = ((2, 2), (2, 2, 2, 2))
        grad = random(2, 35, 9, 11, seed=4).to(dtype)

        def all_of(own, of_out):
            leaves = [own.detach().requires_grad_(), weight.detach().requires_grad_()]
            out = dense(*leaves, None, *geometry)
            return [out.detach(), *torch.autograd.grad(out, leaves, of_out)]

        for (name, own), (_, of_out) in zip(expansions(x), expansions(grad), strict=True):
            for pair in ((own, grad), (x, of_out), (own, of_out)):
                expected = all_of(*(t.contiguous() for t in pair))
                assert all(map(same_bits, all_of(*pair), expected)), name

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_threads_and_runs(self, dtype, form):
        arguments = problem((2, 70, 30, 35), 40, (3, 3), dtype, form)
        grad = random(2, 40, 30, 35, seed=5).to(dtype)
        for rate in (1, 6):
            found = []
            for count in (1, 2, 3, 3):
                with threads(count):
                    geometry = ((rate, rate), (rate,) * 4)
                    found.append(gradients(dense, arguments, geometry, grad)[:3])
            for row in found[1:]:
                assert all(map(same_bits, row, found[0]))

    @pytest.mark.parametrize("form", FORMATS)
    def test_empty_batch(self, form):
        arguments = problem((0, 3, 4, 5), 6, (3, 3), torch.float32, form)
        found = gradients(dense, arguments, ((2, 2), (2, 2, 2, 2)), torch.zeros(0, 6, 4, 5))
        assert found[0].shape == (0, 6, 4, 5) and found[1].shape == (0, 3, 4, 5)
        assert not found[2].any() and found[2].shape == (6, 3, 3, 3)

    def test_opcheck(self):
        for form in FORMATS:
            x, weight, bias = (
                t.requires_grad_() for t in problem((2, 3, 5, 6), 4, (3, 3), torch.float32, form)
            )
            for own, relu in ((bias, True), (None, False)):
                opcheck(
                    OPS.dense_atrous_conv2d.default,
                    (x, weight, None, own, 5, 6, 2, 2, 2, 2, False, relu),
                )
            grad = random(2, 4, 5, 6).contiguous(memory_format=form).requires_grad_()
            opcheck(
                OPS.dense_atrous_conv2d.default,
                (grad, weight, None, None, 5, 6, 2, 2, 2, 2, True, False),
            )
            opcheck(OPS.dense_atrous_conv2d_weight_gradient.default, (grad, x, 3, 3, 2, 2, 2, 2))

    def test_flops(self):
        """As torch counts convolutions."""
        x, weight, bias = (
            t.requires_grad_() for t in problem((2, 3, 5, 6), 4, (3, 3), torch.float32)
        )
        counts = []
        for function in (dense, torchs):
            with FlopCounterMode(display=False) as counter:
                out = function(x, weight, bias, (2, 2), (2, 2, 2, 2))
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
            counts.append((counter.get_total_flops(), backward.get_total_flops()))
        assert counts[0][0] == counts[1][0] == 2 * 2 * 5 * 6 * 4 * 3 * 9
        assert counts[0][1] == 2 * counts[0][0]


class TestInto:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_slices(self, dtype):
        """A part of the channels of a picture of any format, and nothing else of it."""
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        for form in FORMATS:
            x, weight, bias = problem((2, 5, 9, 13), 21, (3, 3), dtype, form)
            scale = 1 + random(21, seed=7).to(sums)
            exact = torchs(x.double(), weight.double(), None, (4, 4), (4, 4, 4, 4))
            exact = (exact * scale[:, None, None] + bias.double()[:, None, None]).relu()
            for target in FORMATS:
                out = torch.full((2, 40, 9, 13), 7.0).to(dtype).contiguous(memory_format=target)
                OPS._dense_atrous_conv2d_branches_into(
                    x, [weight], [], [scale], [bias], out[:, 3:24], [4], True
                )
                bound = 8 * torch.finfo(dtype).eps * float(exact.abs().max())
                assert (out[:, 3:24].double() - exact).abs().max() <= bound
                assert (out[:, :3] == 7).all() and (out[:, 24:] == 7).all()

    def test_any_unit_stride(self):
        """Of columns that are not side by side, too."""
        x, weight, bias = problem((1, 4, 5, 6), 3, (3, 3), torch.float32)
        expected = dense(x, weight, bias, (2, 2), (2, 2, 2, 2))
        for out in (torch.zeros(1, 3, 6, 5).mT, torch.zeros(1, 6, 5, 12)[:, ::2, :, ::2]):
            OPS._dense_atrous_conv2d_branches_into(x, [weight], [], [], [bias], out, [2], False)
            assert same_bits(out, expected)

    def test_refused(self):
        x, weight, bias = problem((1, 4, 5, 6), 3, (3, 3), torch.float32)
        out = torch.zeros(1, 3, 5, 6)
        name = "_dense_atrous_conv2d_branches_into"
        for change, text in (
            ({5: out[:, :2]}, r"out must have shape \(1, 3, H', W'\), got \(1, 2, 5, 6\)"),
            ({5: out.double()}, "out must be of dtype Float, got Double"),
            ({5: out[:, :1].expand(1, 3, 5, 6)}, "out must have a stride along axis 1, got 0"),
            ({3: [bias[:2]]}, r"scale must have shape \(3\)"),
            ({3: [bias.half()]}, "scale must be of dtype Float, got Half"),
            ({2: [bias]}, "packed must be of dtype Byte, got Float"),
            ({6: [2, 2]}, "rates, .* must be as many as weights, got 2, 0, 0 and 1 for 1"),
            ({1: [weight[..., :2]]}, r"weights must have odd kernels, got \(3, 2\)"),
            ({5: out[..., :4]}, "out must have the size of x"),
        ):
            arguments = [x, [weight], [], [], [bias], out, [2], False]
            for i, value in change.items():
                arguments[i] = value
            with pytest.raises(ValueError, match=f"{name}: {text}"):
                OPS._dense_atrous_conv2d_branches_into(*arguments)


class TestPacked:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits(self, dtype, form):
        for shape, outputs, kernel, dilation, padding in CASES[::3]:
            x, weight, bias = problem(shape, outputs, kernel, dtype, form)
            packed = OPS._pack_dense_atrous_weight(weight, False)
            assert same_bits(
                dense(x, weight, bias, dilation, padding, packed=packed),
                dense(x, weight, bias, dilation, padding),
            )

    def test_something_else_is_refused(self):
        x, weight, _ = problem((1, 4, 5, 6), 3, (3, 3), torch.float32)
        packed = OPS._pack_dense_atrous_weight(weight, False)
        for other in (
            OPS._pack_dense_atrous_weight(weight, True),
            OPS._pack_dense_atrous_weight(weight.double(), False),
            OPS._pack_dense_atrous_weight(weight[:2], False),
            packed[:-1],
            packed[None],
            torch.zeros_like(packed),
        ):
            with pytest.raises(ValueError, match="dense_atrous_conv2d: packed must be what _pack"):
                dense(x, weight, None, (2, 2), (2, 2, 2, 2), packed=other)


def test_refused_by_the_kernels():
    x, weight, bias = problem((1, 3, 5, 6), 4, (3, 3), torch.float32)
    for change, text in (
        ({0: x[0]}, "x must have 4 dimensions"),
        ({0: x.int()}, "x must be of dtype Float, Double, BFloat16 or Half"),
        ({1: weight[:, :2]}, r"weight must have shape \(O, 3, kH, kW\)"),
        ({1: weight.double()}, "weight must be of dtype Float, got Double"),
        ({1: weight[:0], 3: None}, "channels and outputs must be at least 1, got 3 and 0"),
        ({3: bias[:2]}, r"bias must have shape \(4\)"),
        ({4: 0}, r"output size must be at least 1, got \(0, 6\)"),
        ({6: 0}, r"dilation must be in \[1, 2147483648\), got \(0, 2\)"),
        ({10: True}, r"weight must have shape \(3, O, kH, kW\)"),
    ):
        arguments = [x, weight, None, bias, 5, 6, 2, 2, 2, 2, False, False]
        for i, value in change.items():
            arguments[i] = value
        with pytest.raises(ValueError, match=f"dense_atrous_conv2d: {text}"):
            OPS.dense_atrous_conv2d(*arguments)
    run = OPS.dense_atrous_conv2d_weight_gradient
    name = "dense_atrous_conv2d_weight_gradient"
    with pytest.raises(ValueError, match=f"{name}: grad must have the batch of x, 1, got 2"):
        run(torch.zeros(2, 4, 5, 6), x, 3, 3, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{name}: kernel size must be at least 1"):
        run(torch.zeros(1, 4, 5, 6), x, 0, 3, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"{name}: grad must be of dtype Float, got Double"):
        run(torch.zeros(1, 4, 5, 6).double(), x, 3, 3, 1, 1, 1, 1)
