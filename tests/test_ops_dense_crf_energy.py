# SPDX-License-Identifier: Apache-2.0
"""Free energy of marginals and energy of labellings, against sums written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from _ops import NORMALIZATIONS, compats, picture, random, threads
from _ops import one_thread as one_thread

import pydense.densecrf as dcrf
from pydense.ops import (
    FreeEnergy,
    dense_crf,
    dense_crf_energy,
    dense_crf_free_energy,
    dense_crf_steps,
    exact_gaussian_filter,
    permutohedral_filter,
)

KINDS = ("potts", "diagonal", "matrix")
BACKENDS = ("lattice", "exact")
FILTERS = {"lattice": permutohedral_filter, "exact": exact_gaussian_filter}


def as_matrix(compat, labels):
    compat = torch.as_tensor(compat, dtype=torch.float64)
    if compat.dim() == 2:
        return compat
    return torch.diag(compat.expand(labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("self_term", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_free_energy_by_hand(kind, normalization, self_term, backend):
    labels = 3
    compat = compats(kind, labels)
    logits, q = random(2, labels, 40), random(2, labels, 40, seed=1).softmax(1)
    features = [random(2, 4, 40, seed=2) / 2, random(1, 2, 40, seed=3)]
    options = {"normalization": normalization, "self_term": self_term}
    kernels = [{"features": f, "compat": compat} for f in features]
    matrix = as_matrix(compat, labels)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        parts = dense_crf_free_energy(
            q.to(dtype), logits.to(dtype), features=kernels, backend=backend, **options
        )
        wide = q.double()
        negative_entropy = (wide * wide.log()).sum((1, 2))
        unary = -(wide * logits.double()).sum((1, 2))
        pairwise = torch.zeros(2, dtype=torch.float64)
        for f in features:
            messages = matrix @ FILTERS[backend](wide, f.double(), **options)
            pairwise -= (wide * messages).sum((1, 2))
        expected = FreeEnergy(negative_entropy, unary, pairwise)
        for part, wanted in zip(parts, expected, strict=True):
            assert part.shape == (2,) and part.dtype == torch.float64
            assert (part - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())
    half = parts.pairwise / 2
    torch.testing.assert_close(parts.kl, parts.negative_entropy + parts.unary + half)
    torch.testing.assert_close(parts.pydensecrf_kl, parts.kl + half)


def test_what_pydensecrf_prints():
    logits, image = random(1, 4, 21, 33), picture(1, 3, 21, 33)
    kernels = {
        "gaussian": {"sxy": 3, "compat": 3},
        "bilateral": {"sxy": 40, "srgb": 13, "compat": 10},
    }
    model = dcrf.DenseCRF2D(33, 21, 4)
    model.setUnaryEnergy(-logits.view(4, -1).numpy())
    model.addPairwiseGaussian(3, 3)
    model.addPairwiseBilateral(40, 13, image[0].movedim(0, 2).numpy(), 10)
    for q in dense_crf_steps(logits, image, iterations=3, **kernels):
        parts = dense_crf_free_energy(q, logits, image, **kernels)
        expected = model.klDivergence(q.view(4, -1).numpy())
        assert float(parts.pydensecrf_kl) == pytest.approx(expected, rel=1e-6)


def test_images_alone_and_in_a_batch():
    logits, image = random(3, 4, 12, 13), picture(3, 3, 12, 13)
    kernels = {"bilateral": {"sxy": 9, "srgb": 13, "compat": 5}}
    q = dense_crf(logits, image, **kernels)
    together = dense_crf_free_energy(q, logits, image, **kernels)
    for b in range(3):
        one = [x[b : b + 1] for x in (q, logits, image)]
        alone = dense_crf_free_energy(*one, **kernels)
        assert all(torch.equal(a, t[b : b + 1]) for a, t in zip(alone, together, strict=True))
    empty = dense_crf_free_energy(q[:0], logits[:0], image[:0], **kernels)
    assert all(part.shape == (0,) for part in empty)


def test_threads():
    logits, image = random(1, 5, 150, 130), picture(1, 3, 150, 130)
    kernels = {"bilateral": {"sxy": 9, "srgb": 13, "compat": 5}}
    q = logits.softmax(1)
    results = []
    for count in (1, 2, 4, 4):
        with threads(count):
            results.append(dense_crf_free_energy(q, logits, image, **kernels))
    assert all(all(map(torch.equal, results[0], result)) for result in results)


def test_16_bit():
    logits = random(1, 3, 10, 10).bfloat16()
    q = dense_crf(logits, gaussian={"sxy": 3, "compat": 2})
    narrow = dense_crf_free_energy(q, logits, gaussian={"sxy": 3, "compat": 2})
    wide = dense_crf_free_energy(q.float(), logits.float(), gaussian={"sxy": 3, "compat": 2})
    assert all(map(torch.equal, narrow, wide)) and narrow.kl.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_lower_the_free_energy(backend):
    """Parallel updates need not, but with weak attraction they do; and iteration converges."""
    logits, image = random(1, 3, 12, 14, dtype=torch.float64), picture(1, 3, 12, 14)
    kernels = {"bilateral": {"sxy": 20, "srgb": 20, "compat": 1}, "backend": backend}
    trace = [
        float(dense_crf_free_energy(q, logits, image, **kernels).kl)
        for q in dense_crf_steps(logits, image, iterations=8, **kernels)
    ]
    assert trace == sorted(trace, reverse=True) and trace[-2] - trace[-1] < 1e-4 * abs(trace[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("self_term", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_energy_by_pairs(kind, self_term, backend):
    """E = sum U - 1/2 sum over i, j of C(l_i, l_j) K_ij, one pair after the other."""
    logits, points = random(1, 3, 12, dtype=torch.float64), 12
    features = random(1, 2, points, seed=1)
    labels = torch.arange(points).remainder(3).view(1, -1)
    compat = compats(kind, 3)
    options = {"self_term": self_term, "normalization": "symmetric"}
    eye = torch.eye(points, dtype=torch.float64).unsqueeze(0)
    kernel = FILTERS[backend](eye, features, **options)[0].T
    matrix = as_matrix(compat, 3)
    expected = -sum(logits[0, labels[0, i], i] for i in range(points))
    for i, j in itertools.product(range(points), repeat=2):
        expected -= 0.5 * matrix[labels[0, i], labels[0, j]] * kernel[i, j]
    term = {"features": features, "compat": compat}
    energy = dense_crf_energy(labels, logits, features=[term], backend=backend, **options)
    assert energy.dtype == torch.float64 and float(energy) == pytest.approx(float(expected))


def test_energy_of_images():
    logits, image = random(2, 5, 9, 8), picture(2, 3, 9, 8)
    kernels = {"gaussian": {"sxy": 2, "compat": 1}, "unary_type": "energy"}
    labels = dense_crf(logits, image, output="labels", **kernels)
    expected = dense_crf_energy(labels, logits, image, **kernels)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(dense_crf_energy(labels.to(dtype), logits, image, **kernels), expected)
    constant = torch.zeros(1, dtype=torch.int64).expand(2, 9, 8)
    assert (dense_crf_energy(constant, logits, image, **kernels) > expected).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_labels(backend):
    """They cost nothing where they have no probability and everything where they are chosen."""
    logits = random(1, 3, 4, 5)
    logits[0, 1, 2, 3] = -torch.inf
    model = {"gaussian": {"sxy": 2, "compat": 1}, "backend": backend}
    labels = dense_crf(logits, output="labels", **model)
    parts = dense_crf_free_energy(dense_crf(logits, **model), logits, **model)
    assert all(part.isfinite().all() for part in parts)
    assert dense_crf_energy(labels, logits, **model).isfinite().all()
    labels[0, 2, 3] = 1
    assert dense_crf_energy(labels, logits, **model).item() == torch.inf


class TestErrors:
    logits = random(2, 3, 4, 5)
    labels = torch.zeros(2, 4, 5, dtype=torch.int64)

    def test_marginals(self):
        for q in (self.logits[:1], self.logits[:, :2], self.logits.flatten(2)):
            with pytest.raises(ValueError, match=r"free_energy: q must have the shape of unary"):
                dense_crf_free_energy(q, self.logits)
        with pytest.raises(TypeError, match="dense_crf_free_energy: q must be a tensor, got None"):
            dense_crf_free_energy(None, self.logits)
        with pytest.raises(TypeError, match="dense_crf_free_energy: q must be of dtype"):
            dense_crf_free_energy(self.labels, self.logits)
        for bad in (torch.nan, -0.1, 1.1, torch.inf):
            q = self.logits.softmax(1)
            q[1, 1, 1, 1] = bad
            with pytest.raises(ValueError, match="q must hold probabilities, got numbers outside"):
                dense_crf_free_energy(q, self.logits, gaussian={"sxy": 2, "compat": 1})

    def test_labels(self):
        for labels in (self.labels[:1], self.labels[..., :4], self.labels.unsqueeze(1)):
            with pytest.raises(ValueError, match=r"labels must have shape \(2, 4, 5\), got"):
                dense_crf_energy(labels, self.logits)
        for labels in (self.labels.float(), self.labels.bool(), self.labels.to(torch.complex64)):
            with pytest.raises(TypeError, match="labels must be of an integer dtype"):
                dense_crf_energy(labels, self.logits)
        with pytest.raises(TypeError, match="labels must be a tensor, got list"):
            dense_crf_energy(self.labels.tolist(), self.logits)
        for bad in (-1, 3, 255):
            labels = self.labels.clone()
            labels[1, 2, 3] = bad
            with pytest.raises(ValueError, match=rf"labels must be in \[0, 2\], got {bad}"):
                dense_crf_energy(labels, self.logits)
            compiled = torch.compile(dense_crf_energy, fullgraph=True, backend="aot_eager")
            with pytest.raises(RuntimeError, match="out of bounds"):
                compiled(labels, self.logits)
