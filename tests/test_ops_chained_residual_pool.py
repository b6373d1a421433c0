# SPDX-License-Identifier: Apache-2.0
"""Chained residual pooling against torch: values, gradients, and as torch sees it."""

from __future__ import annotations

import pytest
import torch
from _chains import DTYPES, FORMATS, OPS, VARIANTS, gradients, leaves, problem, shapes_of, wide
from _ops import expansions, layouts, random, rms_error, same_bits, threads
from _ops import one_thread as one_thread
from torch.autograd import gradcheck
from torch.library import opcheck

from pydense import _core, reference
from pydense.ops import chained_residual_pool


class TestAgainstTorch:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_float64(self, backend, kernel, variant, form):
        for shape in shapes_of(backend):
            for stages, bias, size in ((1, True, 5), (4, False, 5), (2, True, 3), (2, False, 7)):
                on = {"device": backend.device}
                arguments = problem(shape, stages, kernel, torch.float64, form, bias, **on)
                grad = random(*shape, seed=99, dtype=torch.float64, **on)
                options = {"variant": variant, "pool_size": size}
                own = gradients(chained_residual_pool, arguments, grad, **options)
                theirs = gradients(reference.chained_residual_pool, arguments, grad, **options)
                for a, b in zip(own, theirs, strict=True):
                    assert (a - b).abs().max() <= 1e-10 * (1 + b.abs().max())
                assert own[0].stride() == arguments[0].stride()

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_error_is_at_most_twice_torchs(self, backend, dtype, variant, form):
        for shape in shapes_of(backend):
            for stages, bias in ((4, False), (2, True)):
                arguments = problem(shape, stages, 1, dtype, form, bias, device=backend.device)
                exact = reference.chained_residual_pool(*wide(arguments), variant=variant)
                error = [
                    float((f(*arguments, variant=variant).double() - exact).abs().max())
                    for f in (chained_residual_pool, reference.chained_residual_pool)
                ]
                assert error[0] <= 2 * error[1] + 2**-22 * float(exact.abs().max()), error

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_wide_3x3_stages(self, variant, form):
        """With Winograd's algorithm, whose error is known, on any number of threads."""
        arguments = problem((1, 128, 33, 35), 3, 3, torch.float32, form, True)
        exact = reference.chained_residual_pool(*wide(arguments), variant=variant)
        theirs = reference.chained_residual_pool(*arguments, variant=variant)
        found = []
        for count in (1, 2, 4):
            with threads(count):
                found.append(chained_residual_pool(*arguments, variant=variant))
        assert all(same_bits(found[0], other) for other in found[1:])
        assert found[0].stride() == arguments[0].stride()
        assert not same_bits(found[0], theirs)
        assert rms_error(found[0], exact) <= 2.5 * rms_error(theirs, exact) + 1e-7

    def test_gradients_of_a_wide_3x3_stage(self):
        """One stage: behind the first, rounding moves maxima, torch's as well."""
        arguments = problem((1, 128, 33, 35), 1, 3, torch.float32, FORMATS[0], False)
        grad = random(1, 128, 33, 35, seed=99)
        exact = gradients(reference.chained_residual_pool, wide(arguments), grad.double())
        theirs = gradients(reference.chained_residual_pool, arguments, grad)
        for form in FORMATS:
            given = arguments[0].contiguous(memory_format=form), *arguments[1:]
            own = gradients(chained_residual_pool, given, grad)
            for a, b, e in zip(own, theirs, exact, strict=True):
                assert rms_error(a, e) <= 2.5 * rms_error(b, e) + 1e-6

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", DTYPES[1:3])
    def test_gradients_of_narrow_types(self, backend, dtype, variant):
        """One stage: behind the first, rounding moves maxima, torch's as well."""
        on = {"device": backend.device}
        arguments = problem((2, 20, 17, 19), 1, 1, dtype, FORMATS[0], True, **on)
        grad = random(2, 20, 17, 19, seed=99, **on).to(dtype)
        function, expected = chained_residual_pool, reference.chained_residual_pool
        if variant == "conv_pool":  # of whole numbers: no rounding in the convolution
            arguments = tuple(
                [t.round() for t in part] if isinstance(part, list) else (4 * part).round()
                for part in arguments
            )
        exact = gradients(expected, wide(arguments), grad.double(), variant=variant)
        own = gradients(function, arguments, grad, variant=variant)
        theirs = gradients(expected, arguments, grad, variant=variant)
        for a, b, e in zip(own, theirs, exact, strict=True):
            error = [float((t.double() - e).abs().max()) for t in (a, b)]
            assert error[0] <= 2 * error[1] + 2**-20 * float(e.abs().max()), error

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_ties_nan_and_infinity(self, backend, variant):
        """Whole numbers: every sum is exact, every maximum ties."""
        for form in FORMATS:
            generator = torch.Generator().manual_seed(3)
            x = torch.randint(-1, 2, (1, 20, 15, 40), generator=generator).double()
            weights = [
                torch.randint(-1, 2, (20, 20, 1, 1), generator=generator).double() for _ in range(2)
            ]
            grad = torch.randint(-2, 3, x.shape, generator=generator).double()
            x, grad, *weights = (t.to(backend.device) for t in (x, grad, *weights))
            arguments = x.contiguous(memory_format=form), weights, None
            own = gradients(chained_residual_pool, arguments, grad, variant=variant)
            theirs = gradients(reference.chained_residual_pool, arguments, grad, variant=variant)
            assert all(map(torch.equal, own, theirs))
            for bad in (float("nan"), float("-inf"), float("inf")):
                y = arguments[0].clone()
                y[0, 3, 4, 5] = bad
                own = chained_residual_pool(y, [w.abs() for w in weights], variant=variant)
                expected = reference.chained_residual_pool(
                    y, [w.abs() for w in weights], variant=variant
                )
                assert torch.equal(own.isnan(), expected.isnan())
                assert torch.equal(own.nan_to_num(7), expected.nan_to_num(7))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_gradcheck(self, backend, variant):
        for kernel in (1, 3):
            for form in FORMATS:
                on = {"device": backend.device}
                x, weights, biases = leaves(
                    *problem((1, 2, 4, 5), 2, kernel, torch.float64, form, True, **on)
                )

                def run(x, *rest, variant=variant):
                    return chained_residual_pool(x, rest[:2], rest[2:], variant=variant)

                assert gradcheck(run, (x, *weights, *biases))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_only_what_is_asked_for(self, backend, variant):
        """Any subset of the gradients is that of all."""
        on = {"device": backend.device}
        arguments = problem((1, 6, 8, 9), 3, 1, torch.float64, FORMATS[0], True, **on)
        grad = random(1, 6, 8, 9, seed=4, dtype=torch.float64, **on)
        everything = gradients(chained_residual_pool, arguments, grad, variant=variant)[1:]
        for wanted in ([0], [1], [3], [5], [2, 6], [0, 4]):
            x, weights, biases = arguments
            flat = [t.detach().clone() for t in (x, *weights, *biases)]
            for i in wanted:
                flat[i].requires_grad_()
            out = chained_residual_pool(flat[0], flat[1:4], flat[4:], variant=variant)
            found = torch.autograd.grad(out, [flat[i] for i in wanted], grad)
            for i, own in zip(wanted, found, strict=True):
                assert torch.allclose(own, everything[i], rtol=1e-12, atol=1e-12)


class TestPromises:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_layouts(self, backend, variant):
        on = {"device": backend.device}
        x, weights, biases = problem((2, 5, 6, 7), 2, 1, torch.float32, FORMATS[0], True, **on)
        expected = chained_residual_pool(x, weights, biases, variant=variant)
        strided = [torch.stack([w, w], -1)[..., 0] for w in weights]
        for name, y in layouts(x):
            out = chained_residual_pool(y, strided, biases, variant=variant)
            assert same_bits(out, expected), name
        for name, grad in layouts(random(2, 5, 6, 7, seed=8, **on)):
            y = x.clone().requires_grad_()
            out = chained_residual_pool(y, weights, biases, variant=variant)
            (own,) = torch.autograd.grad(out, y, grad)
            (all_ones,) = torch.autograd.grad(
                chained_residual_pool(y, weights, biases, variant=variant), y, grad.contiguous()
            )
            assert torch.allclose(own, all_ones, rtol=1e-5, atol=1e-5), name
        y = x.clone().requires_grad_()
        chained_residual_pool(y, weights, variant=variant).sum().backward()  # expanded gradient

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_expanded_gradients(self, variant):
        """The same bits as of gradients in memory of their own."""
        for dtype in DTYPES:
            arguments = problem((2, 37, 9, 11), 2, 1, dtype, FORMATS[0], True)
            for name, grad in expansions(random(2, 37, 9, 11, seed=4).to(dtype)):
                own, dense = (
                    gradients(chained_residual_pool, arguments, of_out, variant=variant)
                    for of_out in (grad, grad.contiguous())
                )
                n = -len(arguments[2])  # torch sums those of biases
                assert all(same_bits(a, b) for a, b in zip(own[:n], dense[:n], strict=True)), name

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_empty_batch(self, backend, variant):
        on = {"device": backend.device}
        x, weights, _ = leaves(*problem((0, 4, 5, 6), 2, 1, torch.float32, FORMATS[0], False, **on))
        chained_residual_pool(x, weights, variant=variant).sum().backward()
        assert x.grad.shape == x.shape and float(weights[0].grad.abs().max()) == 0

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_threads_and_runs(self, dtype, form):
        arguments = problem((2, 40, 90, 70), 3, 1, dtype, form, True)
        grad = random(2, 40, 90, 70, seed=7).to(dtype)
        results = []
        for count in (1, 2, 4, 4):
            with threads(count):
                found = [
                    gradients(chained_residual_pool, arguments, grad, variant=v) for v in VARIANTS
                ]
                torchs = dtype == torch.bfloat16 and _core.cpu_capability() == "amx"
                results.append([t for row in found for t in (row[:1] if torchs else row)])
        for row in results[1:]:
            assert all(map(same_bits, row, results[0]))

    def test_instruction_sets(self, restore_core):
        """The same bits wherever there is fused multiply-add, in both memory formats.

        Products of bfloat16 pairs round in another order.
        """
        for dtype in DTYPES:
            found, paired = [], []
            for capability in _core.cpu_capabilities():
                OPS._set_cpu_capability(capability)
                for form in FORMATS:
                    arguments = problem((1, 30, 12, 37), 2, 1, dtype, form, True)
                    out = chained_residual_pool(*arguments)
                    exact = reference.chained_residual_pool(*wide(arguments))
                    bound = 8 * max(torch.finfo(dtype).eps, 2**-23) * float(exact.abs().max())
                    assert (out.double() - exact).abs().max() < bound
                    if dtype == torch.bfloat16 and capability in ("avx512_bf16", "amx"):
                        paired.append(out)
                    elif capability != "baseline":
                        found.append(out)
            for row in (found, paired):
                assert all(same_bits(out, row[0]) for out in row)

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES[1:])
    def test_gradients_on_instruction_sets(self, restore_core, dtype, form):
        """Odd numbers of channels and columns among them, and more than one slab of pixels."""
        for shape in ((2, 13, 7, 9), (1, 40, 31, 50)):
            arguments = problem(shape, 1, 1, dtype, form, True)
            grad = random(*shape, seed=99).to(dtype)
            exact = gradients(reference.chained_residual_pool, wide(arguments), grad.double())
            theirs = gradients(reference.chained_residual_pool, arguments, grad)
            for capability in _core.cpu_capabilities():
                OPS._set_cpu_capability(capability)
                own = gradients(chained_residual_pool, arguments, grad)
                for a, b, e in zip(own, theirs, exact, strict=True):
                    error = [float((t.double() - e).abs().max()) for t in (a, b)]
                    floor = 2**-20 * float(e.abs().max())
                    assert error[0] <= 2 * error[1] + floor, (capability, error)

    def test_bfloat16_gradients_are_torchs_with_amx(self, monkeypatch):
        """The dispatch alone: torch runs its convolution on whatever CPU this is."""
        monkeypatch.setattr(OPS, "_cpu_capability", lambda: "amx")
        x, weights, _ = problem((1, 24, 11, 13), 1, 1, torch.bfloat16, FORMATS[0], False)
        grad = random(1, 24, 11, 13, seed=99).to(torch.bfloat16)
        # Small whole numbers: sums are exact and rounded once, both ways have the same bits.
        x, grad, weight = (t.mul(2).round() for t in (x, grad, 4 * weights[0]))
        calls = []
        aten = torch.ops.aten.convolution_backward
        monkeypatch.setattr(
            torch.ops.aten,
            "convolution_backward",
            lambda *rest: calls.append(rest[0].dtype) or aten(*rest),
        )
        by_torch = gradients(chained_residual_pool, (x, [weight], None), grad)
        assert calls == [torch.bfloat16]
        monkeypatch.undo()
        own = gradients(chained_residual_pool, (x, [weight], None), grad)
        assert all(map(torch.equal, own, by_torch))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_what_is_saved_for_backward(self, backend, variant):
        """Bytes, and the inputs of convolutions whose weights are trained."""
        on = {"device": backend.device}
        x, weights, _ = problem((1, 16, 20, 20), 4, 1, torch.float32, FORMATS[0], False, **on)

        def saved(function, x, weights):
            kept = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
            ):
                out = function(x, weights, variant=variant)
            own = {x.data_ptr(), *(w.data_ptr() for w in weights)}
            assert out.requires_grad == bool(kept)
            return sum(t.numel() * t.element_size() for p, t in kept.items() if p not in own)

        function = chained_residual_pool
        assert saved(function, x, weights) == 0
        x.requires_grad_()
        assert saved(function, x, weights) == 4 * x.numel()
        weights = [w.requires_grad_() for w in weights]
        inputs = 4 if variant == "pool_conv" else 3
        own = saved(function, x, weights)
        assert own == 4 * x.numel() + inputs * 4 * x.numel()
        assert 3 * own <= saved(reference.chained_residual_pool, x, weights)
        with torch.no_grad():
            assert saved(function, x, weights) == 0

    def test_gradients_of_a_stage(self):
        """The operator beneath, and what it refuses."""
        x, weights, _ = problem((2, 5, 6, 7), 1, 1, torch.float64, FORMATS[0], False)
        grad, addend = (random(2, 5, 6, 7, seed=s, dtype=torch.float64) for s in (8, 9))
        run = OPS.residual_stage_backward
        got = run(grad, x, weights[0], addend, True, True, True)
        plain = torch.einsum("oi,nohw->nihw", weights[0].flatten(1), grad) + addend
        assert torch.allclose(got[0], plain)
        assert torch.allclose(got[1].flatten(1), torch.einsum("nohw,nihw->oi", grad, x))
        assert torch.allclose(got[2], grad.sum((0, 2, 3)))
        assert len(run(grad, None, weights[0], None, False, False, True)) == 1
        opcheck(run.default, (grad, x, weights[0], addend, True, True, True))
        for change, text in (
            ({1: None}, "input must be given where weight's gradient is needed, got None"),
            ({1: x[:1]}, "input must have 2 elements along axis 0, got 1"),
            ({1: x.float()}, "input must be of dtype"),
            ({2: weights[0][:4]}, r"weight must have shape \(5, 5, 1, 1\)"),
            ({3: addend[..., :3]}, "addend must have 7 elements along axis 3, got 3"),
        ):
            arguments = [grad, x, weights[0], addend, True, True, True]
            for i, value in change.items():
                arguments[i] = value
            with pytest.raises((ValueError, TypeError), match=f"residual_stage_backward: {text}"):
                run(*arguments)

    def test_second_derivatives_raise(self):
        x, weights, _ = leaves(*problem((1, 3, 4, 5), 2, 1, torch.float64, FORMATS[0], False))
        out = chained_residual_pool(x, weights)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="chained_residual_pool_backward"):
            grad.sum().backward()

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"x": torch.zeros(1, 2, 3)}, ValueError, "x must have a shape out of"),
            ({"weights": []}, ValueError, "weights must be 1 to 64 tensors, got 0"),
            ({"weights": torch.zeros(2, 2)}, TypeError, "weights must be a sequence of tensors"),
            ({"weights": [3]}, TypeError, r"weights\[0\] must be a tensor"),
            ({"weights": [torch.zeros(2, 2, 2, 2)]}, ValueError, "weights must have shape"),
            (
                {"weights": [torch.zeros(2, 3, 1, 1)]},
                ValueError,
                r"weights\[0\] must have shape \(2, 2, 1, 1\), got \(2, 3, 1, 1\)",
            ),
            (
                {"weights": [torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 3, 3)]},
                ValueError,
                r"weights\[1\] must have shape \(2, 2, 1, 1\)",
            ),
            (
                {"weights": [torch.zeros(2, 2, 1, 1).half()]},
                TypeError,
                r"weights\[0\] must be of dtype torch.float32 as x, got torch.float16",
            ),
            (
                {"weights": [torch.zeros(2, 2, 1, 1, device="meta")]},
                ValueError,
                r"weights\[0\] must be on cpu as x, got meta",
            ),
            ({"biases": [torch.zeros(2)] * 2}, ValueError, "biases must be 1 as the weights, got"),
            ({"biases": [torch.zeros(3)]}, ValueError, r"biases\[0\] must have shape \(2,\)"),
            ({"variant": "pool"}, ValueError, "variant must be one of 'pool_conv', 'conv_pool'"),
            ({"pool_size": 4}, ValueError, "pool_size must be odd, got 4"),
        ],
    )
    def test_bad_arguments(self, change, error, text):
        arguments = {"x": torch.zeros(1, 2, 3, 4), "weights": [torch.zeros(2, 2, 1, 1)], **change}
        with pytest.raises(error, match=rf"chained_residual_pool: {text}"):
            chained_residual_pool(**arguments)
