# SPDX-License-Identifier: Apache-2.0
"""How each CUDA kernel is reached from Python at the shape of its prediction, and its rival.

A key is ``kernel|shape`` as in ``benchmarks/cuda/counts.json``; a value makes the inputs on the GPU
and returns the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate


class Calls(NamedTuple):
    """Calls of the same work: pydense's, and the best that torch has for it."""

    ours: Callable[[], object]
    rival: Callable[[], object] | None = None


def _selftest() -> Calls:
    x = torch.ones(1 << 26, device="cuda")
    return Calls(lambda: torch.ops.pydense._selftest(x), lambda: x * 2 + 1)


def _cross_entropy(layout: str = "", gradient: bool = True) -> Calls:
    from torch.nn.functional import cross_entropy

    from pydense.ops import upsample_cross_entropy

    x = torch.randn(1, 19, 256, 512, device="cuda", requires_grad=gradient)
    if layout:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_(gradient)
    target = torch.randint(19, (1, 1024, 2048), device="cuda")

    def ours() -> object:
        loss = upsample_cross_entropy(x, target)
        return torch.autograd.grad(loss, x) if gradient else loss

    def theirs() -> object:
        loss = cross_entropy(_full(x), target)
        return torch.autograd.grad(loss, x) if gradient else loss

    return Calls(ours, theirs)


HEAD = "1x19x256x512 to 1024x2048"
HEAD_BACK = "1x19x256x512 from 1024x2048"
HEAD_SIZE = (1024, 2048)


def _head_logits(layout: str = "", areas: bool = False) -> Tensor:
    x = torch.randn(1, 19, 256, 512, device="cuda")
    if areas:  # two of them, as the counted launch has
        x[:, 7, :, :320] = 20
        x[:, 11, :, 320:] = 20
    return x.to(memory_format=torch.channels_last) if layout else x


def _full(x: Tensor) -> Tensor:
    return interpolate(x, HEAD_SIZE, mode="bilinear")


def _argmax(layout: str = "", areas: bool = False) -> Calls:
    from pydense.ops import upsample_argmax

    x = _head_logits(layout, areas)
    return Calls(lambda: upsample_argmax(x, HEAD_SIZE), lambda: _full(x).argmax(1))


def _softmax(layout: str = "") -> Calls:
    from pydense.ops import upsample_softmax

    x = _head_logits(layout)
    return Calls(lambda: upsample_softmax(x, HEAD_SIZE), lambda: _full(x).softmax(1))


def _softmax_backward(layout: str = "") -> Calls:
    x = _head_logits(layout)
    leaf = x.clone().requires_grad_()
    upstream = torch.randn_like(_full(x))
    out = _full(leaf).softmax(1)
    op = torch.ops.pydense.upsample_softmax_backward
    return Calls(
        lambda: op(upstream, x, False),
        lambda: torch.autograd.grad(out, leaf, upstream, retain_graph=True),
    )


def _accumulate(layout: str = "") -> Calls:
    from pydense.ops import upsample_accumulate

    x = _head_logits(layout)
    dst = torch.zeros_like(_full(x))
    weight = torch.rand(HEAD_SIZE, device="cuda")
    return Calls(
        lambda: upsample_accumulate(dst, x, 0, 0, HEAD_SIZE, weight=weight),
        lambda: dst.add_(_full(x) * weight),
    )


CASES: dict[str, Callable[[], Calls]] = {
    f"upsample_argmax_kernel|{HEAD}, noise": _argmax,
    f"upsample_argmax_kernel|{HEAD}, noise, channels last": lambda: _argmax("channels last"),
    f"upsample_argmax_kernel|{HEAD}, areas": lambda: _argmax(areas=True),
    f"upsample_softmax_kernel|{HEAD}": _softmax,
    f"upsample_softmax_kernel|{HEAD}, channels last": lambda: _softmax("channels last"),
    f"upsample_softmax_backward_kernel|{HEAD_BACK}": _softmax_backward,
    f"upsample_softmax_backward_kernel|{HEAD_BACK}, channels last": (
        lambda: _softmax_backward("channels last")
    ),
    f"softmax_backward_sum_kernel|{HEAD_BACK}": _softmax_backward,
    f"softmax_backward_sum_kernel|{HEAD_BACK}, channels last": (
        lambda: _softmax_backward("channels last")
    ),
    f"upsample_accumulate_kernel|{HEAD}": _accumulate,
    f"upsample_accumulate_kernel|{HEAD}, channels last": lambda: _accumulate("channels last"),
    f"cross_entropy_kernel|{HEAD}": _cross_entropy,
    f"cross_entropy_finish_kernel|{HEAD}": _cross_entropy,
    f"cross_entropy_kernel|{HEAD}, channels last": lambda: _cross_entropy("channels last"),
    f"cross_entropy_finish_kernel|{HEAD}, channels last": (lambda: _cross_entropy("channels last")),
    f"cross_entropy_kernel|{HEAD}, no gradient": lambda: _cross_entropy(gradient=False),
    f"cross_entropy_finish_kernel|{HEAD}, no gradient": (lambda: _cross_entropy(gradient=False)),
    "selftest_kernel|2^26 floats": _selftest,
}
