# SPDX-License-Identifier: Apache-2.0
"""Gradients of the dense CRF by CUDA kernels, under the shim or on a GPU."""

from __future__ import annotations

import _backends
import pytest
import torch
from _crf_gradients import KERNELS, KINDS, check, gradients, variable
from _ops import NORMALIZATIONS, compats, expansions, layouts, picture, random, same_bits
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from pydense import reference
from pydense.losses import dense_crf_loss
from pydense.nn import CRFasRNN
from pydense.ops import dense_crf, dense_crf_steps, permutohedral_filter


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def gpu(request):
    """Makes the CUDA kernels run in a ``with``, which gives their device."""
    if reason := _backends.missing(request.param):
        pytest.skip(reason)
    return lambda schedule=2: _backends.use(request.param, schedule)


def by_inputs(run, inputs, device="cpu", dtype=torch.float64):
    """Gradients of a loss with random weights."""
    leaves = [variable(x, dtype).to(device).detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = random(*(out.shape or (1,)), seed=3).to(out)
    grads = torch.autograd.grad((out * weights).sum(), leaves, materialize_grads=True)
    return [out.detach().cpu(), *(g.cpu() for g in grads)]


def on_both(gpu, run, inputs, **options):
    expected = by_inputs(run, inputs, **options)
    with gpu() as chosen:
        found = by_inputs(run, inputs, chosen.device, **options)
    return zip(found, expected, strict=True)


def assert_near(pairs, tolerance=1e-9):
    for found, expected in pairs:
        limit = tolerance * (1 + float(expected.abs().max())) if expected.numel() else 0
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= limit if expected.numel() else True


class TestAgainstTheCpu:
    """In float64, where both differ in the order of sums alone."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("labels", [1, 2, 3, 5, 21, 40, 140])
    def test_unary_and_compat(self, gpu, labels, kind):
        image = picture(2, 3, 5, 7)
        scale = 0.3 if labels < 100 else 0.05

        def run(unary, one, two):
            return dense_crf(
                unary,
                image.to(unary.device),
                gaussian={"sxy": 2, "compat": one},
                bilateral={"sxy": 3, "srgb": 60, "compat": two},
                iterations=3,
                output="logits" if kind == "diagonal" else "probabilities",
                recompute=kind == "potts",
            )

        one, two = compats(kind, labels, scale), compats("potts", labels, 0.1)
        inputs = [random(2, labels, 5, 7), one, two]
        assert_near(on_both(gpu, run, inputs))

    @pytest.mark.parametrize("kind", ["potts", "diagonal"])
    def test_rows_longer_than_a_block(self, gpu, kind):
        def run(unary, compat):
            return dense_crf(unary, gaussian={"sxy": 2, "compat": compat}, iterations=2)

        inputs = [random(1, 530, 1, 3), compats(kind, 530, 0.02)]
        assert_near(on_both(gpu, run, inputs))

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    @pytest.mark.parametrize(
        ("self_term", "mode"), [(True, "filter"), (False, "filter"), (True, "lattice")]
    )
    def test_features(self, gpu, normalization, self_term, mode):
        """Of an image of its own each, and of bandwidths that all images share."""

        def run(unary, image, sxy, far, srgb, matrix, diagonal):
            return dense_crf(
                unary,
                image,
                gaussian={"sxy": sxy, "compat": matrix},
                bilateral={"sxy": far, "srgb": srgb, "compat": diagonal},
                iterations=2,
                normalization=normalization,
                self_term=self_term,
                feature_gradient=mode,
                recompute=normalization == "after",
            )

        image = 100 * torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))
        inputs = [random(2, 14, 5, 6), image, [1.53, 2.17], 3.17, [30.1, 41.3, 28.7]]
        inputs += [compats("matrix", 14, 0.2), compats("diagonal", 14, 0.2)]
        assert_near(on_both(gpu, run, inputs), 1e-8)

    def test_shared_image(self, gpu):
        def run(unary, image):
            return dense_crf(unary, image, bilateral=KERNELS["bilateral"], iterations=2)

        assert_near(on_both(gpu, run, [random(3, 3, 6, 7), picture(1, 3, 6, 7)]), 1e-8)

    def test_many_kernels(self, gpu):
        def run(unary, *features):
            kernels = [
                {"features": f, "compat": compats(KINDS[i % 3], 3, 0.2)}
                for i, f in enumerate(features)
            ]
            return dense_crf(unary, features=kernels, iterations=2, self_term=False)

        features = [random(1 + i % 2, 1 + i, 11, seed=i) for i in range(6)]
        assert_near(on_both(gpu, run, [random(2, 3, 11), *features]), 1e-8)

    def test_from_marginals(self, gpu):
        """Steps: each starts from the marginals of the one before."""

        def run(unary, compat):
            gaussian = {"sxy": 2, "compat": compat}
            return torch.stack(tuple(dense_crf_steps(unary, gaussian=gaussian, iterations=3)))

        assert_near(on_both(gpu, run, [random(2, 3, 4, 5), compats("matrix", 3, 0.4)]))

    def test_from_marginals_made_again(self, gpu):
        def run(unary, q, compat):
            op = torch.ops.pydense
            features = random(1, 2, 4, 5, dtype=torch.float64).to(unary.device)
            lattice = op.dense_crf_lattice(features, "after", True)
            arguments = (unary, [lattice], [compat], [unary.new_empty(0)])
            results = [
                op.dense_crf_mean_field_training(*arguments, n, True, q, "logits", "filter", True)
                for n in (1, 3)
            ]
            return results[0][0] + results[1][0]

        inputs = [random(2, 3, 4, 5), random(2, 3, 4, 5, seed=2).softmax(1)]
        assert_near(on_both(gpu, run, [*inputs, compats("diagonal", 3, 0.4)]))

    def test_without_kernels(self, gpu):
        for iterations in (0, 2):

            def run(unary, iterations=iterations):
                return dense_crf(unary, iterations=iterations)

            assert_near(on_both(gpu, run, [random(2, 5, 3, 4)]))

    def test_loss_and_layer(self, gpu):
        image = picture(2, 3, 5, 6)

        def loss(scores, compat):
            bilateral = {"sxy": 8, "srgb": 25, "compat": compat}
            mask = torch.ones(2, 5, 6, device=scores.device)
            mask[0, 1] = 0
            return dense_crf_loss(scores, image.to(scores.device), bilateral=bilateral, mask=mask)

        assert_near(on_both(gpu, loss, [random(2, 3, 5, 6), compats("matrix", 3)]))

        def layer(logits, image):
            crf = CRFasRNN(4, iterations=2, train_bandwidths=True).to(logits)
            out = crf(logits, image)
            grads = torch.autograd.grad(out.square().sum(), [*crf.parameters()], retain_graph=True)
            return torch.cat([g.flatten() for g in grads]).detach() * logits.sum() + out.sum()

        assert_near(on_both(gpu, layer, [random(1, 4, 5, 6), 9.0 * picture(1, 3, 5, 6)]), 1e-6)


class TestGradcheck:
    """Against finite differences, by CUDA kernels alone."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_unary_and_compat(self, gpu, kind):
        with gpu() as chosen:

            def run(unary, compat):
                gaussian = {"sxy": 2, "compat": compat}
                return dense_crf(unary, gaussian=gaussian, iterations=2, normalization="before")

            inputs = random(1, 3, 3, 4), compats(kind, 3, 0.4)
            check(run, *(variable(x).to(chosen.device).detach().requires_grad_() for x in inputs))

    @pytest.mark.parametrize("normalization", ["symmetric", "after"])
    def test_features_of_the_lattice(self, gpu, normalization):
        with gpu() as chosen:

            def run(unary, features):
                kernels = [{"features": features, "compat": torch.eye(2)}]
                return dense_crf(
                    unary,
                    features=kernels,
                    iterations=2,
                    normalization=normalization,
                    feature_gradient="lattice",
                )

            inputs = random(2, 2, 6), random(1, 3, 6)
            leaves = (variable(x).to(chosen.device).detach().requires_grad_() for x in inputs)
            check(run, *leaves, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("self_term", [True, False])
def test_adjoint_identity(gpu, normalization, self_term):
    """x^T K y = y^T K^T x, with the transpose that backward applies."""
    with gpu() as chosen:
        values = variable(random(2, 3, 12, 14)).to(chosen.device).detach().requires_grad_()
        other = random(2, 3, 12, 14, seed=1).to(values)
        features = (random(1, 5, 12, 14, seed=2) * 2).to(values)
        options = {"normalization": normalization, "self_term": self_term}
        forward = (other * permutohedral_filter(values, features, **options)).sum()
        (transposed,) = torch.autograd.grad(forward, values)
        back = (values * transposed).sum()
        wrong = permutohedral_filter(other, features, **options)  # the blur is not symmetric
        assert float((forward - back).abs().detach()) < 1e-9 * max(
            1.0, float(forward.detach().abs())
        )
        assert not torch.allclose(transposed, wrong, rtol=1e-4)


@pytest.mark.parametrize("labels", [1, 2, 21])
def test_error_against_float64(gpu, labels):
    """In float32 no worse than twice what torch's own autograd has through the same filters."""
    logits, image = random(2, labels, 8, 9), picture(2, 3, 8, 9)
    exact = gradients(logits, image, torch.float64)
    plain = gradients(logits, image, torch.float32, reference.dense_crf)

    def moved(unary, image, **options):
        where = chosen.device
        for feature in options["features"]:
            feature["features"] = feature["features"].to(where)
        return dense_crf(unary.to(where), image.to(where), **options).cpu()

    with gpu() as chosen:
        own = gradients(logits, image, torch.float32, moved)
    for mine, theirs, truth in zip(own, plain, exact, strict=True):
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2e-5 * (
            truth.abs().max() + 1e-3
        )


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
