# SPDX-License-Identifier: Apache-2.0
"""Sums of atrous convolutions: layouts, determinism, memory, refusals."""

from __future__ import annotations

import sys

import _backends
import pytest
import torch
from _aspp import DTYPES, FORMATS, gradients, on_every_device, problem, use_products
from _aspp import device as device
from _aspp import every_way as every_way
from _ops import expansions, layouts, one_number, random, same_bits, threads
from _ops import one_thread as one_thread
from torch.autograd import forward_ad

import pydense
from pydense.ops import _aspp_products as products
from pydense.ops import aspp_sum

aspp = sys.modules[aspp_sum.__module__]


class TestPromises:
    @on_every_device
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layouts(self, dtype, device):
        rates = (1, 3)
        x, weights, biases = problem((2, 5, 6, 7), 4, rates, dtype, device=device)
        expected = aspp_sum(x, weights, biases, rates=rates)
        for name, y in layouts(x):
            before = y.clone()
            out = aspp_sum(y, weights, biases, rates=rates)
            tolerance = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
            assert float((out - expected).abs().max()) <= tolerance, name
            assert torch.equal(y, before), name
        grads = layouts(random(2, 4, 6, 7, device=device))
        for (name, w), (_, g) in zip(layouts(weights[0]), grads, strict=True):
            out = aspp_sum(x, [w, weights[1]], biases, rates=rates)
            assert same_bits(out, expected), name
            found = [
                gradients(aspp_sum, (x, weights, biases), grad.to(dtype), rates)
                for grad in (g, g.contiguous())
            ]
            n = -len(biases)  # torch sums those of biases
            assert all(same_bits(a, b) for a, b in zip(*(f[:n] for f in found), strict=True)), name
        one = one_number((2, 5, 6, 7), device=device).to(dtype)
        assert same_bits(
            aspp_sum(one, weights, rates=rates), aspp_sum(one.contiguous(), weights, rates=rates)
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_expanded_gradients(self, dtype, every_way):
        """The same bits as of gradients in memory of their own."""
        x, weights, _ = problem((2, 37, 9, 11), 21, (2, 5), dtype, device=every_way)
        for name, grad in expansions(random(2, 21, 9, 11, seed=4).to(every_way, dtype)):
            found = []
            for of_out in (grad, grad.contiguous()):
                leaves = [t.clone().requires_grad_() for t in (x, *weights)]
                out = aspp_sum(leaves[0], leaves[1:], rates=(2, 5))
                found.append(torch.autograd.grad(out, leaves, of_out))
            assert all(map(same_bits, *found)), name

    @on_every_device
    def test_empty_batch(self, device):
        x, weights, biases = problem((0, 3, 4, 5), 2, (1, 2), torch.float32, device=device)
        grad = torch.zeros(0, 2, 4, 5, device=device)
        found = gradients(aspp_sum, (x, weights, biases), grad, (1, 2))
        assert found[0].shape == (0, 2, 4, 5) and found[1].shape == x.shape
        assert not any(t.any() for t in found[2:])

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_runs_and_threads(self, dtype, form, monkeypatch):
        """The same bits on any number of threads; of torch's products, from run to run."""
        rates = (6, 12)
        arguments = problem((2, 300, 33, 33), 21, rates, dtype, form)
        grad = random(2, 21, 33, 33, seed=3).to(dtype)
        for own in (True, False):
            use_products(monkeypatch, own)
            seen = []
            for count in (1, 2, 3):
                with threads(count):
                    one, two = (gradients(aspp_sum, arguments, grad, rates) for _ in range(2))
                    assert all(map(same_bits, one, two))
                    seen.append(one[:-2])  # torch sums the gradients of biases
            assert not own or all(all(map(same_bits, row, seen[0])) for row in seen)
        taps = products.taps_of(rates, 70, 90)
        maps = random(len(taps.rows), 21, 70, 90).to(dtype)
        bias = random(21).to(torch.promote_types(dtype, torch.float32))
        found = []
        for count in (1, 2, 4):
            with threads(count):
                out = torch.empty(1, 21, 70, 90, dtype=dtype).contiguous(memory_format=form)[0]
                torch.ops.pydense._tap_sum(out, maps, bias, taps.rows, taps.columns)
                shifted = torch.empty_like(maps)
                torch.ops.pydense._tap_spread(shifted, out, 0, taps.rows, taps.columns)
                found.append((out, shifted))
        for row in found[1:]:
            assert all(map(same_bits, row, found[0]))

    def test_what_is_saved_for_backward(self):
        """x for the gradients of weights, weights for that of x."""

        def saved(x, weights):
            kept = set()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: kept.add(t.data_ptr()) or t, lambda t: t
            ):
                aspp_sum(x, weights, rates=(1, 2))
            return kept

        x, weights, _ = problem((1, 3, 6, 7), 2, (1, 2), torch.float32)
        places = {w.data_ptr() for w in weights}
        assert saved(x, weights) == set()
        assert saved(x.requires_grad_(), weights) == places
        x.requires_grad_(False)
        weights[1].requires_grad_()
        assert saved(x, weights) == {x.data_ptr()}
        assert saved(x.requires_grad_(), weights) == {x.data_ptr(), *places}
        with torch.no_grad():
            assert saved(x, weights) == set()

    @on_every_device
    @pytest.mark.parametrize("batch", [1, 2])
    def test_backward_in_autocasts_region(self, batch, device):
        """Tensors have the dtypes that forward chose."""
        x, weights, _ = problem((batch, 5, 6, 7), 4, (1, 2), torch.float32, device=device)
        leaves = [t.requires_grad_() for t in (x, *weights)]
        grad = random(batch, 4, 6, 7, seed=4).to(device)
        found = []
        for enabled in (False, True):
            out = aspp_sum(x, weights, rates=(1, 2))
            with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
                found.append(torch.autograd.grad(out, leaves, grad))
        assert all(map(same_bits, *found))

    @pytest.mark.parametrize("form", FORMATS)
    def test_launches_on_a_gpu(self, form):
        """One for the weights and one for the maps; backward as well, and one for each weight."""
        if reason := _backends.missing("simt"):
            pytest.skip(reason)
        arguments = problem((2, 3, 6, 7), 4, (1, 2), torch.float32, form)
        with _backends.use("simt"):
            before = _backends.simt_launches()
            aspp_sum(*arguments, rates=(1, 2))
            assert _backends.simt_launches() == before + 2
            gradients(aspp_sum, arguments, torch.ones(2, 4, 6, 7), (1, 2))
            assert _backends.simt_launches() == before + 4 + 2 + 2

    def test_explain(self, monkeypatch):
        x, weights, biases = problem((1, 3, 4, 5), 2, (1, 2), torch.bfloat16)
        for own, words in ((True, "pydense's kernels: "), (False, "torch's product, pydense's")):
            use_products(monkeypatch, own)
            monkeypatch.setattr(aspp, "own_products", products.own_products)
            said = pydense.explain("aspp_sum", x, weights, biases, rates=(1, 2))
            assert said.startswith(words) and ("AMX" in said) == (not own)
        with pytest.raises(ValueError, match="aspp_sum: rates must be 2 as the weights, got 1"):
            pydense.explain("aspp_sum", x, weights, rates=(1,))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
    def test_explain_on_a_gpu(self):
        arguments = problem((1, 3, 4, 5), 2, (1, 2), torch.bfloat16, device="cuda")
        assert "x is on cuda" in pydense.explain("aspp_sum", *arguments, rates=(1, 2))

    def test_second_derivatives_and_tangents_raise(self):
        x, weights, _ = problem((1, 3, 4, 5), 2, (1,), torch.float64)
        out = aspp_sum(x.requires_grad_(), weights, rates=(1,))
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="aspp_sum_backward"):
            grad.sum().backward()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="aspp_sum: x must have no tangent"):
                aspp_sum(dual, weights, rates=(1,))

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"x": 3}, TypeError, "x must be a tensor, got"),
            ({"x": torch.zeros(1, 2, 3)}, ValueError, "x must have a shape out of"),
            ({"x": torch.zeros(1, 2, 3, 4).int()}, TypeError, "x must be of dtype"),
            ({"x": torch.zeros(1, 2, 0, 4)}, ValueError, "x must have H and W >= 1"),
            (
                {"x": torch.zeros(1, 2, 3, 4, device="meta")},
                NotImplementedError,
                "x must be on the CPU",
            ),
            ({"weights": []}, ValueError, "weights must be 1 to 64 tensors, got 0"),
            ({"weights": torch.zeros(2, 2)}, TypeError, "weights must be a sequence of tensors"),
            ({"weights": [3]}, TypeError, r"weights\[0\] must be a tensor"),
            (
                {"weights": [torch.zeros(2, 3, 3, 3)]},
                ValueError,
                r"weights\[0\] must have shape \(2, 2, 3, 3\), got \(2, 3, 3, 3\)",
            ),
            ({"weights": [torch.zeros(2, 2)]}, ValueError, r"weights\[0\] must have shape \(O, 2"),
            (
                {"weights": [torch.zeros(2, 2, 3, 3).half()]},
                TypeError,
                r"weights\[0\] must be of dtype torch.float32 as x, got torch.float16",
            ),
            (
                {"weights": [torch.zeros(2, 2, 3, 3, device="meta")]},
                ValueError,
                r"weights\[0\] must be on cpu as x, got meta",
            ),
            (
                {"biases": [torch.zeros(2)] * 2},
                ValueError,
                "biases must be 1 as the weights, got 2",
            ),
            ({"biases": [torch.zeros(3)]}, ValueError, r"biases\[0\] must have shape \(2,\)"),
            ({"rates": 6}, TypeError, "rates must be a sequence of integers"),
            ({"rates": []}, ValueError, "rates must be 1 as the weights, got 0"),
            ({"rates": [0]}, ValueError, r"rates\[0\] must be in \[1, 2147483647\], got 0"),
            ({"rates": [1.5]}, TypeError, r"rates\[0\] must be an integer"),
        ],
    )
    def test_bad_arguments(self, change, error, text):
        arguments = {
            "x": torch.zeros(1, 2, 3, 4),
            "weights": [torch.zeros(2, 2, 3, 3)],
            "rates": [2],
            **change,
        }
        with pytest.raises(error, match=f"aspp_sum: {text}"):
            aspp_sum(**arguments)
