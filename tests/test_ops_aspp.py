# SPDX-License-Identifier: Apache-2.0
"""Sums of atrous convolutions against float64: values, gradients, layouts, promises."""

from __future__ import annotations

import sys

import _backends
import pytest
import torch
from _ops import expansions, layouts, one_number, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck

import pydense
from pydense import _core, reference
from pydense.ops import _aspp_products as products
from pydense.ops import aspp_sum

aspp = sys.modules[aspp_sum.__module__]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
# (batch, channels, height, width), outputs, rates: small, the published rates, beyond the map, one
# pixel, one row, wider than a tile, tiles of outputs, equal rates.
CASES = [
    ((2, 5, 9, 11), 3, (1, 3)),
    ((1, 24, 33, 41), 21, (6, 12, 18, 24)),
    ((2, 3, 7, 12), 5, (6, 7, 8, 40)),
    ((3, 4, 1, 1), 2, (1, 2)),
    ((1, 6, 1, 40), 3, (2, 39)),
    ((1, 8, 5, 1030), 2, (1, 600)),
    ((2, 4, 8, 6), 37, (2, 2, 5)),
]


def problem(shape, outputs, rates, dtype, form=FORMATS[0], seed=0, device="cpu"):
    def made(*size, seed):
        return random(*size, seed=seed).to(device, dtype)

    x = made(*shape, seed=seed).contiguous(memory_format=form)
    scale = (9 * shape[1] * len(rates)) ** -0.5
    weights = [scale * made(outputs, shape[1], 3, 3, seed=seed + 1 + i) for i in range(len(rates))]
    biases = [made(outputs, seed=seed + 70 + i) for i in range(len(rates))]
    return x, weights, biases


def gradients(function, arguments, grad, rates):
    """Output and gradients of everything."""
    x, weights, biases = arguments
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, *weights, *biases)
    ]
    n = len(weights)
    out = function(leaves[0], leaves[1 : n + 1], leaves[n + 1 :], rates=rates)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def wide(arguments):
    x, weights, biases = arguments
    return x.double(), [w.double() for w in weights], [b.double() for b in biases]


# In units in the last place of the largest number. Of float64, torch itself is the reference; in
# float32 a weight's gradient is one sum over all pixels.
FLOOR = {torch.float64: 64, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def use_products(patch, own):
    """Those of pydense, or torch's, whatever the CPU."""
    patch.setattr(products, "own_products", lambda dtype: own)


CUDA_CODE = ["simt", pytest.param("cuda", marks=pytest.mark.cuda)]
on_every_device = pytest.mark.parametrize("device", ["cpu", *CUDA_CODE], indirect=True)


@pytest.fixture(params=["own products", "torch's products", *CUDA_CODE])
def every_way(request, monkeypatch):
    """Kernels of the CPU, around either products, and those of a GPU; the device."""
    yield from device_of(request.param, monkeypatch)


@pytest.fixture
def device(request, monkeypatch):
    """Kernels of the CPU and of a GPU."""
    yield from device_of(request.param, monkeypatch)


def device_of(name, patch):
    if "products" in name:
        use_products(patch, name == "own products")
    backend = name if name in _backends.NAMES else "cpu"
    if reason := _backends.missing(backend):
        pytest.skip(reason)
    with _backends.use(backend) as chosen:
        yield chosen.device


def check(shape, outputs, rates, dtype, form, seed=0, device="cpu"):
    """At most twice torch's own error on contiguous tensors, plus the floor.

    (In channels_last, some of torch's bfloat16 gradients of dilated convolutions are NaN.)
    """
    arguments = problem(shape, outputs, rates, dtype, form, seed, device)
    grad = random(shape[0], outputs, *shape[2:], seed=seed + 99).to(device, dtype)
    exact = gradients(reference.aspp_sum, wide(arguments), grad.double(), rates)
    theirs = gradients(reference.aspp_sum, (arguments[0].contiguous(), *arguments[1:]), grad, rates)
    own = gradients(aspp_sum, arguments, grad.contiguous(memory_format=form), rates)
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    for a, b, e in zip(own, theirs, exact, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        error, torchs = (float((t.double() - e).abs().max()) for t in (a, b))
        assert error <= 2 * torchs + floor * float(e.abs().max())
    if min(shape) > 1:
        assert own[1].is_contiguous(memory_format=form)
        assert outputs == 1 or own[0].is_contiguous(memory_format=form)


class TestAgainstTorch:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(self, case, dtype, form, every_way):
        check(*case, dtype, form, device=every_way)

    @settings(max_examples=30)
    @given(
        shape=st.tuples(
            st.integers(1, 3), st.integers(1, 12), st.integers(1, 20), st.integers(1, 30)
        ),
        outputs=st.integers(1, 20),
        rates=st.lists(st.integers(1, 34), min_size=1, max_size=4),
        dtype=st.sampled_from(DTYPES),
        last=st.booleans(),
        seed=st.integers(0, 9),
    )
    def test_any_shape(self, shape, outputs, rates, dtype, last, seed, every_way):
        check(shape, outputs, rates, dtype, FORMATS[last], seed, every_way)

    @pytest.mark.parametrize(
        "case",
        [
            # Blocks of pixels in a row and over rows, parts of the depth, slabs, groups of the
            # stack and of channels, none whole; taps that reach little of the picture.
            ((2, 531, 5, 23), 9, (1, 4, 22)),
            ((1, 70, 20, 67), 67, (3,)),
            ((2, 300, 17, 31), 50, (30, 16)),
            ((1, 2, 300, 9), 3, (290, 5)),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("form", FORMATS)
    def test_blocks(self, case, dtype, form, monkeypatch):
        use_products(monkeypatch, own=True)
        check(*case, dtype, form)

    @pytest.mark.parametrize("capability", _core.cpu_capabilities())
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_instruction_sets(self, capability, dtype, restore_core):
        torch.ops.pydense._set_cpu_capability(capability)
        assert products.own_products(dtype) == (dtype != torch.bfloat16 or capability != "amx")
        for form in FORMATS:
            check((2, 40, 9, 21), 13, (1, 8, 20), dtype, form)

    def test_error_on_average(self):
        """Of the published head with less channels; 16 bits are more exact than torch's."""
        shape, rates = (1, 256, 41, 41), (6, 12, 18, 24)
        for dtype, share in ((torch.float32, 1.5), (torch.bfloat16, 1), (torch.float16, 1)):
            arguments = problem(shape, 21, rates, dtype)
            exact = reference.aspp_sum(*wide(arguments), rates=rates)
            own, theirs = (
                float((f(*arguments, rates=rates).double() - exact).square().mean().sqrt())
                for f in (aspp_sum, reference.aspp_sum)
            )
            assert own <= share * theirs

    def test_bfloat16_without_instructions(self, monkeypatch):
        """Products in float32, in parts of few channels; closer than those in bfloat16."""
        case = ((2, 24, 13, 17), 5, (2, 5, 14))
        use_products(monkeypatch, own=False)
        arguments = problem(*case, torch.bfloat16)
        exact = reference.aspp_sum(*wide(arguments), rates=case[2])
        found = []
        for instructions in (True, False):
            use_products(monkeypatch, own=False)
            monkeypatch.setattr(products, "_multiplies_bfloat16", lambda i=instructions: i)
            for workspace in (products.WORKSPACE, 13 * 17 * 4 * 5):
                monkeypatch.setattr(products, "WORKSPACE", workspace)
                check(*case, torch.bfloat16, FORMATS[0])
            monkeypatch.undo()
            use_products(monkeypatch, own=False)
            monkeypatch.setattr(products, "_multiplies_bfloat16", lambda i=instructions: i)
            found.append(float((aspp_sum(*arguments, rates=case[2]) - exact).abs().max()))
        assert found[1] <= found[0]
        assert found[1] <= 2**-8 * float(exact.abs().max())

    @on_every_device
    def test_gradcheck(self, device):
        for form in FORMATS:
            size = (2, 2, 4, 5)
            x, weights, biases = problem(size, 3, (1, 3), torch.float64, form, device=device)
            leaves = [
                t.clone(memory_format=torch.preserve_format).requires_grad_()
                for t in (x, *weights, *biases)
            ]
            assert gradcheck(lambda x, *p: aspp_sum(x, p[:2], p[2:], rates=(1, 3)), leaves)

    @on_every_device
    @pytest.mark.parametrize("needed", range(1, 8))
    def test_some_gradients_alone(self, needed, device):
        """Of the picture, of one weight, of one bias, and their combinations."""
        rates = (1, 4, 2)
        arguments = problem((2, 3, 6, 7), 4, rates, torch.float64, device=device)
        x, weights, biases = arguments
        ones = torch.ones(2, 4, 6, 7, device=device).double()
        everything = gradients(aspp_sum, arguments, ones, rates)
        for bit, leaf in ((1, x), (2, weights[1]), (4, biases[2])):
            leaf.requires_grad_(bool(needed & bit))
        aspp_sum(x, weights, biases, rates=rates).sum().backward()
        for bit, leaf, place in ((1, x, 1), (2, weights[1], 3), (4, biases[2], 7)):
            assert (leaf.grad is not None) == bool(needed & bit)
            if leaf.grad is not None:
                assert torch.allclose(leaf.grad, everything[place])


class TestSemantics:
    @on_every_device
    def test_infinities_and_nan(self, device):
        """Reach the outputs whose taps read them, and no others: padding is not multiplied."""
        rates = (2, 5)
        x, weights, _ = problem((1, 3, 8, 9), 2, rates, torch.float32, device=device)
        x[0, 1, 3, 4] = float("nan")
        own = aspp_sum(x, weights, rates=rates)
        theirs = reference.aspp_sum(x, weights, rates=rates)
        assert torch.equal(own.isnan(), theirs.isnan())
        assert torch.allclose(own.nan_to_num(), theirs.nan_to_num(), atol=1e-4)
        x, weights, _ = problem((1, 3, 4, 4), 2, (4,), torch.float32, device=device)
        weights[0][:, :, 0] = float("inf")
        assert torch.allclose(
            aspp_sum(x, weights, rates=(4,)),
            torch.nn.functional.conv2d(x, weights[0][:, :, 1:2, 1:2].contiguous()),
            atol=1e-5,
        )

    def test_taps(self):
        """The centre once, equal ones together, none that only meets padding; by rows."""
        taps = products.taps_of((6, 12, 18, 24), 65, 65)
        assert len(taps.rows) == 33 and sorted(map(len, taps.members)) == 32 * [1] + [4]
        assert taps.rows == sorted(taps.rows)
        assert len(products.taps_of((2, 2), 9, 9).rows) == 9
        assert len(products.taps_of((9, 30), 9, 40).rows) == 1 + 2 + 2
        assert products.taps_of((9,), 9, 9) == ([0], [0], [[(0, 4)]])

    def test_workspace_changes_no_more_than_rounding(self, monkeypatch, every_way):
        """Groups of outputs, bands of rows, parts of channels, in both formats."""
        own = products.own_products
        for dtype in (torch.float64, torch.float16):
            for form in FORMATS:
                arguments = problem((2, 6, 9, 8), 7, (1, 3, 5), dtype, form, device=every_way)
                grad = random(2, 7, 9, 8, seed=5).to(every_way, dtype)
                whole = gradients(aspp_sum, arguments, grad, (1, 3, 5))
                for workspace in (1, 25 * 72 * 8 * 3, 9000):
                    monkeypatch.setattr(products, "WORKSPACE", workspace)
                    parts = gradients(aspp_sum, arguments, grad, (1, 3, 5))
                    monkeypatch.undo()
                    monkeypatch.setattr(products, "own_products", own)
                    for a, b in zip(parts, whole, strict=True):
                        tolerance = 4 * torch.finfo(dtype).eps * float(b.abs().max())
                        assert float((a - b).abs().max()) <= tolerance

    def test_workspace_is_bounded(self, monkeypatch):
        made = []
        empty = torch.Tensor.new_empty

        def new_empty(self, size, **options):
            tensor = empty(self, size, **options)
            made.append(tensor.numel() * tensor.itemsize)
            return tensor

        use_products(monkeypatch, own=False)
        monkeypatch.setattr(products, "WORKSPACE", 17 * 400 * 4 * 3)
        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        arguments = problem((1, 4, 20, 20), 11, (1, 3), torch.float32)
        gradients(aspp_sum, arguments, torch.ones(1, 11, 20, 20), (1, 3))
        # Forward by three outputs of eleven, backward by five rows of twenty.
        assert len(made) == 4 + 4 and max(made) <= products.WORKSPACE


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
