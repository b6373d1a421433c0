# SPDX-License-Identifier: Apache-2.0
"""Chained residual pooling as torch sees it: opcheck, compile, export, autocast, FLOP."""

from __future__ import annotations

import pytest
import torch
from _chains import DTYPES, FORMATS, OPS, VARIANTS, leaves, problem
from _ops import one_thread as one_thread
from _ops import random
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from pydense.ops import chained_residual_pool
from pydense.ops._conv1x1_gradient import conv1x1_backward


class TestTorch:
    @pytest.mark.parametrize("pool_first", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, backend, dtype, pool_first):
        for form in FORMATS:
            on = {"device": backend.device}
            x, weights, biases = leaves(*problem((2, 3, 5, 6), 2, 1, dtype, form, True, **on))
            for row in (biases, []):
                opcheck(
                    OPS.chained_residual_pool.default,
                    (x, weights, row, pool_first, 5, True, True),
                )

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_compile(self, backend, kernel, compiler):
        torch._dynamo.reset()

        def both(x, weights, biases):
            return [chained_residual_pool(x, weights, biases, variant=v) for v in VARIANTS]

        function = torch.compile(both, fullgraph=True, backend=compiler)
        for form in FORMATS:
            on = {"device": backend.device}
            arguments = leaves(*problem((2, 5, 6, 7), 2, kernel, torch.float32, form, True, **on))
            found = []
            for run in (function, both):
                out = run(*arguments)
                inputs = [arguments[0], *arguments[1], *arguments[2]]
                grads = torch.autograd.grad([o.square().sum() for o in out], inputs)
                found.append([*out, *grads])
            for a, b in zip(*found, strict=True):
                assert (a - b).abs().max() <= 1e-4 * (1 + b.abs().max())

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_export(self, backend, kernel):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weights = torch.nn.ParameterList(
                    problem((1, 3, 1, 1), 2, kernel, torch.float32, FORMATS[0], False)[1]
                )

            def forward(self, x):
                return chained_residual_pool(x, list(self.weights))

        model = Model().eval().to(backend.device)
        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        x = random(2, 3, 8, 9, device=backend.device)
        program = export(model, (x,), dynamic_shapes=shapes).module()
        for size in ((2, 3, 8, 9), (3, 3, 21, 40)):
            x = random(*size, device=backend.device)
            assert torch.allclose(program(x), model(x), atol=1e-5)

    def test_compile_and_export_of_wide_stages(self):
        """With Winograd's algorithm, on small maps and on others."""
        torch._dynamo.reset()
        weights = problem((1, 128, 1, 1), 2, 3, torch.float32, FORMATS[0], False)[1]

        class Model(torch.nn.Module):
            def forward(self, x):
                return chained_residual_pool(x, weights)

        shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
        program = export(Model(), (random(2, 128, 33, 34),), dynamic_shapes=shapes).module()
        compiled = torch.compile(Model(), fullgraph=True, backend="aot_eager")
        for size in ((1, 128, 33, 34), (2, 128, 7, 5)):
            x = random(*size).requires_grad_()
            own, made = Model()(x), compiled(x)
            assert torch.equal(program(x), own) and torch.equal(made, own)
            grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (own, made)]
            assert (grads[0] - grads[1]).abs().max() <= 1e-4 * (1 + grads[0].abs().max())

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_autocast_as_a_convolution(self, backend, kernel):
        on = {"device": backend.device}
        kind = backend.device.type
        arguments = problem((1, 6, 8, 9), 2, kernel, torch.float32, FORMATS[0], True, **on)
        with torch.autocast(kind, torch.bfloat16):
            out = chained_residual_pool(*arguments)
        assert out.dtype == torch.bfloat16
        x, weights, biases = leaves(*arguments)
        with torch.autocast(kind, torch.bfloat16):
            out = chained_residual_pool(x, weights, biases)
        out.sum().backward()
        assert x.grad.dtype == weights[0].grad.dtype == torch.float32
        arguments = problem((1, 6, 8, 9), 2, kernel, torch.float64, FORMATS[0], True, **on)
        with torch.autocast(kind, torch.bfloat16):
            assert chained_residual_pool(*arguments).dtype == torch.float64

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES[:3])
    def test_gradient_of_a_convolution_as_products(self, dtype, form):
        """What backward takes on CUDA, against torch's."""
        shape = (3, 6, 5, 7)
        x, grad = (random(*shape, seed=i).to(dtype).contiguous(memory_format=form) for i in (0, 1))
        weight = random(6, 6, 1, 1, seed=2).to(dtype)
        theirs = torch.ops.aten.convolution_backward(
            *(t.double() for t in (grad, x, weight)),
            *([6], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True] * 3),
        )
        own = conv1x1_backward(grad, x, weight, [True] * 3)
        for a, b in zip(own, theirs, strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            limit = 2 * torch.finfo(dtype).eps * float(b.abs().max())
            assert float((a.double() - b).abs().max()) <= limit
        assert own[0].stride() == grad.stride()
        assert conv1x1_backward(grad, x, weight, [False] * 3) == (None, None, None)
        empty = conv1x1_backward(grad[:0], x[:0], weight, [True] * 3)
        assert empty[0].shape == (0, 6, 5, 7) and not empty[1].any() and not empty[2].any()

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_backward_inside_autocast(self, backend, variant, kernel, form):
        on = {"device": backend.device}
        arguments = problem((1, 6, 8, 9), 2, kernel, torch.float32, form, True, **on)
        found = []
        for narrow in (False, True):
            x, weights, biases = leaves(*arguments)
            loss = chained_residual_pool(x, weights, biases, variant=variant).square().sum()
            with torch.autocast(torch.device(backend.device).type, torch.bfloat16, enabled=narrow):
                loss.backward()
            found.append([t.grad for t in (x, *weights, *biases)])
        for a, b in zip(*found, strict=True):  # on CUDA, torch's 3x3 ones may differ in bits
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("form", FORMATS)
    def test_products_inside_autocast(self, form):
        x, grad = (random(2, 6, 5, 7, seed=i).contiguous(memory_format=form) for i in (0, 1))
        weight = random(6, 6, 1, 1, seed=2)
        expected = conv1x1_backward(grad, x, weight, [True] * 3)
        with torch.autocast("cpu", torch.bfloat16):
            own = conv1x1_backward(grad, x, weight, [True] * 3)
        for a, b in zip(own, expected, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b)
        shapes = [
            t.shape
            for t in conv1x1_backward(*(t.to("meta") for t in (grad, x, weight)), [True] * 3)
        ]
        assert shapes == [t.shape for t in expected]

    def test_flops(self):
        x, weights, _ = leaves(*problem((2, 6, 8, 9), 3, 1, torch.float32, FORMATS[0], False))
        with FlopCounterMode(display=False) as counter:
            out = chained_residual_pool(x, weights)
        assert counter.get_total_flops() == 3 * x.numel() * (2 * 6 + 8 + 1)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 3 * x.numel() * (4 * 6 + 8 + 1)
