# SPDX-License-Identifier: Apache-2.0
"""Sums of atrous convolutions against float64: values, gradients, layouts, promises."""

from __future__ import annotations

import pytest
import torch
from _aspp import DTYPES, FORMATS, gradients, on_every_device, problem, use_products, wide
from _aspp import device as device
from _aspp import every_way as every_way
from _ops import random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from pydense import _core, reference
from pydense.ops import _aspp_products as products
from pydense.ops import aspp_sum

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


# In units in the last place of the largest number. Of float64, torch itself is the reference; in
# float32 a weight's gradient is one sum over all pixels.
FLOOR = {torch.float64: 64, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


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
