# SPDX-License-Identifier: Apache-2.0
"""Depthwise-separable atrous convolution against torch's: values, gradients, layouts, promises."""

from __future__ import annotations

import pytest
import torch
from _ops import expansions, layouts, random, rms_error, same_bits, threads
from _ops import one_thread as one_thread
from _separable import CASES, DTYPES, FORMATS, check, gradients, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from pydense import reference
from pydense.ops import atrous_conv2d, atrous_separable_conv2d


class TestSeparable:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(self, case, dtype, form):
        check(*case, dtype, form)

    @settings(max_examples=60)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40)
        ),
        outputs=st.integers(1, 70),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        dilation=st.tuples(st.integers(1, 24), st.integers(1, 45)),
        padding=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)),
        dtype=st.sampled_from(DTYPES),
        last=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_any_shape(self, shape, outputs, kernel, dilation, padding, dtype, last, seed):
        options = {"dilation": dilation, "padding": "same"}
        if padding is not None:
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            short = [max(0, r + 1 - n) for r, n in zip(reach, shape[2:], strict=True)]
            options["padding"] = tuple(
                max(p, (s + 1) // 2) for p, s in zip(padding, short, strict=True)
            )
        check(shape, outputs, kernel, options, dtype, FORMATS[last], seed)

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("channels", [512, 2048])
    def test_error_of_many_channels(self, channels, form):
        """Of float32: on average at most twice torch's, however many numbers a sum has."""
        arguments = problem((1, channels, 14, 15), 48, (3, 3), torch.float32, form)
        wide = problem((1, 48, 14, 15), channels, (3, 3), torch.float32, form)
        # The gradient of x is a sum over outputs: many of them, too.
        for parts in (arguments, wide):
            options = {"dilation": 4}
            own = gradients(atrous_separable_conv2d, parts[:3], options)
            exact, *theirs = (
                gradients(
                    reference.atrous_separable_conv2d,
                    [t.to(dtype).contiguous(memory_format=of) for t in parts[:3]],
                    options,
                    torch.float32,
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

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_expanded_gradients(self, dtype):
        """The values of the same gradients in memory of their own."""
        parts = problem((2, 37, 9, 11), 35, (3, 3), dtype)[:3]
        for name, grad in expansions(random(2, 35, 9, 11, seed=4).to(dtype)):
            found = []
            for of_out in (grad, grad.contiguous()):
                leaves = [t.clone().requires_grad_() for t in parts]
                out = atrous_separable_conv2d(*leaves, dilation=2)
                found.append(torch.autograd.grad(out, leaves, of_out))
            for a, b in zip(*found, strict=True):
                error = (a.double() - b.double()).abs().max()
                assert error <= 4 * torch.finfo(dtype).eps * b.abs().max(), name

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("inner", [None, "relu"])
    @pytest.mark.parametrize("outer", [None, "relu"])
    def test_gradcheck(self, form, inner, outer):
        """First and second derivatives, also of the padding's and the kernel's odd forms."""
        for kernel, options in (
            ((3, 3), {"dilation": 2}),
            ((2, 3), {"dilation": (2, 1), "padding": (3, 0)}),
        ):
            leaves = [
                t.clone(memory_format=torch.preserve_format).requires_grad_()
                for t in problem((2, 2, 4, 3), 3, kernel, torch.float64, form)
            ]

            def run(*leaves, options=options):
                return atrous_separable_conv2d(
                    *leaves, **options, inner_activation=inner, activation=outer
                )

            assert gradcheck(run, leaves)
            assert gradgradcheck(run, leaves)

    @pytest.mark.parametrize("needed", range(1, 32))
    def test_some_gradients_alone(self, needed):
        for inner in (None, "relu"):
            options = {"dilation": 2, "inner_activation": inner}
            arguments = problem((2, 3, 6, 7), 4, (3, 3), torch.float64)
            everything = gradients(atrous_separable_conv2d, arguments, options)
            for i, leaf in enumerate(arguments):
                leaf.requires_grad_(bool(needed >> i & 1))
            out = atrous_separable_conv2d(*arguments, **options)
            out.backward(random(*out.shape, seed=9).double())
            for i, leaf in enumerate(arguments):
                assert (leaf.grad is not None) == bool(needed >> i & 1)
                if leaf.grad is not None:
                    assert same_bits(leaf.grad, everything[1 + i])

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_activations(self, dtype, form):
        """Of its two halves, one after the other; NaN stays one."""
        x, depthwise, pointwise, inner, outer = problem((2, 20, 9, 10), 15, (3, 3), dtype, form)
        x[0, 1, 3, 4] = float("nan")
        for first in (None, "relu"):
            for second in (None, "relu"):
                own = atrous_separable_conv2d(
                    x,
                    depthwise,
                    pointwise,
                    inner,
                    outer,
                    dilation=3,
                    inner_activation=first,
                    activation=second,
                )
                z = atrous_conv2d(x, depthwise, inner, dilation=3, groups=20, activation=first)
                theirs = torch.einsum("oc,nchw->nohw", pointwise[:, :, 0, 0], z)
                theirs = theirs + outer[:, None, None]
                theirs = theirs.relu() if second else theirs
                assert own.isnan().sum() == 9 * 15
                assert torch.allclose(own, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)

    def test_padding_is_not_multiplied(self):
        """Infinite weights meet the map alone."""
        for form in FORMATS:
            x, depthwise, pointwise, *_ = problem((1, 3, 4, 5), 6, (3, 3), torch.float32, form)
            depthwise[:, :, 0] = float("inf")
            depthwise[:, :, 1, 0] = float("nan")
            out = atrous_separable_conv2d(x, depthwise, pointwise, dilation=5)
            centre = depthwise[:, :, 1:2, 1:2]
            assert torch.allclose(out, atrous_separable_conv2d(x, centre, pointwise), atol=1e-6)


class TestPromises:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_layouts(self, dtype):
        """The same bits from every layout, forward; the gradients of x as well."""
        arguments = problem((2, 5, 6, 7), 4, (3, 3), dtype)
        expected = atrous_separable_conv2d(*arguments, dilation=2)
        for name, y in layouts(arguments[0]):
            before = y.clone()
            out = atrous_separable_conv2d(y, *arguments[1:], dilation=2)
            assert same_bits(out, expected), name
            assert torch.equal(y, before), name
        rows = zip(*map(layouts, arguments[1:3]), strict=True)
        for (name, depthwise), (_, pointwise) in rows:
            out = atrous_separable_conv2d(
                arguments[0], depthwise, pointwise, *arguments[3:], dilation=2
            )
            assert same_bits(out, expected), name
        leaf = arguments[0].requires_grad_()
        found = []
        for _, grad in layouts(random(2, 4, 6, 7, seed=4).to(dtype)):
            out = atrous_separable_conv2d(leaf, *arguments[1:], dilation=2)
            found.append(torch.autograd.grad(out, leaf, grad)[0])
        assert all(torch.equal(one, found[0]) for one in found)

    def test_empty_batch(self):
        for form in FORMATS:
            found = gradients(
                atrous_separable_conv2d,
                problem((0, 3, 4, 5), 2, (3, 3), torch.float32, form),
                {"dilation": 2, "inner_activation": "relu", "activation": "relu"},
            )
            assert found[0].shape == (0, 2, 4, 5) and found[1].shape == (0, 3, 4, 5)
            assert not any(t.any() for t in found[2:])
            assert found[2].shape == (3, 1, 3, 3) and found[3].shape == (2, 3, 1, 1)

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_threads_and_runs(self, dtype, form):
        arguments = problem((2, 300, 40, 90), 50, (3, 3), dtype, form)
        found = []
        for count in (1, 2, 4, 4):
            with threads(count):
                found.append(atrous_separable_conv2d(*arguments, dilation=12, activation="relu"))
        assert all(same_bits(out, found[0]) for out in found[1:])

    @pytest.mark.parametrize("form", FORMATS)
    def test_depthwise_gradients_over_threads(self, form):
        """Of the depthwise half, for a product whose bits BLAS does not change."""
        x, depthwise, _, inner, _ = problem((1, 64, 40, 90), 1, (3, 3), torch.float32, form)
        leaves = [x.requires_grad_(), depthwise.requires_grad_(), inner.requires_grad_()]
        pointwise = torch.ones(1, 64, 1, 1)
        found = []
        for count in (1, 3):
            with threads(count):
                out = atrous_separable_conv2d(x, depthwise, pointwise, inner, dilation=12)
                grad = random(*out.shape, seed=9)
                found.append(torch.autograd.grad(out, leaves[:2], grad))
        assert all(map(same_bits, *found))

    def test_what_is_saved_for_backward(self):
        def saved(arguments, **options):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.append(t.data_ptr()) or t, lambda t: t
            ):
                out = atrous_separable_conv2d(*arguments, **options)
            names = dict(zip(map(torch.Tensor.data_ptr, arguments), "xdpio", strict=True))
            return "".join({**names, out.data_ptr(): "r"}[place] for place in kept)

        arguments = problem((1, 3, 6, 7), 2, (3, 3), torch.float32)
        assert saved(arguments) == ""
        arguments[0].requires_grad_()
        assert saved(arguments) == "xdpi"
        assert saved(arguments, activation="relu", inner_activation="relu") == "xdpir"
        with torch.no_grad():
            assert saved(arguments) == ""

    def test_tangents_raise(self):
        x, *rest = problem((1, 3, 4, 5), 2, (3, 3), torch.float64)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="x must have no tangent"):
                atrous_separable_conv2d(dual, *rest)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"x": 3}, TypeError, "x must be a tensor, got"),
            ({"x": torch.zeros(1, 2, 3)}, ValueError, "x must have a shape out of"),
            ({"x": torch.zeros(1, 2, 3, 4).int()}, TypeError, "x must be of dtype"),
            (
                {"x": torch.zeros(1, 2, 3, 4, device="meta")},
                NotImplementedError,
                "x must be on the CPU",
            ),
            ({"depthwise_weight": None}, TypeError, "depthwise_weight must be a tensor"),
            (
                {"depthwise_weight": torch.zeros(2, 2, 3, 3)},
                ValueError,
                r"depthwise_weight must have shape \(2, 1, kH, kW\), got \(2, 2, 3, 3\)",
            ),
            (
                {"depthwise_weight": torch.zeros(2, 1, 0, 3)},
                ValueError,
                "depthwise_weight must have shape",
            ),
            (
                {"depthwise_weight": torch.zeros(2, 1, 3, 3).half()},
                TypeError,
                "depthwise_weight must be of dtype torch.float32 as x",
            ),
            (
                {"pointwise_weight": torch.zeros(4, 3, 1, 1)},
                ValueError,
                r"pointwise_weight must have shape \(O, 2, 1, 1\), got \(4, 3, 1, 1\)",
            ),
            (
                {"pointwise_weight": torch.zeros(4, 2)},
                ValueError,
                "pointwise_weight must have shape",
            ),
            (
                {"pointwise_weight": torch.zeros(4, 2, 1, 1, device="meta")},
                ValueError,
                "pointwise_weight must be on cpu as x, got meta",
            ),
            (
                {"depthwise_bias": torch.zeros(4)},
                ValueError,
                r"depthwise_bias must have shape \(2,\), got \(4,\)",
            ),
            (
                {"pointwise_bias": torch.zeros(2)},
                ValueError,
                r"pointwise_bias must have shape \(4,\), got \(2,\)",
            ),
            ({"dilation": 0}, ValueError, "dilation must be in"),
            ({"dilation": (1, 2, 3)}, ValueError, r"dilation must be a number or \(y, x\)"),
            ({"padding": -1}, ValueError, "padding must be in"),
            ({"padding": "full"}, ValueError, "padding must be one of 'same', 'valid'"),
            ({"activation": "gelu"}, ValueError, "activation must be one of None, 'relu'"),
            ({"inner_activation": 1}, ValueError, "inner_activation must be one of None, 'relu'"),
            (
                {"padding": "valid", "dilation": 2},
                ValueError,
                r"output size must be at least 1, got \(-1, 0\)",
            ),
        ],
    )
    def test_raises(self, change, error, text):
        arguments = {
            "x": torch.zeros(1, 2, 3, 4),
            "depthwise_weight": torch.zeros(2, 1, 3, 3),
            "pointwise_weight": torch.zeros(4, 2, 1, 1),
            **change,
        }
        with pytest.raises(error, match=f"atrous_separable_conv2d: {text}"):
            atrous_separable_conv2d(**arguments)
