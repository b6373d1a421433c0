# SPDX-License-Identifier: Apache-2.0
"""Parallel atrous convolutions as torch sees them: opcheck, compile, export, autocast, FLOP."""

from __future__ import annotations

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random
from torch import nn
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from pydense import reference
from pydense.ops import aspp_concat

OPS = torch.ops.pydense
FORMATS = [torch.contiguous_format, torch.channels_last]


def problem(dtype=torch.float32, form=FORMATS[0]):
    """x, weights, pool_weight, scales, biases."""
    x = random(2, 3, 5, 6).to(dtype).contiguous(memory_format=form)
    weights = [random(4, 3, k, k, seed=k).to(dtype) for k in (1, 3)]
    scales = [random(n, seed=4 + n) for n in (4, 4, 2)]
    biases = [random(n, seed=9 + n) for n in (4, 4, 2)]
    return x, weights, random(2, 3, 1, 1, seed=2).to(dtype), scales, biases


def leaves(x, weights, pool, *rows):
    made = [x.requires_grad_(), [w.requires_grad_() for w in weights], pool.requires_grad_()]
    return [*made, *([t.requires_grad_() for t in row] for row in rows)]


class TestTorch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype):
        for form in FORMATS:
            x, weights, pool, scales, biases = leaves(*problem(dtype, form))
            opcheck(OPS.aspp_concat.default, (x, weights, [], pool, scales, biases, [1, 2], True))
            opcheck(OPS.aspp_concat.default, (x, weights, [], None, [], [], [1, 2], False))
            x, weights, pool, scales, biases = problem(dtype, form)
            grad = random(2, 10, 5, 6).to(dtype)
            needed = [True, False, True, False, True, True]
            opcheck(
                OPS.aspp_concat_backward.default,
                (grad, x, weights, pool, scales, [1, 2], True, needed),
            )
            opcheck(
                OPS.aspp_concat_backward.default,
                (grad[:, :8], x, weights, None, [], [1, 2], False, [False, True]),
            )

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler):
        torch._dynamo.reset()

        def call(x, weights, pool, scales, biases):
            return aspp_concat(
                x.sin(),
                weights,
                (1, 2),
                pool_weight=pool,
                scales=scales,
                biases=biases,
                activation="relu",
            )

        function = torch.compile(call, fullgraph=True, backend=compiler)
        for form in FORMATS:
            arguments = leaves(*problem(form=form))
            inputs = [arguments[0], *arguments[1], arguments[2], *arguments[3], *arguments[4]]
            found = []
            for run in (function, call):
                out = run(*arguments)
                found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
            for a, b in zip(*found, strict=True):
                assert a.stride() == b.stride()
                assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())

    def test_export(self):
        _, weights, pool, *_ = problem()

        class Branches(nn.Module):
            def forward(self, x):
                return aspp_concat(x, weights, (1, 4), pool_weight=pool)

        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        program = export(Branches(), (random(2, 3, 8, 9),), dynamic_shapes=shapes).module()
        for size in ((2, 3, 8, 9), (3, 3, 2, 40), (1, 3, 21, 5)):
            x = random(*size)
            assert torch.allclose(program(x), Branches()(x), atol=1e-6)

    def test_autocast_as_a_convolution(self):
        x, weights, pool, scales, biases = leaves(*problem())
        with torch.autocast("cpu", torch.bfloat16):
            out = aspp_concat(x, weights, (1, 2), pool_weight=pool, scales=scales, biases=biases)
            wide = aspp_concat(x.detach().double(), [w.detach().double() for w in weights], (1, 2))
        assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
        out.sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in (x, *weights, pool, *scales, *biases))

    @pytest.mark.parametrize("form", FORMATS)
    def test_backward_inside_autocast(self, form):
        found = []
        for narrow in (False, True):
            x, weights, pool, scales, biases = leaves(*problem(form=form))
            out = aspp_concat(x, weights, (1, 2), pool_weight=pool, scales=scales, biases=biases)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                out.square().sum().backward()
            found.append([t.grad for t in (x, *weights, pool, *scales, *biases)])
        assert all(map(torch.equal, *found))

    def test_flops(self):
        """As torch counts convolutions, forward and backward."""
        counts = []
        for function in (aspp_concat, reference.aspp_concat):
            x, weights, pool, *_ = leaves(*problem())
            with FlopCounterMode(display=False) as counter:
                out = function(x, weights, (1, 2), pool_weight=pool)
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
            counts.append((counter.get_total_flops(), backward.get_total_flops()))
        assert counts[0] == counts[1]
        assert counts[0][0] == 2 * 2 * (30 * 3 * 4 * 10 + 3 * 2)
