# SPDX-License-Identifier: Apache-2.0
"""Atrous convolution against torch's: values, gradients, layouts, the choice of kernels."""

from __future__ import annotations

import re

import _backends
import pytest
import torch
from _ops import layouts, one_number, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import pydense
from pydense import reference
from pydense.ops import atrous_conv2d

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
# (batch, channels, height, width), kernel, options: small, the published rates, rates of the map's
# size and beyond, one pixel, wide rows, odd kernels and pairs, without padding, much of it.
CASES = [
    ((2, 5, 9, 11), (3, 3), {"dilation": 2}),
    ((1, 37, 33, 41), (3, 3), {"dilation": 12}),
    ((2, 21, 7, 12), (3, 3), {"dilation": 7}),
    ((2, 3, 7, 12), (3, 3), {"dilation": 40}),
    ((3, 4, 1, 1), (3, 3), {"dilation": 1}),
    ((1, 2, 3, 1030), (3, 3), {"dilation": (1, 600)}),
    ((1, 3, 40, 19), (5, 2), {"dilation": (3, 4)}),
    ((1, 18, 20, 21), (1, 7), {"dilation": (5, 2), "padding": "valid"}),
    ((2, 6, 5, 6), (2, 3), {"dilation": 2, "padding": (7, 0)}),
    ((1, 70, 6, 5), (1, 1), {"padding": 2}),
]
# In units in the last place of the largest number. Of float64, torch itself is the reference; a
# weight's gradient is one sum over all pixels.
FLOOR = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def problem(shape, kernel, dtype, form=FORMATS[0], seed=0, device="cpu"):
    x = random(*shape, seed=seed).to(device, dtype).contiguous(memory_format=form)
    scale = (kernel[0] * kernel[1]) ** -0.5
    weight = (scale * random(shape[1], 1, *kernel, seed=seed + 1)).to(device, dtype)
    return x, weight, random(shape[1], seed=seed + 2).to(device, dtype)


def gradients(function, arguments, options, seed=9):
    """Output and gradients of everything, for a gradient in the output's own format."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in arguments
    ]
    out = function(*leaves, groups=arguments[0].shape[1], **options)
    form = torch.channels_last if not out.is_contiguous() else torch.contiguous_format
    grad = random(*out.shape, seed=seed).to(out.device, arguments[1].dtype).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad.contiguous(memory_format=form))
    return [out.detach(), *grads]


def check(shape, kernel, options, dtype, form, seed=0, device="cpu"):
    """At most twice torch's own error on contiguous tensors, plus the floor."""
    arguments = problem(shape, kernel, dtype, form, seed, device)
    own = gradients(atrous_conv2d, arguments, options)
    plain = [t.contiguous() for t in arguments]
    theirs = gradients(reference.atrous_conv2d, plain, options)
    # The gradient that the outputs get is a rounded one.
    wide = [t.double() for t in plain]
    leaves = [t.requires_grad_() for t in wide]
    out = reference.atrous_conv2d(*leaves, groups=shape[1], **options)
    grad = random(*out.shape, seed=9).to(device, dtype).double()
    exact = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    for a, b, e in zip(own, theirs, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error, torchs = (float((t.double() - e).abs().max()) for t in (a, b))
        assert error <= 2 * torchs + floor * float(e.abs().max())
    if min(shape) > 1 and min(own[0].shape) > 1:
        assert all(t.is_contiguous(memory_format=form) for t in own[:2])


class TestDepthwise:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(self, case, dtype, form, backend):
        check(*case, dtype, form, device=backend.device)

    @settings(max_examples=50)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40)
        ),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        dilation=st.tuples(st.integers(1, 24), st.integers(1, 45)),
        padding=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)),
        activation=st.sampled_from([None, "relu"]),
        dtype=st.sampled_from(DTYPES),
        last=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_any_shape(
        self, shape, kernel, dilation, padding, activation, dtype, last, seed, backend
    ):
        options = {"dilation": dilation, "padding": "same", "activation": activation}
        if padding is not None:
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            short = [max(0, r + 1 - n) for r, n in zip(reach, shape[2:], strict=True)]
            options["padding"] = tuple(
                max(p, (s + 1) // 2) for p, s in zip(padding, short, strict=True)
            )
        if activation:  # where rounding decides about a gradient, values alone
            arguments = problem(shape, kernel, dtype, FORMATS[last], seed, backend.device)
            options = {**options, "groups": shape[1]}
            plain = atrous_conv2d(*arguments, **{**options, "activation": None})
            assert torch.equal(atrous_conv2d(*arguments, **options), plain.relu())
        else:
            check(shape, kernel, options, dtype, FORMATS[last], seed, backend.device)

    @pytest.mark.parametrize("form", FORMATS)
    def test_gradcheck(self, form, backend):
        """First and second derivatives, also of the padding's and the kernel's odd forms."""
        for kernel, options in (
            ((3, 3), {"dilation": 2}),
            ((2, 3), {"dilation": (2, 1), "padding": (3, 0)}),
            ((3, 2), {"dilation": 4, "activation": "relu"}),
        ):
            leaves = [
                t.clone(memory_format=torch.preserve_format).requires_grad_()
                for t in problem((2, 2, 4, 5), kernel, torch.float64, form, device=backend.device)
            ]

            def run(x, weight, bias, options=options):
                return atrous_conv2d(x, weight, bias, groups=2, **options)

            assert gradcheck(run, leaves)
            assert gradgradcheck(run, leaves, fast_mode=backend.is_cuda_code)

    @pytest.mark.parametrize("needed", range(1, 8))
    def test_some_gradients_alone(self, needed, backend):
        arguments = problem((2, 3, 6, 7), (3, 3), torch.float64, device=backend.device)
        everything = gradients(atrous_conv2d, arguments, {"dilation": 2})
        for i, leaf in enumerate(arguments):
            leaf.requires_grad_(bool(needed >> i & 1))
        out = atrous_conv2d(*arguments, dilation=2, groups=3)
        out.backward(random(*out.shape, seed=9, device=backend.device).double())
        for i, leaf in enumerate(arguments):
            assert (leaf.grad is not None) == bool(needed >> i & 1)
            if leaf.grad is not None:
                assert same_bits(leaf.grad, everything[1 + i])

    def test_activation(self, backend):
        """As torch's relu, NaN and gradient included."""
        x, weight, bias = problem((2, 4, 9, 10), (3, 3), torch.float32, device=backend.device)
        x[0, 1, 3, 4] = float("nan")
        found = []
        for function in (
            lambda x: atrous_conv2d(x, weight, bias, dilation=3, groups=4, activation="relu"),
            lambda x: atrous_conv2d(x, weight, bias, dilation=3, groups=4).relu(),
        ):
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
            found.append((out.detach(), grad))
        (a, b), (c, d) = found
        assert torch.equal(a.nan_to_num(7), c.nan_to_num(7)) and same_bits(b, d)

    def test_padding_is_not_multiplied(self, backend):
        """Infinite weights meet the map alone; NaN reaches the outputs that read it, no others."""
        for form in FORMATS:
            place = {"form": form, "device": backend.device}
            x, weight, _ = problem((1, 3, 4, 5), (3, 3), torch.float32, **place)
            weight[:, :, 0] = float("inf")
            weight[:, :, 1, 0] = float("nan")
            out = atrous_conv2d(x, weight, dilation=5, groups=3)
            assert torch.allclose(out, x * weight[:, 0, 1, 1][:, None, None])
            x, weight, _ = problem((1, 3, 9, 40), (3, 3), torch.float32, **place)
            x[0, 1, 4, 17] = float("nan")
            own = atrous_conv2d(x, weight, dilation=3, groups=3).isnan()
            assert own.sum() == 9
            assert torch.equal(
                own, reference.atrous_conv2d(x, weight, dilation=3, groups=3).isnan()
            )

    def test_infinities_in_weight_gradients(self, backend):
        """What no tap reads is not multiplied: neither a gradient's, nor a row of x."""
        for form in FORMATS:
            place = {"form": form, "device": backend.device}
            x, weight, _ = problem((1, 4, 8, 9), (3, 3), torch.float32, **place)
            out = atrous_conv2d(x, weight.requires_grad_(), dilation=6, groups=4)
            grad = torch.ones_like(out)
            grad[:, :, 0, 0] = float("inf")  # whose upper and left taps lie beside the map
            (own,) = torch.autograd.grad(out, weight, grad)
            assert not own[:, 0, 0].isnan().any() and not own[:, 0, :, 0].isnan().any()
            assert own[:, 0, 1:, 1:].isinf().all()
            x[:, :, 7] = float("inf")
            out = atrous_conv2d(x, weight, dilation=6, groups=4)
            (own,) = torch.autograd.grad(out, weight, torch.ones_like(out))
            assert own[:, 0, 0].isfinite().all()  # the uppermost taps read two rows


class TestPromises:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layouts(self, dtype, backend):
        """The same bits from every layout, where there is fused multiply-add or none."""
        x, weight, bias = problem((2, 5, 6, 7), (3, 3), dtype, device=backend.device)
        expected = atrous_conv2d(x, weight, bias, dilation=2, groups=5)
        for (name, y), (_, w) in zip(layouts(x), layouts(weight), strict=True):
            before = y.clone()
            assert same_bits(atrous_conv2d(y, w, bias, dilation=2, groups=5), expected), name
            assert torch.equal(y, before), name
            leaf = weight.detach().requires_grad_()
            grads = []
            for _, g in layouts(random(2, 5, 6, 7, seed=4).to(backend.device, dtype)):
                out = atrous_conv2d(y.detach().requires_grad_(), leaf, dilation=2, groups=5)
                grads.append(torch.autograd.grad(out, leaf, g)[0])
            assert all(same_bits(own, grads[0]) for own in grads), name
        one = one_number((2, 5, 6, 7), device=backend.device).to(dtype)
        assert same_bits(
            atrous_conv2d(one, weight, groups=5), atrous_conv2d(one.contiguous(), weight, groups=5)
        )

    def test_empty_batch(self, backend):
        for form in FORMATS:
            place = {"form": form, "device": backend.device}
            arguments = problem((0, 3, 4, 5), (3, 3), torch.float32, **place)
            found = gradients(atrous_conv2d, arguments, {"dilation": 2})
            assert found[0].shape == found[1].shape == (0, 3, 4, 5)
            assert not found[2].any() and found[2].shape == (3, 1, 3, 3)

    @pytest.mark.parametrize("name", ["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
    @pytest.mark.parametrize("form", FORMATS)
    def test_bits_of_the_cpu(self, form, name):
        """Forward and the gradient of x, where the CPU has fused multiply-add."""
        if reason := _backends.missing(name):
            pytest.skip(reason)
        if torch.ops.pydense._cpu_capability() == "baseline":
            pytest.skip("no fused multiply-add")
        for dtype in DTYPES:
            for kernel in ((3, 3), (2, 4)):
                found = []
                for place in ("cpu", name):
                    with _backends.use(place) as backend:
                        x, weight, bias = problem(
                            (2, 12, 13, 17), kernel, dtype, form, device=backend.device
                        )
                        out = atrous_conv2d(
                            x.requires_grad_(), weight, bias, dilation=(2, 5), padding=8, groups=12
                        )
                        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
                        found.append((out.detach().cpu(), grad.cpu()))
                assert all(map(same_bits, *found))

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_threads_and_runs(self, dtype, form):
        arguments = problem((2, 40, 70, 90), (3, 3), dtype, form)
        found = []
        for count in (1, 2, 4, 4):
            with threads(count):
                found.append(gradients(atrous_conv2d, arguments, {"dilation": 12})[:3])
        for row in found[1:]:
            assert all(map(same_bits, row, found[0]))

    def test_bands_of_a_large_plane(self):
        """A plane that several tasks share, whatever the threads."""
        x, weight, _ = problem((1, 1, 700, 800), (3, 3), torch.float32)
        exact = reference.atrous_conv2d(x.double(), weight.double(), dilation=(9, 70))
        for count in (1, 3):
            with threads(count):
                out = atrous_conv2d(x, weight, dilation=(9, 70))
            assert (out - exact).abs().max() < 1e-5

    def test_what_is_saved_for_backward(self):
        def saved(x, weight, **options):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.append(t.data_ptr()) or t, lambda t: t
            ):
                out = atrous_conv2d(x, weight, groups=3, **options)
            names = {x.data_ptr(): "x", weight.data_ptr(): "weight", out.data_ptr(): "out"}
            return [names[place] for place in kept]

        x, weight, _ = problem((1, 3, 6, 7), (3, 3), torch.float32)
        assert saved(x, weight) == []
        assert saved(x.requires_grad_(), weight) == ["weight"]
        assert saved(x, weight.requires_grad_()) == ["x", "weight"]
        assert saved(x.requires_grad_(False), weight, activation="relu") == ["x", "out"]
        with torch.no_grad():
            assert saved(x, weight) == []

    def test_tangents_raise(self):
        x, weight, _ = problem((1, 3, 4, 5), (3, 3), torch.float64)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="atrous_conv2d: x must have no tangent"):
                atrous_conv2d(dual, weight, groups=3)


class TestChoice:
    """What the rule leaves to torch is its convolution; the rule: test_ops_atrous_dispatch.py."""

    @pytest.mark.parametrize(
        ("shape", "outputs", "kernel", "options", "words"),
        [
            ((2, 4, 9, 8), 6, (3, 3), {"dilation": 3}, "it has rate 3 and 4 channels"),
            ((2, 4, 9, 8), 6, (2, 3), {"dilation": (3, 1)}, "it has rate 3 and 4 channels"),
            ((2, 4, 9, 8), 8, (3, 3), {"groups": 4}, "it is grouped"),
            ((2, 4, 9, 8), 4, (3, 3), {"groups": 2, "padding": 0}, "it is grouped"),
            (
                (2, 4, 9, 8),
                4,
                (3, 3),
                {"groups": 4, "stride": 2, "padding": 1},
                r"its stride is \(2, 2\)",
            ),
            ((2, 4, 9, 8), 4, (3, 3), {"stride": (1, 3), "padding": "valid"}, "its stride is"),
        ],
    )
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_torchs(self, shape, outputs, kernel, options, words, activation):
        x = random(*shape)
        weight = random(outputs, shape[1] // options.get("groups", 1), *kernel, seed=1)
        bias = random(outputs, seed=2)
        options = {**options, "activation": activation}
        own = atrous_conv2d(x, weight, bias, **options)
        theirs = reference.atrous_conv2d(x, weight, bias, **options)
        assert torch.allclose(own, theirs, atol=1e-6)
        said = pydense.explain("atrous_conv2d", x, weight, bias=bias, **options)
        assert said.startswith("torch's convolution: ")
        assert re.search(words, said)

    def test_explain(self):
        x, weight, bias = problem((1, 3, 4, 5), (3, 3), torch.float32)
        said = pydense.explain("atrous_conv2d", x, weight, bias, dilation=2, groups=3)
        assert said.startswith("pydense's depthwise kernels: it is depthwise (groups = C = O)")
        on_meta = pydense.explain("atrous_conv2d", x.to("meta"), weight.to("meta"), groups=3)
        assert on_meta.startswith("torch's convolution: x is on meta")
        assert atrous_conv2d(x.to("meta"), weight.to("meta"), groups=3).shape == x.shape
        with pytest.raises(ValueError, match="explain: op must be one of 'atrous_conv2d', got 'x'"):
            pydense.explain("x")

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"x": 3}, TypeError, "x must be a tensor, got"),
            ({"x": torch.zeros(1, 2, 3)}, ValueError, "x must have a shape out of"),
            ({"x": torch.zeros(1, 2, 3, 4).int()}, TypeError, "x must be of dtype"),
            ({"weight": torch.zeros(2, 3)}, ValueError, r"weight must have shape \(O, C / groups"),
            (
                {"weight": torch.zeros(2, 2, 3, 3)},
                ValueError,
                r"weight must have shape \(O, 2 / gr",
            ),
            ({"weight": torch.zeros(3, 1, 3, 3)}, ValueError, r".* O divisible by groups = 2, got"),
            ({"weight": torch.zeros(2, 1, 3, 3).half()}, TypeError, "weight must be of dtype"),
            (
                {"weight": torch.zeros(2, 1, 3, 3, device="meta")},
                ValueError,
                "weight must be on cpu as x, got meta",
            ),
            ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(2,\), got \(3,\)"),
            ({"groups": 0}, ValueError, "groups must be in"),
            ({"groups": 3}, ValueError, "weight must have shape"),
            ({"dilation": 0}, ValueError, "dilation must be in"),
            ({"dilation": (1, 2, 3)}, ValueError, r"dilation must be a number or \(y, x\)"),
            ({"stride": 2}, ValueError, "padding must be numbers where stride is not 1"),
            ({"stride": 1.5}, TypeError, "stride must be an integer"),
            ({"padding": -1}, ValueError, "padding must be in"),
            ({"padding": "full"}, ValueError, "padding must be one of 'same', 'valid'"),
            ({"activation": "gelu"}, ValueError, "activation must be one of None, 'relu'"),
        ],
    )
    def test_bad_arguments(self, change, error, text):
        arguments = {
            "x": torch.zeros(1, 2, 3, 4),
            "weight": torch.zeros(2, 1, 3, 3),
            "groups": 2,
            **change,
        }
        with pytest.raises(error, match=f"atrous_conv2d: {text}"):
            atrous_conv2d(**arguments)

    def test_kernel_larger_than_the_padded_map(self):
        x, weight, _ = problem((1, 3, 4, 5), (3, 3), torch.float32)
        with pytest.raises(ValueError, match=r"output size must be at least 1, got \(0, 1\)"):
            atrous_conv2d(x, weight, dilation=2, padding="valid", groups=3)
