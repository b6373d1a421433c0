# SPDX-License-Identifier: Apache-2.0
"""What tests of aspp_sum have in common."""

from __future__ import annotations

import _backends
import pytest
import torch
from _ops import random

from pydense.ops import _aspp_products as products

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


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
