# SPDX-License-Identifier: Apache-2.0
"""Parallel atrous convolutions side by side against torch's: values, gradients, promises."""

from __future__ import annotations

import pytest
import torch
from _ops import layouts, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck

import pydense
from pydense import reference
from pydense.ops import _aspp_concat_autograd, aspp_concat
from pydense.ops._atrous_dispatch import Choice, Kernels

CHOOSE = _aspp_concat_autograd.choose_branch
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(scope="module", autouse=True, params=["pydense's kernels", "torch's"])
def own(request):
    """Everything runs with both kinds of kernels, whatever the rule would choose."""
    chosen = request.param != "torch's"
    choice = Choice(Kernels.DENSE if chosen else Kernels.TORCH, "it is a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_aspp_concat_autograd, "choose_branch", lambda *_: choice)
        yield chosen


# (batch, channels, height, width), outputs of the branches, their kernels and rates.
CASES = [
    ((2, 5, 9, 11), (4, 3, 4, 7), ((1, 1), (3, 3), (3, 3)), (1, 2, 4)),
    ((1, 37, 33, 29), (33, 20, 16, 5, 6), ((1, 1), (3, 3), (3, 3), (3, 3)), (1, 6, 12, 18)),
    ((2, 21, 7, 12), (8, 1, 1), ((3, 3), (3, 3)), (7, 40)),
    ((3, 4, 1, 1), (2, 3), ((3, 3),), (1,)),
    ((1, 3, 12, 9), (2, 2, 1), ((5, 1), (1, 3)), (2, 3)),
]
# In units in the last place of the largest number; four times as many for gradients of parameters,
# sums over all pixels that may cancel. Of float64, torch itself is the reference.
FLOOR = {torch.float64: 64, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def problem(shape, outputs, kernels, dtype, form=FORMATS[0], seed=0, pools=True):
    """x, weights, the pooled one, scales, biases."""
    x = random(*shape, seed=seed).to(dtype).contiguous(memory_format=form)
    every = [*kernels, (1, 1)] if pools else kernels
    weights = [
        ((shape[1] * k * m) ** -0.5 * random(o, shape[1], k, m, seed=seed + i)).to(dtype)
        for i, (o, (k, m)) in enumerate(zip(outputs, every, strict=False), 1)
    ]
    wide = torch.promote_types(dtype, torch.float32)
    scales = [
        (0.5 + random(len(w), seed=seed + 10 + i).abs()).to(wide) for i, w in enumerate(weights)
    ]
    biases = [random(len(w), seed=seed + 20 + i).to(wide) for i, w in enumerate(weights)]
    return [x, weights[: len(kernels)], weights[len(kernels) :], scales, biases]


def flat(arguments):
    return [arguments[0], *(t for row in arguments[1:] for t in row)]


def gradients(function, arguments, rates, activation=None, dtype=None):
    """Output and gradients of everything, for a gradient of ``dtype`` in the output's format."""

    def leaf(t):
        return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    x, *rows = [leaf(arguments[0]), *([leaf(t) for t in row] for row in arguments[1:])]
    out = call(function, [x, *rows], rates, activation)
    form = FORMATS[0] if out.is_contiguous() else torch.channels_last
    grad = random(*out.shape, seed=9).to(dtype or out.dtype).to(out.dtype)
    grads = torch.autograd.grad(
        out, flat([x, *rows]), grad.contiguous(memory_format=form), allow_unused=True
    )
    return [out.detach(), *grads]


def call(function, arguments, rates, activation=None):
    x, weights, pool, scales, biases = arguments
    return function(
        x,
        weights,
        rates,
        pool_weight=pool[0] if pool else None,
        scales=scales or None,
        biases=biases or None,
        activation=activation,
    )


def check(shape, outputs, kernels, rates, dtype, form, seed=0, pools=True):
    """At most twice torch's own error on contiguous tensors, plus the floor."""
    arguments = problem(shape, outputs, kernels, dtype, form, seed, pools)
    own = gradients(aspp_concat, arguments, rates)
    plain = [t.contiguous() for t in arguments[:1]] + arguments[1:]
    narrow = [plain[0], *([t.to(dtype) for t in row] for row in plain[1:])]
    theirs = gradients(reference.aspp_concat, narrow, rates)
    wide = [plain[0].double(), *([t.double() for t in row] for row in plain[1:])]
    exact = gradients(reference.aspp_concat, wide, rates, dtype=dtype)
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    for i, (a, b, e) in enumerate(zip(own, theirs, exact, strict=True)):
        assert a.shape == b.shape
        error, torchs = (float((t.double() - e).abs().max()) for t in (a, b))
        assert error <= 2 * torchs + (4 if i > 1 else 1) * floor * float(e.abs().max())
    for a, t in zip(own[1:], flat(arguments), strict=True):
        assert a.dtype == t.dtype
    assert own[0].dtype == dtype
    if min(shape) > 1:
        assert all(t.is_contiguous(memory_format=form) for t in own[:2])


class TestConcat:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(self, case, dtype, form):
        shape, outputs, kernels, rates = case
        check(shape, outputs, kernels, rates, dtype, form)
        check(shape, outputs[:-1], kernels, rates, dtype, form, pools=False)

    @settings(max_examples=40)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 30), st.integers(1, 14), st.integers(1, 30)
        ),
        branches=st.lists(
            st.tuples(st.integers(1, 20), st.sampled_from([1, 3]), st.integers(1, 40)),
            min_size=1,
            max_size=4,
        ),
        pool=st.none() | st.integers(1, 9),
        dtype=st.sampled_from(DTYPES),
        last=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_any_shape(self, shape, branches, pool, dtype, last, seed):
        outputs = [o for o, _, _ in branches] + ([pool] if pool else [])
        kernels = [(k, k) for _, k, _ in branches]
        rates = [r for _, _, r in branches]
        check(shape, outputs, kernels, rates, dtype, FORMATS[last], seed, bool(pool))

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_gradcheck(self, form, activation):
        arguments = problem((2, 3, 4, 5), (2, 3, 2), ((1, 1), (3, 3)), torch.float64, form)
        sizes = [len(row) for row in arguments[1:]]
        leaves = [
            t.clone(memory_format=torch.preserve_format).requires_grad_() for t in flat(arguments)
        ]

        def run(x, *rest):
            rows, rest = [], list(rest)
            for size in sizes:
                rows.append(rest[:size])
                rest = rest[size:]
            return call(aspp_concat, [x, *rows], (1, 2), activation)

        assert gradcheck(run, leaves)

    def test_second_derivative_raises(self):
        x, weights, *_ = problem((1, 3, 4, 5), (2,), ((3, 3),), torch.float64, pools=False)
        x.requires_grad_()
        (grad,) = torch.autograd.grad(
            aspp_concat(x, weights, (1,)).square().sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError):
            grad.sum().backward()

    def test_some_gradients_alone(self):
        arguments = problem((2, 3, 6, 7), (4, 2, 5), ((1, 1), (3, 3)), torch.float64)
        everything = gradients(aspp_concat, arguments, (1, 2), "relu")
        leaves = flat(arguments)
        for chosen in ([0], [1], [2], [3], [4], [6], [7], [9], [0, 5, 8], [1, 4], [2, 3]):
            for i, leaf in enumerate(leaves):
                leaf.grad = None
                leaf.requires_grad_(i in chosen)
            out = call(aspp_concat, arguments, (1, 2), "relu")
            out.backward(random(*out.shape, seed=9).double())
            for i, leaf in enumerate(leaves):
                assert (leaf.grad is not None) == (i in chosen)
                if leaf.grad is not None:
                    assert same_bits(leaf.grad, everything[1 + i])

    @pytest.mark.parametrize("form", FORMATS)
    def test_activation(self, form):
        arguments = problem((2, 5, 9, 8), (4, 3, 2), ((1, 1), (3, 3)), torch.float32, form)
        own = call(aspp_concat, arguments, (1, 3), "relu")
        assert torch.equal(own, call(aspp_concat, arguments, (1, 3)).relu())
        arguments[0][0, 1, 3, 4] = float("nan")
        out = call(aspp_concat, arguments, (1, 3), "relu")
        assert out[0].isnan().sum() == 4 * 1 + 3 * 9 + 2 * 72 and not out[1].isnan().any()


class TestPromises:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layouts(self, dtype, own):
        """Close from every layout (torch's mean has an order for each), the input unchanged."""
        arguments = problem((2, 5, 6, 7), (4, 3, 2), ((1, 1), (3, 3)), dtype)
        expected = call(aspp_concat, arguments, (1, 2))
        for name, y in layouts(arguments[0]):
            before = y.clone()
            out = call(aspp_concat, [y, *arguments[1:]], (1, 2))
            assert not own or same_bits(out[:, :7], expected[:, :7]), name
            assert torch.allclose(out, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
            assert torch.equal(y, before), name

    def test_empty_batch(self):
        for form in FORMATS:
            arguments = problem((0, 3, 4, 5), (4, 3, 2), ((1, 1), (3, 3)), torch.float32, form)
            found = gradients(aspp_concat, arguments, (1, 2), "relu")
            assert found[0].shape == (0, 9, 4, 5) and found[1].shape == (0, 3, 4, 5)
            assert not any(t.any() for t in found[2:])

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_threads_and_runs(self, dtype, form, own):
        """The same bits for any threads, and for torch's kernels from run to run."""
        arguments = problem((2, 40, 40, 50), (30, 20), ((1, 1), (3, 3)), dtype, form, pools=False)
        found = []
        for count in (1, 2, 4, 4) if own else (2, 2):
            with threads(count):
                found.append(gradients(aspp_concat, arguments, (1, 12))[:4])
        for row in found[1:]:
            assert all(map(same_bits, row, found[0]))

    def test_what_is_saved_for_backward(self):
        x, weights, pool, scales, biases = problem((1, 3, 6, 7), (4, 2), ((3, 3),), torch.float32)
        x.requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.data_ptr()) or t, lambda t: t
        ):
            out = call(aspp_concat, [x, weights, pool, scales, biases], (2,), "relu")
        assert kept == [t.data_ptr() for t in (x, *weights, *pool, *scales, out)]

    def test_tangents_raise(self):
        x, weights, *_ = problem((1, 3, 4, 5), (2,), ((3, 3),), torch.float64, pools=False)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="aspp_concat: x must have no tangent"):
                aspp_concat(dual, weights, (1,))


class TestChoice:
    def test_the_rule_of_atrous_conv2d(self):
        """A branch at a time; the fixture's choice is not this one's."""
        x = torch.zeros(1, 64, 9, 9)
        for kernel, outputs, rate in ((1, 16, 6), (3, 16, 5), (3, 16, 6), (3, 15, 12)):
            weight = torch.zeros(outputs, 64, kernel, kernel)
            said = pydense.explain("atrous_conv2d", x, weight, dilation=rate)
            choice = CHOOSE(x, weight, rate)
            assert said == f"{choice.kernels.value}: {choice.reason}"

    def test_never_winograds(self):
        x, weight = torch.zeros(1, 128, 129, 129), torch.zeros(128, 128, 3, 3)
        for rate in (2, 12):
            said = pydense.explain("atrous_conv2d", x, weight, dilation=rate)
            assert said.startswith("pydense's Winograd kernels")
            said = pydense.explain("atrous_conv2d", x, weight, dilation=rate, winograd_tile=None)
            choice = CHOOSE(x, weight, rate)
            assert said == f"{choice.kernels.value}: {choice.reason}"

    @pytest.mark.parametrize(("kernel", "rate"), [((5, 3), 1), ((1, 5), 1), ((3, 3), 2)])
    def test_gradient_of_bfloat16(self, kernel, rate):
        """Not of torch's convolution, which may leave memory as it was in it."""
        x = random(1, 130, 1, 17).bfloat16().contiguous(memory_format=torch.channels_last)
        weight = random(3, 130, *kernel, seed=1).bfloat16().requires_grad_()
        out = aspp_concat(x, [weight], (rate,))
        with torch.profiler.profile() as profile:
            out.backward(torch.ones_like(out))
        assert "aten::convolution_backward" not in [event.name for event in profile.events()]
        wide = weight.detach().double().requires_grad_()
        padding = [rate * (k // 2) for k in kernel]
        made = torch.nn.functional.conv2d(x.double(), wide, None, 1, padding, rate)
        made.backward(torch.ones_like(made))
        limit = 2 * torch.finfo(torch.bfloat16).eps * float(wide.grad.abs().max())
        assert float((weight.grad - wide.grad).abs().max()) <= limit


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"x": 3}, TypeError, "x must be a tensor, got"),
            (
                {"x": torch.zeros(1, 2, 3, 4, device="meta")},
                NotImplementedError,
                "x must be on the CPU",
            ),
            ({"weights": torch.zeros(3, 2, 3, 3)}, TypeError, "weights must be a sequence"),
            ({"weights": []}, ValueError, "weights must be 1 to 64 tensors, got 0"),
            (
                {"weights": [torch.zeros(3, 2, 2, 3)]},
                ValueError,
                r"weights\[0\] must have shape \(O, 2, k, k'\) with odd k, k', got \(3, 2, 2, 3\)",
            ),
            (
                {"weights": [torch.zeros(3, 1, 3, 3)]},
                ValueError,
                r"weights\[0\] must have shape \(O, 2, k",
            ),
            ({"weights": [torch.zeros(3)]}, ValueError, r"weights\[0\] must have shape"),
            (
                {"weights": [torch.zeros(3, 2, 3, 3).half()]},
                TypeError,
                r"weights\[0\] must be of dtype",
            ),
            ({"rates": (1, 2)}, ValueError, "rates must be 1 as the weights, got 2"),
            ({"rates": (0,)}, ValueError, r"rates\[0\] must be in"),
            (
                {"pool_weight": torch.zeros(3, 2, 3, 3)},
                ValueError,
                r"pool_weight must have shape \(O, 2, 1, 1\), got",
            ),
            ({"scales": [torch.ones(3)]}, ValueError, "scales must be 2 as the branches, got 1"),
            (
                {"biases": [torch.ones(3), torch.ones(3)]},
                ValueError,
                r"biases\[1\] must have shape \(4,\), got \(3,\)",
            ),
            (
                {"biases": [torch.ones(3).double(), torch.ones(4)]},
                TypeError,
                r"biases\[0\] must be of dtype torch.float32",
            ),
            ({"activation": "gelu"}, ValueError, "activation must be one of None, 'relu'"),
        ],
    )
    def test_raises(self, change, error, text):
        arguments = {
            "x": torch.zeros(1, 2, 3, 4),
            "weights": [torch.zeros(3, 2, 3, 3)],
            "rates": (2,),
            "pool_weight": torch.zeros(4, 2, 1, 1),
            **change,
        }
        with pytest.raises(error, match=f"aspp_concat: {text}"):
            aspp_concat(**arguments)
