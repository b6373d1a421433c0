# SPDX-License-Identifier: Apache-2.0
"""Depthwise-separable atrous convolution as a GPU has it, in two steps and in one pass: under the
shim too."""

from __future__ import annotations

import re
import sys

import _backends
import pytest
import torch
from _ops import layouts, same_bits
from _ops import one_thread as one_thread
from _separable import CASES, DTYPES, FORMATS, check, gradients, problem
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import pydense
from pydense import reference
from pydense.ops import atrous_separable_conv2d

separable = sys.modules[atrous_separable_conv2d.__module__]


@pytest.fixture
def gpu(cuda_code, monkeypatch):
    """A kernel and a product of torch's; the device."""
    monkeypatch.setattr(separable, "in_two_because", lambda *_: "it is a test")
    with _backends.use(cuda_code) as chosen:
        yield chosen.device


class TestOnAGpu:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 4, 5, 8, 9)])
    def test_values_and_gradients(self, case, dtype, form, gpu):
        check(*case, dtype, form, device=gpu)

    @pytest.mark.parametrize("form", FORMATS)
    def test_activations_and_no_biases(self, form, gpu):
        parts = problem((2, 7, 8, 9), 5, (3, 3), torch.float64, form, device=gpu)
        options = {"dilation": 3, "inner_activation": "relu", "activation": "relu"}
        for arguments in (parts, parts[:3]):
            own = gradients(atrous_separable_conv2d, arguments, options)
            exact = gradients(reference.atrous_separable_conv2d, arguments, options)
            for a, b in zip(own, exact, strict=True):
                assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        empty = problem((0, 7, 8, 9), 5, (3, 3), torch.float32, form, device=gpu)
        assert atrous_separable_conv2d(*empty).shape == (0, 5, 8, 9)

    @pytest.mark.parametrize("form", FORMATS)
    def test_gradcheck(self, form, gpu):
        leaves = [
            t.requires_grad_()
            for t in problem((1, 2, 4, 5), 3, (3, 3), torch.float64, form, device=gpu)
        ]

        def run(*arguments):
            return atrous_separable_conv2d(*arguments, dilation=2, inner_activation="relu")

        assert gradcheck(run, leaves) and gradgradcheck(run, leaves, fast_mode=True)

    def test_explain(self, gpu):
        parts = problem((2, 4, 6, 7), 5, (3, 3), torch.float32, device=gpu)
        said = pydense.explain("atrous_separable_conv2d", *parts, dilation=2)
        assert said.startswith("pydense's depthwise kernels, then torch's product, the map")
        assert said.endswith("in memory: it is a test")

    def test_explain_on_the_cpu(self):
        parts = problem((2, 4, 6, 7), 5, (3, 3), torch.float32)
        said = pydense.explain("atrous_separable_conv2d", *parts)
        assert said.startswith("pydense's kernels: x is on the CPU")

    def test_compiled(self, gpu):
        torch._dynamo.reset()
        parts = problem((2, 4, 6, 7), 5, (3, 3), torch.float32, device=gpu)
        function = torch.compile(atrous_separable_conv2d, fullgraph=True, backend="aot_eager")
        assert same_bits(function(*parts), atrous_separable_conv2d(*parts))


@pytest.fixture
def one_pass(cuda_code, monkeypatch):
    """The fused kernel; the device."""
    monkeypatch.setattr(separable, "in_two_because", lambda *_: None)
    with _backends.use(cuda_code) as chosen:
        yield chosen


# In units in the last place of the largest number: float32 is multiplied in TF32.
TF32_FLOOR = 2**-10
ONE_PASS = [case for case in CASES if case[2] == (3, 3)]


class TestInOnePass:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize(
        ("case", "dtype"),
        [(i, DTYPES[1 + (i + j) % 3]) for i in range(len(ONE_PASS)) for j in (0, 1)],
    )
    def test_values(self, case, dtype, form, one_pass):
        """As near to float64 as torch's two convolutions, whose map between is rounded, too."""
        shape, outputs, kernel, options = ONE_PASS[case]
        parts = problem(shape, outputs, kernel, dtype, form, device=one_pass.device)
        own = atrous_separable_conv2d(*parts, **options)
        plain = [t.contiguous() for t in parts]
        theirs = reference.atrous_separable_conv2d(*plain, **options)
        exact = reference.atrous_separable_conv2d(*(t.double() for t in plain), **options)
        floor = TF32_FLOOR if dtype == torch.float32 else torch.finfo(dtype).eps
        error, torchs = (float((t.double() - exact).abs().max()) for t in (own, theirs))
        assert own.dtype == dtype and error <= 2 * torchs + floor * float(exact.abs().max())
        if min(shape) > 1 and min(own.shape) > 1:
            assert own.is_contiguous(memory_format=form)

    def test_promises(self, one_pass):
        """The same bits from every layout and in every schedule; gradients; nothing for nothing."""
        parts = problem((1, 200, 7, 6), 24, (3, 3), torch.bfloat16, device=one_pass.device)
        options = {"dilation": 2, "inner_activation": "relu", "activation": "relu"}
        expected = atrous_separable_conv2d(*parts, **options)
        for name, x in layouts(parts[0]):
            assert same_bits(atrous_separable_conv2d(x, *parts[1:], **options), expected), name
        for schedule in range(3):
            with _backends.use(one_pass.name, schedule):
                assert same_bits(atrous_separable_conv2d(*parts, **options), expected)
        found = gradients(atrous_separable_conv2d, parts, options)
        wide = [t.double() for t in parts]
        exact = gradients(reference.atrous_separable_conv2d, wide, options, torch.bfloat16)
        for a, e in zip(found, exact, strict=True):
            assert (a.double() - e).abs().max() <= 2**-5 * e.abs().max()
        empty = problem((0, 8, 5, 6), 5, (3, 3), torch.float16, device=one_pass.device)
        assert atrous_separable_conv2d(*empty).shape == (0, 5, 5, 6)

    def test_opcheck(self, one_pass):
        parts = problem((2, 5, 6, 7), 4, (3, 3), torch.float16, device=one_pass.device)
        x, depthwise, pointwise, inner, outer = (t.requires_grad_() for t in parts)
        rest = (6, 7, 2, 2, 2, 2, True, True)
        opcheck(
            torch.ops.pydense.atrous_separable_conv2d.default,
            (x, depthwise, inner, pointwise, outer, *rest),
        )

    def test_refused(self, one_pass):
        parts = problem((1, 8, 6, 7), 4, (3, 3), torch.float64, device=one_pass.device)
        with pytest.raises(ValueError, match=r"separable_conv2d: x must be of dtype Float .*TF32"):
            atrous_separable_conv2d(*parts)
        parts = problem((1, 8, 6, 7), 4, (1, 3), torch.float16, device=one_pass.device)
        with pytest.raises(ValueError, match=r"a kernel of 3 x 3 on CUDA, got \(1, 3\)"):
            atrous_separable_conv2d(*parts)


class TestRule:
    """Tensors that say so stand for those of a GPU."""

    @pytest.fixture(autouse=True)
    def experimental(self, monkeypatch):
        monkeypatch.setenv("PYDENSE_EXPERIMENTAL_KERNELS", "1")

    @pytest.mark.parametrize("value", [None, "", "0", "yes"])
    def test_off_by_default(self, value, monkeypatch):
        monkeypatch.delenv("PYDENSE_EXPERIMENTAL_KERNELS")
        if value is not None:
            monkeypatch.setenv("PYDENSE_EXPERIMENTAL_KERNELS", value)
        assert "one pass is predicted to be no faster" in self.said()

    def said(self, dtype=torch.bfloat16, shape=(1, 128, 9, 9), outputs=128, kernel=(3, 3), **more):
        x = OnCuda(torch.empty(shape, dtype=dtype))
        weights = torch.empty(shape[1], 1, *kernel), torch.empty(outputs, shape[1], 1, 1)
        weights = [w.to(dtype).requires_grad_(more.get("grad", False)) for w in weights]
        return separable.in_two_because(x, *weights)

    def test_one_pass(self, monkeypatch):
        assert self.said() is None and self.said(torch.float16) is None
        assert "does not allow TF32" in self.said(torch.float32)
        monkeypatch.setattr(separable, "tf32_products_are_allowed", lambda: True)
        assert self.said(torch.float32) is None
        with torch.no_grad():
            assert self.said(grad=True) is None

    @pytest.mark.parametrize(
        ("more", "why"),
        [
            ({"grad": True}, "a gradient needs the map"),
            ({"dtype": torch.float64}, "for bfloat16, float16 and TF32"),
            ({"kernel": (3, 5)}, r"kernels of 3x3, and this one is \(3, 5\)"),
            ({"outputs": 257}, "128 channels to 257 outputs"),
            ({"outputs": 63}, "128 channels to 63 outputs"),
            ({"shape": (1, 63, 9, 9)}, "63 channels to 128 outputs"),
        ],
    )
    def test_two_steps(self, more, why):
        assert re.search(why, self.said(**more))


class OnCuda(torch.Tensor):
    """Says that it lies on a GPU."""

    @staticmethod
    def __new__(cls, data):
        return data.as_subclass(cls)

    @property
    def device(self):
        return torch.device("cuda")
