# SPDX-License-Identifier: Apache-2.0
"""What the tests of the gradients of the dense CRF share."""

from __future__ import annotations

import torch
from _ops import compats, random
from torch.autograd import gradcheck

from pydense.ops import dense_crf

KINDS = ("potts", "diagonal", "matrix")
KERNELS = {"gaussian": {"sxy": 3, "compat": 3}, "bilateral": {"sxy": 40, "srgb": 13, "compat": 10}}


def variable(x, dtype=torch.float64):
    return torch.as_tensor(x).detach().to(dtype).clone().requires_grad_()


def check(function, *inputs, eps=1e-5, atol=1e-7):
    assert gradcheck(function, inputs, eps=eps, atol=atol, rtol=1e-5)


def gradients(logits, image, dtype, crf=dense_crf, **options):
    """By logits and compatibilities of every form, of a loss with random weights."""
    inputs = [variable(logits, dtype)]
    inputs += [variable(compats(kind, logits.shape[1], 0.3), dtype) for kind in KINDS]
    features = [{"features": random(1, 3, *logits.shape[2:], seed=5), "compat": inputs[3]}]
    out = crf(
        inputs[0],
        image,
        gaussian={"sxy": 3, "compat": inputs[1]},
        bilateral={"sxy": 10, "srgb": 20, "compat": inputs[2]},
        features=features,
        iterations=4,
        **options,
    )
    weights = random(*out.shape, seed=3).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs)
