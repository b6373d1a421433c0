# SPDX-License-Identifier: Apache-2.0
"""Gradients of the dense CRF by CUDA kernels: determinism, layouts, sizes, graphs, errors."""

from __future__ import annotations

import pytest
import torch
from _crf_cuda import assert_near, by_inputs, on_both
from _crf_cuda import gpu as gpu
from _crf_gradients import KERNELS, KINDS, variable
from _ops import compats, expansions, layouts, picture, random, same_bits
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from pydense.ops import dense_crf


class TestRuntime:
    logits, image = random(2, 5, 10, 12), picture(2, 3, 10, 12)

    def grads(self, gpu, logits, image, schedule=2, **options):
        with gpu(schedule) as chosen:

            def run(x, image, c, sxy):
                bilateral = {"sxy": sxy, "srgb": 13, "compat": [1.0, 2.0, 3.0, 2.0, 1.0]}
                gaussian = {"sxy": 3, "compat": c}
                return dense_crf(
                    x, image, gaussian=gaussian, bilateral=bilateral, iterations=2, **options
                )

            inputs = [logits, image, compats("matrix", 5), [40.0, 40.0]]
            return by_inputs(run, inputs, chosen.device, torch.float32)

    def test_same_bits_in_every_order(self, gpu):
        runs = [self.grads(gpu, self.logits, self.image, schedule) for schedule in range(3)]
        for other in runs[1:]:
            assert all(map(same_bits, runs[0], other))

    def test_recompute_has_the_same_bits(self, gpu):
        kept = self.grads(gpu, self.logits, self.image)
        again = self.grads(gpu, self.logits, self.image, recompute=True)
        assert all(map(same_bits, kept, again))

    def test_training_has_the_bits_of_inference(self, gpu):
        for labels in (2, 5, 40):
            logits = random(2, labels, 6, 7)
            with gpu() as chosen:
                x, image = logits.to(chosen.device), picture(2, 3, 6, 7).to(chosen.device)
                plain = dense_crf(x, image, **KERNELS, iterations=3)
                followed = dense_crf(x.requires_grad_(), image, **KERNELS, iterations=3)
            assert same_bits(plain.cpu(), followed.detach().cpu())

    def test_batch_is_its_images(self, gpu):
        grad = random(2, *self.logits.shape[1:], seed=3)
        with gpu() as chosen:
            logits, image, grad = (x.to(chosen.device) for x in (self.logits, self.image, grad))

            def run(images):
                x = logits[images].requires_grad_()
                out = dense_crf(x, image[images], **KERNELS, iterations=2)
                return torch.autograd.grad(out, x, grad[images])[0]

            alone = torch.cat([run(slice(i, i + 1)) for i in range(2)])
            assert same_bits(run(slice(0, 2)), alone)

    def test_layouts(self, gpu):
        logits, image, grad = random(2, 5, 4, 5), picture(2, 3, 4, 5), random(2, 5, 4, 5, seed=2)
        with gpu() as chosen:

            def run(x, g):
                x = x.detach().requires_grad_()
                out = dense_crf(x, image.to(x.device), **KERNELS, iterations=2)
                return torch.autograd.grad(out, x, g)[0]

            logits, grad = logits.to(chosen.device), grad.to(chosen.device)
            expected = run(logits, grad)
            for name, x in layouts(logits):
                assert same_bits(run(x, grad), expected), name
            for name, g in layouts(grad):
                assert same_bits(run(logits, g), expected), name
            for name, g in expansions(grad):
                assert same_bits(run(logits, g), run(logits, g.clone())), name

    @pytest.mark.parametrize("shape", [(0, 3, 5, 6), (1, 3, 1, 1), (1, 1, 1, 7), (2, 33, 1, 3)])
    def test_sizes(self, gpu, shape):
        with gpu() as chosen:
            x = random(*shape).to(chosen.device).requires_grad_()
            for kind in KINDS:
                compat = variable(compats(kind, shape[1]), torch.float32).detach()
                compat = compat.to(chosen.device).requires_grad_()
                for iterations in (0, 2):
                    out = dense_crf(x, gaussian={"sxy": 2, "compat": compat}, iterations=iterations)
                    out.square().sum().backward()
                assert x.grad.shape == x.shape and bool(x.grad.isfinite().all())
                assert bool(compat.grad.isfinite().all())

    def test_forbidden_labels_and_nan(self, gpu):
        logits = random(1, 3, 5, 6)
        logits[0, 1, :2] = -torch.inf
        with gpu() as chosen:
            x = logits.to(chosen.device).requires_grad_()
            out = dense_crf(x, gaussian=KERNELS["gaussian"], iterations=3)
            (grad,) = torch.autograd.grad(out.square().sum(), x)
            assert bool(grad.isfinite().all()) and bool((grad[0, 1, :2] == 0).all())
            bad = torch.zeros_like(x)
            bad[0, 0, 2, 2] = torch.nan
            out = dense_crf(x, gaussian=KERNELS["gaussian"], iterations=1)
            assert bool(torch.autograd.grad(out, x, bad)[0].isnan().any())

    def test_opcheck(self, gpu):
        ops = torch.ops.pydense
        with gpu() as chosen:
            for labels, output, recompute in ((2, "probabilities", False), (5, "logits", True)):
                unary = random(2, labels, 4, 5).to(chosen.device).requires_grad_()
                features = random(2, 3, 4, 5).to(chosen.device).requires_grad_()
                lattice = ops.dense_crf_lattice(features.detach(), "symmetric", True)
                compat = torch.eye(labels, device=chosen.device).requires_grad_()
                q = random(2, labels, 4, 5).softmax(1).to(chosen.device).requires_grad_()
                start = q if recompute else None
                opcheck(
                    ops.dense_crf_mean_field_training.default,
                    (
                        unary, [lattice], [compat], [features], 2, True, start, output, "filter",
                        recompute,
                    ),
                )  # fmt: skip
                opcheck(ops.dense_crf_feature_gradient.default, (
                    features.detach(), lattice, unary.detach(), q.detach(), None, "filter",
                ))  # fmt: skip
                opcheck(ops.permutohedral_filter_of.default, (
                    unary, lattice, features, True, "filter",
                ))  # fmt: skip

    def test_errors(self, gpu):
        ops = torch.ops.pydense
        with gpu() as chosen:
            x = random(1, 3, 4, 5).to(chosen.device)
            lattice = ops.dense_crf_lattice(x, "none", False)
            with pytest.raises((ValueError, RuntimeError), match="self_term=True"):
                ops.dense_crf_feature_gradient(x, lattice, x, x, None, "lattice")
            with pytest.raises((ValueError, RuntimeError), match="built from the features"):
                ops.dense_crf_feature_gradient(x[:, :2], lattice, x, x, None, "filter")
            kept = x.new_empty(1, 2, 20, 16)
            arguments = (x, None, x, kept, [lattice], [x.new_ones(())], 2, False, None, False)
            with pytest.raises((ValueError, RuntimeError), match="kept must come from"):
                ops.dense_crf_mean_field_backward(*arguments, False, False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_captured_in_a_graph():
    """Iterating and its gradient, on a lattice that is there."""
    ops = torch.ops.pydense
    x, features = (random(2, n, 7, 9, seed=n).cuda() for n in (5, 3))
    compat, nothing = torch.eye(5, device="cuda").requires_grad_(), torch.empty(0, device="cuda")
    x.requires_grad_()
    lattice = ops.dense_crf_lattice(features, "symmetric", True)

    def run():
        out, _ = ops.dense_crf_mean_field_training(
            x, [lattice], [compat], [nothing], 2, False, None, "probabilities", "filter", False
        )
        return torch.autograd.grad(out.square().sum(), [x, compat])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    expected = run()
    torch.cuda.synchronize()
    assert all(map(same_bits, found, expected))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape(gpu, data):
    labels = data.draw(st.integers(1, 35), label="labels")
    batch = data.draw(st.integers(1, 3), label="batch")
    height, width = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 9)), label="size")
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    dims = data.draw(st.integers(1, 7), label="dims")
    iterations = data.draw(st.integers(0, 3), label="iterations")

    def run(unary, compat, features):
        kernels = [{"features": features, "compat": compat}]
        return dense_crf(unary, features=kernels, iterations=iterations)

    inputs = [random(batch, labels, height, width), compats(kind, labels, 0.3)]
    inputs.append(random(data.draw(st.sampled_from([1, batch])), dims, height, width, seed=4))
    assert_near(on_both(gpu, run, inputs), 1e-8)
