# SPDX-License-Identifier: Apache-2.0
"""Gradients of the dense CRF: against finite differences, autograd of the reference, and itself."""

from __future__ import annotations

import pytest
import torch
from _crf_gradients import KERNELS, KINDS, check, gradients, variable
from _ops import (
    CHANNELS_LAST,
    NORMALIZATIONS,
    compats,
    expansions,
    layouts,
    picture,
    random,
    rms_error,
    same_bits,
    threads,
)
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense import reference
from pydense.ops import dense_crf, dense_crf_steps, exact_gaussian_filter, permutohedral_filter


class TestGradcheck:
    """float64, through several iterations of the whole layer."""

    image = picture(2, 3, 4, 5)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("self_term", [True, False])
    def test_unary_and_compat(self, kind, normalization, self_term):
        recompute = kind == "diagonal"

        def run(unary, one, two):
            return dense_crf(
                unary,
                self.image,
                gaussian={"sxy": 2, "compat": one},
                bilateral={"sxy": 3, "srgb": 60, "compat": two},
                iterations=3,
                normalization=normalization,
                self_term=self_term,
                output="logits" if kind == "potts" else "probabilities",
                recompute=recompute,
            )

        one, two = compats(kind, 3, 0.4), compats("potts", 3, 0.1)
        check(run, variable(random(2, 3, 4, 5)), variable(one), variable(two))

    @pytest.mark.parametrize("unary_type", ["energy", "probabilities"])
    def test_unary_types(self, unary_type):
        def run(unary):
            options = {"unary_type": unary_type, "iterations": 2, "gaussian": KERNELS["gaussian"]}
            return dense_crf(unary, **options)

        check(run, variable(random(1, 3, 4, 5).softmax(1)))

    def test_steps(self):
        def run(unary, compat):
            gaussian = {"sxy": 2, "compat": compat}
            return tuple(dense_crf_steps(unary, gaussian=gaussian, iterations=3))

        check(run, variable(random(1, 3, 4, 5)), variable(1.5))

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_features_of_the_lattice(self, normalization):
        """The check mode: the derivative of the lattice is what finite differences see."""

        def run(unary, image, sxy, far, srgb, matrix):
            return dense_crf(
                unary,
                image,
                gaussian={"sxy": sxy, "compat": matrix},
                bilateral={"sxy": far, "srgb": srgb, "compat": [0.5, 1.0, 0.8]},
                iterations=3,
                normalization=normalization,
                feature_gradient="lattice",
                recompute=normalization is None,
            )

        image = 100 * torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
        # Numbers that put no point on the border of two simplices, where the lattice has kinks.
        inputs = [random(2, 3, 4, 5), image, [1.53, 2.17], 3.17, [30.1, 41.3, 28.7]]
        inputs.append(compats("matrix", 3, 0.4))
        check(run, *map(variable, inputs), eps=1e-7, atol=1e-5)

    @pytest.mark.parametrize(
        ("normalization", "self_term"),
        [("symmetric", True), ("symmetric", False), ("before", False), ("after", True)],
    )
    def test_exact(self, normalization, self_term):
        """The true gradient, of everything."""

        def run(unary, image, sxy, srgb, matrix):
            return dense_crf(
                unary,
                image,
                gaussian={"sxy": sxy, "compat": matrix},
                bilateral={"sxy": 3, "srgb": srgb, "compat": 0.5},
                iterations=2,
                normalization=normalization,
                self_term=self_term,
                backend="exact",
            )

        inputs = [random(2, 3, 3, 4), picture(2, 3, 3, 4), [1.5, 2.0], 30.0]
        check(run, *map(variable, [*inputs, compats("matrix", 3, 0.4)]))

    def test_points_and_volumes(self):
        def points(unary, features):
            kernels = [{"features": features, "compat": 2}]
            return dense_crf(unary, features=kernels, iterations=2, feature_gradient="lattice")

        check(points, variable(random(2, 3, 9)), variable(random(1, 4, 9)), eps=1e-7, atol=1e-5)

        def volumes(unary, sxy):
            gaussian = {"sxy": sxy, "compat": 2}
            return dense_crf(unary, gaussian=gaussian, iterations=2, feature_gradient="lattice")

        inputs = variable(random(1, 2, 2, 3, 4)), variable([1.53, 2.17, 1.71])
        check(volumes, *inputs, eps=1e-7, atol=1e-5)

    def test_filters(self):
        values, features = variable(random(2, 3, 4, 5)), variable(random(1, 4, 4, 5))
        for reverse in (False, True):
            for normalization in NORMALIZATIONS:
                options = {"normalization": normalization, "reverse": reverse}

                def run(v, f, options=options):
                    return permutohedral_filter(v, f, feature_gradient="lattice", **options)

                check(run, values, features, eps=1e-7, atol=1e-5)
        exact = torch.autograd.gradgradcheck
        small = variable(random(1, 2, 5)), variable(random(1, 2, 5))
        assert exact(lambda v, f: exact_gaussian_filter(v, f, normalization="after"), small)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("self_term", [True, False])
def test_adjoint_identity(normalization, self_term):
    """x^T K y = y^T K^T x, with the transpose that backward applies."""
    values = variable(random(2, 3, 20, 30))
    other = random(2, 3, 20, 30, seed=1, dtype=torch.float64)
    features = random(1, 5, 20, 30, seed=2, dtype=torch.float64) * 2
    options = {"normalization": normalization, "self_term": self_term}
    forward = (other * permutohedral_filter(values, features, **options)).sum()
    (transposed,) = torch.autograd.grad(forward, values)
    back = (values * transposed).sum()
    assert float((forward - back).abs().detach()) < 1e-9 * max(1.0, float(forward.detach().abs()))
    wrong = permutohedral_filter(other, features, **options)  # the blur is not symmetric
    assert not torch.allclose(transposed, wrong, rtol=1e-4)


@pytest.mark.parametrize("labels", [1, 2, 3, 21, 40])
def test_error_against_float64(labels):
    """No worse than twice what torch's own autograd has through the same filters."""
    logits, image = random(2, labels, 15, 20), picture(2, 3, 15, 20)
    exact = gradients(logits, image, torch.float64)
    own = gradients(logits, image, torch.float32)
    plain = gradients(logits, image, torch.float32, reference.dense_crf)
    for mine, theirs, truth in zip(own, plain, exact, strict=True):
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2e-5 * (
            truth.abs().max() + 1e-3
        )


def test_reference_has_the_same_gradients():
    logits, image = random(1, 4, 9, 11), picture(1, 3, 9, 11)
    own = gradients(logits, image, torch.float64)
    plain = gradients(logits, image, torch.float64, reference.dense_crf)
    for mine, theirs in zip(own, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_filter_trick_is_near_the_true_gradient():
    """By features: the direction of the Gaussian's own; the lattice's derivative has another."""
    image = picture(1, 3, 24, 30).float() + 5 * random(1, 3, 24, 30, seed=4)
    logits, weights = random(1, 4, 24, 30), random(1, 4, 24, 30, seed=3)

    def by_image(**options):
        x = variable(image, torch.float32)
        bilateral = {"sxy": 8, "srgb": 25, "compat": 3}
        out = dense_crf(logits, x, bilateral=bilateral, iterations=2, **options)
        return torch.autograd.grad((out * weights).sum(), x)[0].flatten()

    truth, trick, lattice = (
        by_image(**options)
        for options in ({"backend": "exact"}, {}, {"feature_gradient": "lattice"})
    )

    def cosine(x):
        return float(torch.cosine_similarity(x, truth, 0))

    assert cosine(trick) > 0.9 and cosine(trick) > cosine(lattice)
    assert 0.4 < float(trick.norm() / truth.norm()) < 1.6


class TestRuntime:
    logits, image = random(3, 5, 70, 90), picture(3, 3, 70, 90)

    def grads(self, logits, image, count=1, **options):
        with threads(count):
            x, c = variable(logits, torch.float32), variable(compats("matrix", 5), torch.float32)
            sxy = variable([40.0, 40.0], torch.float32)
            bilateral = {"sxy": sxy, "srgb": 13, "compat": [1.0, 2.0, 3.0, 2.0, 1.0]}
            gaussian = {"sxy": 3, "compat": c}
            out = dense_crf(
                x, image, gaussian=gaussian, bilateral=bilateral, iterations=2, **options
            )
            weights = random(1, *out.shape[1:], seed=3)
            return torch.autograd.grad((out * weights).sum(), [x, c, sxy])

    def test_same_bits_on_any_number_of_threads(self):
        """Pictures of one band go side by side, larger ones band by band."""
        large = random(1, 5, 150, 160), picture(1, 3, 150, 160)
        for inputs in ((self.logits, self.image), large):
            one = self.grads(*inputs)
            for count in (1, 2, 5):
                assert all(map(same_bits, one, self.grads(*inputs, count=count)))

    def test_recompute_has_the_same_bits(self):
        kept = self.grads(self.logits, self.image)
        assert all(map(same_bits, kept, self.grads(self.logits, self.image, recompute=True)))

    def test_batch_is_its_images(self):
        batch = self.grads(self.logits, self.image)
        singles = [self.grads(self.logits[i : i + 1], self.image[i : i + 1]) for i in range(3)]
        assert same_bits(batch[0], torch.cat([s[0] for s in singles]))
        for k in (1, 2):
            torch.testing.assert_close(batch[k], sum(s[k] for s in singles), rtol=1e-5, atol=1e-4)

    def test_shared_image(self):
        """One set of features for a batch: its gradient is the sum over the batch."""

        def run(logits, image):
            x = image.float().requires_grad_()
            out = dense_crf(logits, x, bilateral=KERNELS["bilateral"], iterations=2)
            weights = random(1, *out.shape[1:], seed=3)
            return torch.autograd.grad((out * weights).sum(), x)[0]

        expanded = run(self.logits, self.image[:1].expand(3, -1, -1, -1)).sum(0, keepdim=True)
        torch.testing.assert_close(run(self.logits, self.image[:1]), expanded, rtol=1e-4, atol=1e-5)

    def test_what_is_kept(self):
        """The marginals, or with recompute none of them."""
        x = variable(self.logits, torch.float32)
        saved = []

        def pack(tensor):
            saved.append(tensor.nbytes if tensor.dtype == torch.float32 else 0)
            return tensor

        for recompute, marginals in ((False, 4), (True, 0)):
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                dense_crf(x, gaussian=KERNELS["gaussian"], iterations=4, recompute=recompute)
            rows = 4 * 8 * 3 * 70 * 90  # 5 labels in rows of 8
            assert marginals * rows <= sum(saved) <= marginals * rows + 2 * x.nbytes + 1000


class TestLayouts:
    @pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 3, 3, 4, 5)])
    def test_inputs_and_gradients(self, shape):
        logits, image, grad = random(*shape), picture(2, 3, *shape[2:]), random(*shape, seed=2)

        def run(x, g, output="probabilities"):
            x = x.detach().requires_grad_()
            out = dense_crf(x, image, **KERNELS, iterations=2, output=output)
            return torch.autograd.grad(out, x, g)[0]

        for output in ("probabilities", "logits"):
            expected = run(logits, grad, output)
            for name, x in layouts(logits):
                own = run(x, grad, output)
                assert same_bits(own, expected), name
                last = len(shape) == 4 and name in CHANNELS_LAST
                form = torch.channels_last if last else torch.contiguous_format
                assert own.is_contiguous(memory_format=form) or len(shape) == 5, name
            for name, g in layouts(grad):
                assert same_bits(run(logits, g, output), expected), name
            if len(shape) == 4:
                for name, g in expansions(grad):
                    assert same_bits(run(logits, g, output), run(logits, g.clone(), output)), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half(self, dtype):
        logits, image = random(1, 4, 8, 9).to(dtype), picture(1, 3, 8, 9)
        x, wide = logits.clone().requires_grad_(), variable(logits, torch.float32)
        for y in (x, wide):
            dense_crf(y, image, **KERNELS, iterations=3, output="logits").sum().backward()
        assert x.grad.dtype == dtype
        assert rms_error(x.grad, wide.grad.double()) < 1e-2

    @pytest.mark.parametrize("shape", [(0, 3, 5, 6), (1, 3, 1, 1), (1, 1, 1, 7), (2, 33, 3, 5)])
    def test_sizes(self, shape):
        x, compat = random(*shape).requires_grad_(), torch.tensor(2.0, requires_grad=True)
        gaussian = {"sxy": 2, "compat": compat}
        for iterations in (0, 1, 3):
            dense_crf(x, gaussian=gaussian, iterations=iterations).square().sum().backward()
        assert x.grad.shape == x.shape and x.grad.isfinite().all()
        assert compat.grad.isfinite()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape(data):
    labels = data.draw(st.integers(1, 35), label="labels")
    height, width = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 20)), label="size")
    kind = data.draw(st.sampled_from(KINDS), label="kind")
    iterations = data.draw(st.integers(0, 3), label="iterations")
    logits = random(2, labels, height, width)

    def run(crf, dtype):
        inputs = variable(logits, dtype), variable(compats(kind, labels, 0.3), dtype)
        gaussian = {"sxy": 2, "compat": inputs[1]}
        out = crf(inputs[0], gaussian=gaussian, iterations=iterations)
        weights = random(*out.shape, seed=3).to(dtype)
        grads = torch.autograd.grad((out * weights).sum(), inputs, materialize_grads=True)
        return grads

    pairs = zip(run(dense_crf, torch.float64), run(reference.dense_crf, torch.float64), strict=True)
    for own, plain in pairs:
        torch.testing.assert_close(own, plain, rtol=1e-8, atol=1e-9)


def test_forbidden_labels_and_nan():
    """-inf in a logit: the label stays at 0 and its gradient is 0; NaN in a gradient stays NaN."""
    logits = random(1, 3, 5, 6)
    logits[0, 1, :2] = -torch.inf
    x = logits.clone().requires_grad_()
    out = dense_crf(x, gaussian=KERNELS["gaussian"], iterations=3)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all() and (grad[0, 1, :2] == 0).all()
    p = logits.softmax(1).requires_grad_()
    out = dense_crf(p, gaussian=KERNELS["gaussian"], iterations=3, unary_type="probabilities")
    (grad,) = torch.autograd.grad(out.square().sum(), p)
    assert grad.isfinite().all() and (grad[0, 1, :2] == 0).all()
    bad = torch.zeros_like(logits)
    bad[0, 0, 2, 2] = torch.nan
    out = dense_crf(x, gaussian=KERNELS["gaussian"], iterations=1)
    assert torch.autograd.grad(out, x, bad)[0].isnan().any()
