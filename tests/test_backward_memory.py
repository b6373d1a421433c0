# SPDX-License-Identifier: Apache-2.0
"""Operators that return what backward needs beside their result pay nothing for its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _ops import random
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils._python_dispatch import TorchDispatchMode

from pydense import ops

SIZE = (1, 4, 33, 32)


def _losses(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    image, weight = random(1, 3, *SIZE[2:], seed=1), random(4, 4, 1, 1, seed=2)
    wide = random(4, 4, 3, 3, seed=3)
    many = random(128, 4, 1, 1, seed=4)
    winograd = random(128, 128, 3, 3, seed=5)
    depthwise = random(4, 1, 3, 3, seed=6)
    target = torch.zeros(1, 66, 64, dtype=torch.int64)
    return {
        "max_pool2d_same": lambda: ops.max_pool2d_same(x, 3),
        "chained_residual_pool": lambda: ops.chained_residual_pool(x, [weight, weight]),
        "chained_residual_pool, 3x3": lambda: ops.chained_residual_pool(x, [wide, wide]),
        "chained_residual_pool, 3x3, many channels": lambda: ops.chained_residual_pool(
            conv2d(x, many), [winograd]
        ),
        "atrous_conv2d": lambda: ops.atrous_conv2d(x, depthwise, dilation=2, groups=4),
        "dense_crf": lambda: ops.dense_crf(x, image, iterations=2),
        "dense_crf, gradient of the image": lambda: ops.dense_crf(
            x, image.clone().requires_grad_(), iterations=2
        ),
        "upsample_cross_entropy": lambda: ops.upsample_cross_entropy(x, target),
    }


NAMES = list(_losses(torch.zeros(SIZE)))


class _Filled(TorchDispatchMode):
    """Notes the tensors that torch fills with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[torch.Size] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default):
            self.sizes.append(out.shape)
        return out


@pytest.mark.parametrize("name", NAMES)
def test_backward_fills_nothing(name):
    """autograd fills a gradient for every output that has none, unless it is told not to."""
    x = random(*SIZE).requires_grad_()
    out = _losses(x)[name]()
    with _Filled() as filled:
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert filled.sizes == []
    assert grad.abs().max() > 0


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_of_the_result_is_none_of_the_input(name):
    x = random(*SIZE).requires_grad_()
    out: Tensor = _Nothing.apply(_losses(x)[name]())  # type: ignore[no-untyped-call]
    assert torch.autograd.grad(out.sum(), x, allow_unused=True) == (None,)
