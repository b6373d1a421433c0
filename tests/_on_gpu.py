# SPDX-License-Identifier: Apache-2.0
"""What the tests of the exact filter's CUDA kernels share."""

from __future__ import annotations

import _backends
import pytest
import torch
from _ops import compats


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def on_gpu(request):
    """Calls a function with its tensors where the CUDA kernels are; the result on the CPU."""
    if reason := _backends.missing(request.param):
        pytest.skip(reason)

    def move(value, device):
        if isinstance(value, dict):
            return {key: move(item, device) for key, item in value.items()}
        if isinstance(value, list):
            return [move(item, device) for item in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def call(function, *arguments, schedule=2, **options):
        with _backends.use(request.param, schedule) as chosen:
            out = function(*move([*arguments], chosen.device), **move(options, chosen.device))
            return move([out], "cpu")[0]

    return call


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
