# SPDX-License-Identifier: Apache-2.0
"""Gradients of the dense CRF by CUDA kernels, under the shim or on a GPU."""

from __future__ import annotations

import pytest
import torch
from _crf_cuda import assert_near, on_both
from _crf_cuda import gpu as gpu
from _crf_gradients import KERNELS, KINDS, check, gradients, variable
from _ops import NORMALIZATIONS, compats, picture, random
from _ops import one_thread as one_thread

from pydense import reference
from pydense.losses import dense_crf_loss
from pydense.nn import CRFasRNN
from pydense.ops import dense_crf, dense_crf_steps, permutohedral_filter


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
