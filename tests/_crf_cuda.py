# SPDX-License-Identifier: Apache-2.0
"""What the tests of the dense CRF and its filters on CUDA share."""

import _backends
import pytest
import torch
from _crf_gradients import variable
from _ops import compats, random


@pytest.fixture
def gpu(cuda_code):
    """Makes the CUDA kernels run in a ``with``, which gives their device."""
    return lambda schedule=2: _backends.use(cuda_code, schedule)


def difference(a, b):
    return float((a.double() - b.double()).abs().max())


def relative(found, expected):
    """L2, of one pass."""
    return float((found.double() - expected).norm() / expected.norm())


def kernels(kind, labels, scale=1.0):
    return {
        "gaussian": {"sxy": 3, "compat": compats(kind, labels, scale)},
        "bilateral": {"sxy": 40, "srgb": 13, "compat": compats(kind, labels, 2 * scale, seed=8)},
    }


def by_inputs(run, inputs, device="cpu", dtype=torch.float64):
    """Gradients of a loss with random weights."""
    leaves = [variable(x, dtype).to(device).detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = random(*(out.shape or (1,)), seed=3).to(out)
    grads = torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)
    return [out.detach().cpu(), *(g.cpu() for g in grads)]


def on_both(gpu, run, inputs, **options):
    expected = by_inputs(run, inputs, **options)
    with gpu() as chosen:
        found = by_inputs(run, inputs, chosen.device, **options)
    return zip(found, expected, strict=True)


def assert_near(pairs, tolerance=1e-9):
    for found, expected in pairs:
        limit = tolerance * (1 + float(expected.abs().max())) if expected.numel() else 0
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= limit if expected.numel() else True
