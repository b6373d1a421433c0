# SPDX-License-Identifier: Apache-2.0
"""Upsampled argmax and cross-entropy as citizens of torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from _heads import scores, targets
from _ops import same_bits, threads
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import pydense
from pydense import _core
from pydense.ops import upsample_argmax, upsample_cross_entropy

OPS = torch.ops.pydense


class TestOpcheck:
    """Schema, fake tensors with dynamic sizes, autograd registration, AOT dispatch."""

    @pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
    @pytest.mark.parametrize("confidence", [False, True])
    def test_argmax(self, backend, dtype, confidence):
        for kind in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            logits = scores(2, 5, 4, 6).to(backend.device, kind)
            opcheck(OPS.upsample_argmax.default, (logits, 9, 13, False, dtype, confidence))

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_all"])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_cross_entropy(self, backend, reduction, layout):
        target = targets(2, (9, 13), 5).to(backend.device)
        for kind in (torch.float32, torch.float64, torch.bfloat16):
            wide = torch.float64 if kind == torch.float64 else torch.float32
            logits = scores(2, 5, 4, 6).to(backend.device, kind).to(memory_format=layout)
            weight = torch.rand(5, dtype=wide, device=backend.device)
            factor = torch.rand(2, 9, 13, dtype=wide, device=backend.device)
            rest = (target, weight, factor, True, 255, 0.1, reduction)
            op = OPS.upsample_cross_entropy.default
            opcheck(op, (logits, *rest, reduction == "mean", True))
            opcheck(op, (logits.clone().requires_grad_(), *rest, reduction != "none", False))


class TestGradcheck:
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_all"])
    def test_cross_entropy(self, backend, reduction, align_corners):
        logits = scores(2, 3, 3, 4, scale=1.0).to(backend.device).requires_grad_()
        generator = torch.Generator().manual_seed(3)
        weight = (torch.rand(3, generator=generator).double() + 0.2).to(backend.device)
        factor = torch.rand(2, 7, 9, generator=generator).double().to(backend.device)
        target = targets(2, (7, 9), 3).to(backend.device)
        for smoothing in (0.0, 0.3):
            torch.autograd.gradcheck(
                lambda x, s=smoothing: upsample_cross_entropy(
                    x,
                    target,
                    None,
                    align_corners,
                    weight=weight,
                    ignore_index=255,
                    label_smoothing=s,
                    reduction=reduction,
                    pixel_weight=factor,
                ),
                logits,
            )

    def test_pixel_weight(self, backend):
        logits = scores(1, 3, 3, 4, scale=1.0).to(backend.device).requires_grad_()
        target = targets(1, (7, 9), 3).to(backend.device)
        factor = torch.rand(1, 7, 9).double().to(backend.device).requires_grad_()

        def loss(x, a):
            return upsample_cross_entropy(
                x, target, ignore_index=255, reduction="none", pixel_weight=a
            )

        torch.autograd.gradcheck(loss, (logits, factor))

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_second_derivative_raises(self, reduction):
        logits, target = scores(1, 3, 3, 4).requires_grad_(), targets(1, (7, 9), 3)
        loss = upsample_cross_entropy(logits, target, ignore_index=255, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative: the gradient is not"):
            gradient.square().sum().backward()

    def test_needs_no_gradient(self, backend):
        """No gradient is computed where nobody can ask for it."""
        logits = scores(1, 3, 3, 4).to(backend.device)
        target = targets(1, (7, 9), 3).to(backend.device)
        loss = upsample_cross_entropy(logits, target, ignore_index=255)
        assert not loss.requires_grad
        logits.requires_grad_()
        with torch.no_grad():
            assert same_bits(upsample_cross_entropy(logits, target, ignore_index=255), loss)
        arguments = (target, None, None, False, 255, 0.0, "mean", False, False)
        direct = OPS.upsample_cross_entropy(logits, *arguments)
        assert direct[1].numel() == 0
        with pytest.raises(RuntimeError, match="gradient must be True where logits require grad"):
            direct[0].backward()


class TestCompile:
    def test_fullgraph(self, backend):
        def step(x, t):
            loss, correct, valid = upsample_cross_entropy(
                x * 2, t, ignore_index=255, label_smoothing=0.1, return_counts=True
            )
            return loss + correct / valid, upsample_argmax(x, t.shape[1:], dtype=torch.uint8)

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
        for shape, size in [((2, 5, 7, 9), (33, 40)), ((1, 5, 6, 11), (20, 47))]:
            x = scores(*shape).float().to(backend.device).requires_grad_()
            y = x.detach().clone().requires_grad_()
            target = targets(shape[0], size, 5).to(backend.device)
            got, expected = compiled(x, target), step(y, target)
            assert all(map(same_bits, got, expected))
            got[0].backward()
            expected[0].backward()
            assert same_bits(x.grad, y.grad)
        assert counter.frame_count <= 2  # a batch of 1 is a case of its own

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_inductor(self, reduction):
        x = scores(2, 5, 7, 9).float().requires_grad_()
        target = targets(2, (33, 40), 5)

        def loss(x):
            return upsample_cross_entropy(
                x.relu(), target, ignore_index=255, reduction=reduction
            ).sum()

        expected = torch.autograd.grad(loss(x), x)[0]
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)[0]
        torch.testing.assert_close(got, expected)

    def test_export(self, backend):
        class Head(torch.nn.Module):
            def forward(self, x, t):
                labels = upsample_argmax(x, (4 * x.shape[2], 4 * x.shape[3]))
                return labels, upsample_cross_entropy(x, t, ignore_index=255)

        x = scores(2, 5, 6, 7).float().to(backend.device)
        t = targets(2, (24, 28), 5).to(backend.device)
        n, h, w, height, width = (Dim(name, max=512) for name in ("n", "h", "w", "hh", "ww"))
        shapes = {"x": {0: n, 2: h, 3: w}, "t": {0: n, 1: height, 2: width}}
        program = export(Head(), (x, t), dynamic_shapes=shapes).module()
        for shape, size in [((2, 5, 6, 7), (24, 28)), ((3, 5, 9, 4), (50, 31))]:
            x = scores(*shape).float().to(backend.device)
            t = targets(shape[0], size, 5).to(backend.device)
            assert all(map(same_bits, program(x, t), Head()(x, t)))

    def test_autocast(self):
        """Computed in float32 whatever autocast says; 16-bit logits are read as they are."""
        x, t = scores(2, 5, 6, 7).float(), targets(2, (24, 28), 5)
        expected = upsample_cross_entropy(x, t, ignore_index=255)
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(upsample_cross_entropy(x, t, ignore_index=255), expected)
            narrow = upsample_cross_entropy(x.bfloat16(), t, ignore_index=255)
        assert narrow.dtype == torch.float32 and same_bits(narrow, expected)  # exact in bfloat16

    def test_flops(self):
        with FlopCounterMode(display=False) as counter:
            x = scores(2, 5, 6, 7).float().requires_grad_()
            upsample_argmax(x, (24, 28))
            upsample_cross_entropy(x, targets(2, (24, 28), 5), ignore_index=255).backward()
        assert counter.get_total_flops() == 2 * 5 * 24 * 28 * (4 + 9)


def test_threads_and_instruction_sets():
    """The same bits for any number of threads, and on all sets with fused multiply-adds."""
    code = """
        import hashlib, sys, torch
        sys.path.insert(0, sys.argv[1])
        from _heads import scores, targets
        from pydense.ops import upsample_argmax, upsample_cross_entropy
        found = []
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            results = []
            for kind in (torch.float32, torch.bfloat16, torch.float64):
                for channels, size in ((21, (130, 170)), (150, (65, 90))):
                    x = scores(3, channels, 17, 23).to(kind).requires_grad_()
                    t = targets(3, size, channels)
                    loss = upsample_cross_entropy(x, t, ignore_index=255, label_smoothing=0.1)
                    loss.backward()
                    each = upsample_cross_entropy(x, t, ignore_index=255, reduction="none")
                    labels, sure = upsample_argmax(x, size, return_confidence=True)
                    results += [loss, x.grad, each, labels, sure]
                    results.append(upsample_argmax(x, size))
            found.append([r.detach().contiguous().view(torch.uint8) for r in map(
                lambda r: r.reshape(1) if r.dim() == 0 else r, results)])
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
        print(*(hashlib.sha256(r.numpy().tobytes()).hexdigest() for r in found[0]))
    """
    root = str(Path(pydense.__file__).resolve().parent.parent)
    outputs = {}
    for isa in _core.cpu_capabilities():
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).resolve().parent)],
            env={**os.environ, "PYTHONPATH": root, "PYDENSE_CPU_CAPABILITY": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        outputs[isa] = done.stdout
    fused = {text for isa, text in outputs.items() if isa != "baseline"}
    assert len(fused) <= 1


def test_many_threads_in_one_process():
    x, t = scores(2, 21, 33, 40).float(), targets(2, (130, 160), 21)
    results = []
    for count in (1, 2, 4):
        with threads(count):
            leaf = x.clone().requires_grad_()
            loss = upsample_cross_entropy(leaf, t, ignore_index=255)
            loss.backward()
            results.append((loss.detach(), leaf.grad, upsample_argmax(x, (130, 160))))
    for other in results[1:]:
        assert all(map(same_bits, results[0], other))
