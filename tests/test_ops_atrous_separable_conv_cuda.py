# SPDX-License-Identifier: Apache-2.0
"""Depthwise-separable atrous convolution in two steps, as a GPU has it: under the shim too."""

from __future__ import annotations

import sys

import _backends
import pytest
import torch
from _ops import one_thread as one_thread
from _ops import same_bits
from _separable import CASES, DTYPES, FORMATS, check, gradients, problem
from torch.autograd import gradcheck, gradgradcheck

import pydense
from pydense import reference
from pydense.ops import atrous_separable_conv2d

separable = sys.modules[atrous_separable_conv2d.__module__]


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request, monkeypatch):
    """A kernel and a product of torch's; the device."""
    if reason := _backends.missing(request.param):
        pytest.skip(reason)
    monkeypatch.setattr(separable, "_is_in_two", lambda x: True)
    with _backends.use(request.param) as chosen:
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
        assert said.startswith("pydense's depthwise kernels, then torch's product")

    def test_explain_on_the_cpu(self):
        parts = problem((2, 4, 6, 7), 5, (3, 3), torch.float32)
        said = pydense.explain("atrous_separable_conv2d", *parts)
        assert said.startswith("pydense's kernels: x is on the CPU")

    def test_compiled(self, gpu):
        torch._dynamo.reset()
        parts = problem((2, 4, 6, 7), 5, (3, 3), torch.float32, device=gpu)
        function = torch.compile(atrous_separable_conv2d, fullgraph=True, backend="aot_eager")
        assert same_bits(function(*parts), atrous_separable_conv2d(*parts))
