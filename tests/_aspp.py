# SPDX-License-Identifier: Apache-2.0
"""What tests of aspp_sum have in common."""

from __future__ import annotations

import pytest
import torch
from _ops import random

from pydense.ops import _aspp_products as products

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def problem(shape, outputs, rates, dtype, form=FORMATS[0], seed=0):
    x = random(*shape, seed=seed).to(dtype).contiguous(memory_format=form)
    scale = (9 * shape[1] * len(rates)) ** -0.5
    weights = [
        (scale * random(outputs, shape[1], 3, 3, seed=seed + 1 + i)).to(dtype)
        for i in range(len(rates))
    ]
    biases = [random(outputs, seed=seed + 70 + i).to(dtype) for i in range(len(rates))]
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


def use_products(patch, own):
    """Those of pydense, or torch's, whatever the CPU."""
    patch.setattr(products, "own_products", lambda dtype: own)


@pytest.fixture(params=["own products", "torch's products"])
def both_products(request, monkeypatch):
    use_products(monkeypatch, request.param == "own products")
