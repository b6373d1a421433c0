# SPDX-License-Identifier: Apache-2.0
"""Upsampled softmax, and sums over sliding windows, against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from _heads import SHAPES, assert_in_budget, scores
from _ops import layouts, one_number, same_bits, threads
from torch.export import Dim, export
from torch.library import opcheck
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from pydense import reference
from pydense.ops import upsample_accumulate, upsample_softmax

OPS = torch.ops.pydense
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of probabilities: rounding of exp, and of the result where that has 16 bits.
FLOOR = {torch.float64: 1e-14, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def softmax_and_gradient(function, logits, size, align_corners=False):
    x = logits.clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(x, size, align_corners)
    upstream = scores(*out.shape, seed=7, scale=1.0).to(out)
    out.backward(upstream)
    return out.detach(), x.grad


class TestSoftmax:
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_and_gradient(self, backend, dtype, align_corners):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for shape, size in SHAPES:
            logits = scores(*shape).to(backend.device)
            exact = softmax_and_gradient(reference.upsample_softmax, logits, size, align_corners)
            torchs = softmax_and_gradient(
                reference.upsample_softmax, logits.to(wide), size, align_corners
            )
            for layout in (torch.contiguous_format, torch.channels_last):
                x = logits.to(dtype).to(memory_format=layout)
                got = softmax_and_gradient(upsample_softmax, x, size, align_corners)
                assert got[0].dtype == got[1].dtype == dtype
                # One class or one pixel is in both formats: torch's own choice then.
                rival = interpolate(x, size, mode="bilinear", align_corners=align_corners)
                assert got[0].stride() == rival.stride()
                assert got[1].is_contiguous(memory_format=layout)
                floor = FLOOR.get(dtype, 1e-6)
                unit = size[0] * size[1] / (shape[2] * shape[3])
                assert_in_budget(got[0], exact[0], lambda t=torchs: t[0], floor, shape)
                assert_in_budget(got[1], exact[1], lambda t=torchs: t[1], floor, shape, unit)

    @pytest.mark.parametrize("magnitude", [300.0, 1e4])
    def test_large_logits(self, backend, magnitude):
        logits = torch.full((1, 4, 5, 6), -magnitude, dtype=torch.float64, device=backend.device)
        logits[:, 0, :, ::2] = magnitude
        logits[:, 1, :, 1::2] = magnitude
        exact = softmax_and_gradient(reference.upsample_softmax, logits, (31, 40))
        torchs = softmax_and_gradient(reference.upsample_softmax, logits.float(), (31, 40))
        got = softmax_and_gradient(upsample_softmax, logits.float(), (31, 40))
        for k in range(2):
            assert_in_budget(got[k], exact[k], lambda k=k: torchs[k], 1e-6, k)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, backend, value):
        logits = scores(2, 4, 5, 6).float().to(backend.device)
        logits[0, 1, 2, 3] = value
        expected = reference.upsample_softmax(logits, (17, 19))
        torch.testing.assert_close(upsample_softmax(logits, (17, 19)), expected, equal_nan=True)

    def test_layouts(self, backend):
        logits = scores(2, 21, 9, 11).float().to(backend.device)
        out, gradient = softmax_and_gradient(upsample_softmax, logits, (37, 50))
        upstream = scores(2, 21, 37, 50, seed=7, scale=1.0).float().to(backend.device)
        for (name, x), (_, g) in zip(layouts(logits), layouts(upstream), strict=True):
            leaf = x.detach().requires_grad_()
            result = upsample_softmax(leaf, (37, 50))
            assert same_bits(result, out), name
            result.backward(g)
            assert same_bits(leaf.grad, gradient), name
        leaf = one_number((2, 21, 9, 11)).to(backend.device).requires_grad_()
        result = upsample_softmax(leaf, (37, 50))
        torch.testing.assert_close(result, torch.full_like(result, 1 / 21))
        (gradient,) = torch.autograd.grad(result.sum(), leaf)  # an expanded upstream gradient
        assert gradient.abs().max() < 1e-5

    def test_sizes_and_errors(self):
        assert upsample_softmax(torch.zeros(0, 3, 4, 5), 8).shape == (0, 3, 8, 8)
        with pytest.raises(ValueError, match="upsample_softmax: size must be positive, got 0"):
            upsample_softmax(torch.zeros(1, 3, 4, 5), 0)
        with pytest.raises(TypeError, match="upsample_softmax: logits must be of dtype"):
            upsample_softmax(torch.zeros(1, 3, 4, 5).int(), 8)
        with pytest.raises(ValueError, match="upsample_softmax_backward: gradient must have shape"):
            OPS.upsample_softmax_backward(torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 4, 4), False)

    def test_gradcheck(self, backend):
        x = scores(2, 3, 3, 4, scale=1.0).to(backend.device).requires_grad_()
        for align_corners in (False, True):
            torch.autograd.gradcheck(lambda x, a=align_corners: upsample_softmax(x, (7, 9), a), x)
        (gradient,) = torch.autograd.grad(
            upsample_softmax(x, (7, 9)).square().sum(), x, create_graph=True
        )
        with pytest.raises(NotImplementedError, match="second derivative: the gradient is not"):
            gradient.sum().backward()

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_opcheck(self, backend, layout):
        for dtype in DTYPES[:3]:
            x = scores(2, 5, 4, 6).to(backend.device, dtype).to(memory_format=layout)
            opcheck(OPS.upsample_softmax.default, (x.requires_grad_(), 9, 13, False))
            gradient = scores(2, 5, 9, 13).to(backend.device, dtype)
            opcheck(OPS.upsample_softmax_backward.default, (gradient, x.detach(), True))

    def test_compile_and_export(self, backend):
        class Head(torch.nn.Module):
            def forward(self, x):
                return upsample_softmax(x, (4 * x.shape[2], 4 * x.shape[3]))

        x = scores(2, 5, 6, 7).float().to(backend.device)
        dims = {0: Dim("n", max=64), 2: Dim("h", max=64), 3: Dim("w", max=64)}
        program = export(Head(), (x,), dynamic_shapes={"x": dims}).module()
        compiled = torch.compile(Head(), backend="aot_eager", fullgraph=True, dynamic=True)
        for shape in [(2, 5, 6, 7), (3, 5, 9, 4)]:
            x = scores(*shape).float().to(backend.device)
            assert same_bits(program(x), Head()(x))
            got = softmax_and_gradient(lambda x, *_: compiled(x), x, None)
            expected = softmax_and_gradient(lambda x, *_: Head()(x), x, None)
            assert all(map(same_bits, got, expected))

    def test_threads(self):
        x = scores(2, 21, 33, 40).float()
        results = []
        for count in (1, 2, 4, 1):
            with threads(count):
                results.append(softmax_and_gradient(upsample_softmax, x, (130, 160)))
        for other in results[1:]:
            assert all(map(same_bits, results[0], other))

    def test_flops(self):
        with FlopCounterMode(display=False) as counter:
            upsample_softmax(torch.zeros(2, 5, 3, 4).requires_grad_(), (6, 8)).sum().backward()
        assert counter.get_total_flops() == 2 * 5 * 6 * 8 * (6 + 13)


class TestAccumulate:
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_windows(self, backend, dtype, align_corners):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for shape, size in SHAPES:
            logits = scores(*shape).to(backend.device)
            weight = torch.rand(size, generator=torch.Generator().manual_seed(2)).to(logits)
            start = scores(*shape[:2], size[0] + 7, size[1] + 9, seed=4).to(logits)
            options = {"size": size, "align_corners": align_corners}
            exact, rival, got = start.clone(), start.to(wide), start.to(wide)
            before = got.clone()
            for y0, x0, factor in [(0, 0, 1.0), (7, 9, 0.5), (3, 4, weight)]:
                narrow = factor.to(wide) if isinstance(factor, torch.Tensor) else factor
                reference.upsample_accumulate(exact, logits, y0, x0, weight=factor, **options)
                reference.upsample_accumulate(
                    rival, logits.to(wide), y0, x0, weight=narrow, **options
                )
                out = upsample_accumulate(got, logits.to(dtype), y0, x0, weight=narrow, **options)
                assert out is got
            assert_in_budget(got, exact, lambda r=rival: r, 1e-6 if wide != dtype else 1e-15, shape)
            assert torch.equal(got[:, :, :3, -9:], before[:, :, :3, -9:])  # outside all windows

    def test_layouts(self, backend):
        logits = scores(2, 21, 9, 11).float().to(backend.device)
        dst = scores(2, 21, 40, 55, seed=1).to(logits)
        weight = torch.rand(37, 50).to(logits)
        expected = upsample_accumulate(dst.clone(), logits, 2, 3, (37, 50), weight=weight)
        for (name, x), (_, d) in zip(layouts(logits), layouts(dst), strict=True):
            for w in (weight, weight.t().contiguous().t()):
                total = d.clone(memory_format=torch.preserve_format)
                if name in ("sliced", "half of a wider one"):
                    total = d
                    total.copy_(dst)
                out = upsample_accumulate(total, x, 2, 3, (37, 50), weight=w)
                assert same_bits(out, expected), name
        row = torch.rand(1, 50).to(logits)
        expected = upsample_accumulate(
            dst.clone(), logits, 0, 0, (37, 50), weight=row.expand(37, 50).contiguous()
        )
        got = upsample_accumulate(dst.clone(), logits, 0, 0, (37, 50), weight=row.expand(37, 50))
        assert same_bits(got, expected)

    def test_opcheck_and_compile(self, backend):
        logits = scores(2, 3, 4, 5).float().to(backend.device)
        dst, weight = torch.zeros(2, 3, 9, 11).to(logits), torch.rand(7, 8).to(logits)
        opcheck(OPS.upsample_accumulate.default, (dst, logits, 1, 2, 7, 8, False, weight))

        def step(dst, x):
            for x0 in (0, 3):
                dst = upsample_accumulate(dst, x * 2, 1, x0, (7, 8), weight=0.5)
            return dst / 2

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        one, two = dst.clone(), dst.clone()
        assert same_bits(compiled(one, logits), step(two, logits)) and same_bits(one, two)

    def test_threads(self):
        x, results = scores(2, 21, 33, 40).float(), []
        for count in (1, 2, 4):
            with threads(count):
                dst = torch.ones(2, 21, 140, 170)
                results.append(upsample_accumulate(dst, x, 5, 6, (130, 160), weight=0.3))
        assert all(same_bits(results[0], other) for other in results[1:])

    def test_errors(self):
        dst, logits = torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 4, 5)
        cases = [
            (dict(dst=dst.bfloat16()), TypeError, "dst must be of dtype torch.float32, got"),
            (dict(dst=dst.double()), TypeError, "dst must be of dtype torch.float32, got"),
            (dict(dst=dst[:, :2]), ValueError, "dst must have shape (N, C, height, width) with"),
            (dict(dst=dst[..., :1].expand(1, 3, 20, 20)), ValueError, "dst must not share memory"),
            (dict(y0=13), ValueError, "y0 must leave the window of 8 inside dst's 20, got 13"),
            (dict(x0=-1), ValueError, "x0 must leave the window of 9 inside dst's 20, got -1"),
            (dict(x0=1.5), TypeError, "x0 must be an integer, got float"),
            (dict(weight="1"), TypeError, "weight must be a number or a tensor, got str"),
            (dict(weight=torch.ones(9, 8)), ValueError, "weight must have shape (8, 9), got"),
            (dict(size=0), ValueError, "size must be positive, got 0"),
            (
                dict(logits=logits.clone().requires_grad_()),
                NotImplementedError,
                "dst and logits must not require grad",
            ),
        ]
        for change, error, text in cases:
            options = {"dst": dst, "logits": logits, "y0": 0, "x0": 0, "size": (8, 9), **change}
            with pytest.raises(error) as caught:
                upsample_accumulate(**options)
            assert str(caught.value).startswith("upsample_accumulate: ")
            assert text in str(caught.value)
        with pytest.raises(ValueError, match="dst must hold the window, 8 x 9 at"):
            OPS.upsample_accumulate(dst, logits, 15, 0, 8, 9, False, torch.ones(8, 9))
        assert not dst.any()
