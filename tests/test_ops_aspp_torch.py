# SPDX-License-Identifier: Apache-2.0
"""Sums of atrous convolutions as torch sees them: opcheck, compile, export, autocast, FLOP."""

from __future__ import annotations

import pytest
import torch
from _ops import one_thread as one_thread
from _ops import random
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from pydense.nn import ASPPSum
from pydense.ops import aspp_sum

OPS = torch.ops.pydense
FORMATS = [torch.contiguous_format, torch.channels_last]


def problem(dtype=torch.float32, form=FORMATS[0]):
    x = random(2, 3, 5, 6).to(dtype).contiguous(memory_format=form)
    weights = [random(4, 3, 3, 3, seed=i).to(dtype) for i in (1, 2)]
    biases = [random(4, seed=i).to(dtype) for i in (3, 4)]
    return x, weights, biases


def leaves(x, *rows):
    return x.requires_grad_(), *([t.requires_grad_() for t in row] for row in rows)


class TestTorch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype):
        for form in FORMATS:
            x, weights, biases = leaves(*problem(dtype, form))
            for row in (biases, []):
                opcheck(OPS.aspp_sum.default, (x, weights, row, [1, 3]))
            x, weights, biases = problem(dtype, form)
            grad = random(2, 4, 5, 6).to(dtype)
            last = form == torch.channels_last
            for own_x, row in ((x, weights), (None, weights), (x, [])):
                opcheck(
                    OPS.aspp_sum_backward.default, (grad, own_x, row, [1, 3], last, [True, False])
                )
            maps = random(2, 4, 5, 6).to(dtype)
            sums = random(4)
            opcheck(OPS._tap_sum.default, (grad[0], maps, sums, [0, 1], [2, -3]))
            opcheck(OPS._tap_spread.default, (maps, grad[0], 0, [0, 1], [2, -3]))

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_compile(self, compiler):
        torch._dynamo.reset()

        def call(x, weights, biases):
            return aspp_sum(x.relu(), weights, biases, rates=(1, 3))

        function = torch.compile(call, fullgraph=True, backend=compiler)
        for form in FORMATS:
            arguments = leaves(*problem(form=form))
            found = []
            for run in (function, call):
                out = run(*arguments)
                inputs = [arguments[0], *arguments[1], *arguments[2]]
                found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
            for a, b in zip(*found, strict=True):
                assert a.stride() == b.stride()
                assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())

    def test_export(self):
        """With dynamic sizes: also those at which taps come and go."""
        head = ASPPSum(3, 4, rates=(2, 7)).eval()
        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        program = export(head, (random(2, 3, 8, 9),), dynamic_shapes=shapes).module()
        for size in ((2, 3, 8, 9), (3, 3, 2, 40), (1, 3, 21, 5)):
            x = random(*size)
            assert torch.allclose(program(x), head(x), atol=1e-6)

    def test_autocast_as_a_convolution(self):
        x, weights, biases = problem()
        with torch.autocast("cpu", torch.bfloat16):
            out = aspp_sum(x, weights, biases, rates=(1, 3))
        assert out.dtype == torch.bfloat16
        x, weights, biases = leaves(*problem())
        with torch.autocast("cpu", torch.bfloat16):
            out = aspp_sum(x, weights, biases, rates=(1, 3))
        out.sum().backward()
        assert x.grad.dtype == weights[0].grad.dtype == biases[1].grad.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert aspp_sum(*problem(torch.float64), rates=(1, 3)).dtype == torch.float64

    def test_flops(self):
        x, weights, biases = leaves(*problem())
        product = 2 * 2 * 3 * 4 * 30  # of a tap
        with FlopCounterMode(display=False) as counter:
            out = aspp_sum(x, weights, biases, rates=(1, 5))
        assert counter.get_total_flops() == product * (9 + 2)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * product * (9 + 2)

    def test_refused_by_the_kernels(self):
        x, maps = torch.zeros(4, 5, 6), torch.zeros(2, 4, 5, 6)
        for change, text in (
            ({0: x[0]}, "out must have 3 dimensions"),
            ({0: x.int()}, "out must be of dtype"),
            ({1: maps.transpose(2, 3)}, "maps must be contiguous"),
            ({1: maps[:1]}, r"maps must have shape \(2, 4, rows, 6\), got \(1, 4, 5, 6\)"),
            ({1: maps.half()}, "maps must be of dtype Float, got Half"),
            ({1: maps[:, :, :4].contiguous()}, "maps must have 5 rows, got 4"),
            ({2: torch.zeros(3)}, r"bias must have shape \(4\)"),
            ({2: torch.zeros(4).double()}, "bias must be of dtype Float, got Double"),
            ({4: [0]}, "columns must be as many as rows, 2, got 1"),
        ):
            arguments = [x, maps, None, [0, 0], [0, 0]]
            for i, value in change.items():
                arguments[i] = value
            with pytest.raises(ValueError, match=f"_tap_sum: {text}"):
                OPS._tap_sum(*arguments)
        for first, rows in ((-1, 2), (4, 2)):
            with pytest.raises(ValueError, match=r"_tap_spread: rows must lie in \[0, 5\), got 2"):
                OPS._tap_spread(maps[:, :, :rows].contiguous(), x, first, [0, 0], [0, 0])
