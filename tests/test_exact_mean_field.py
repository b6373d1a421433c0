# SPDX-License-Identifier: Apache-2.0
"""Mean field on the exact filter: recorded brute force, the oracle, the same bits everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _ops import NORMALIZATIONS, compats, random, same_bits, threads
from _oracle import ExactKernel as Oracle
from _oracle import MeanField

from pydense.ops import exact_gaussian_filter
from pydense.ops._exact import ExactKernel, apply_compat, exact_mean_field, iterate_exact


def error(out, expected):
    return float((out.double() - expected).abs().max())


NAMES = {"SYM": "symmetric", "AFTER": "after", "BEFORE": "before"}


def crop(golden, dtype):
    """Logits and features of the recorded crop: xy / 3, and xy / 80 with colour / 13."""
    image = golden["image"]
    height, width, _ = image.shape
    x, y = np.tile(np.arange(width), height), np.repeat(np.arange(height), width)
    place = torch.from_numpy(np.stack([x, y])).to(dtype).unsqueeze(0)
    colour = torch.from_numpy(image.reshape(-1, 3).T.copy()).to(dtype).unsqueeze(0)
    logits = -torch.from_numpy(golden["unary"]).to(dtype).unsqueeze(0)
    return logits, [place / 3, torch.cat([place / 80, colour / 13], 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NAMES)
def test_mean_field_reproduces_recorded_brute_force(golden, norm, dtype):
    logits, features = crop(golden, dtype)
    potts = [torch.tensor(w, dtype=dtype) for w in (3.0, 10.0)]
    options = {"normalization": NAMES[norm], "self_term": True}
    for iterations in (1, 5):
        last, q = exact_mean_field(logits, features, potts, iterations=iterations, **options)
        expected = golden[f"exact_{norm}_potts_it{iterations}"]
        assert np.abs(q[0].double().numpy() - expected).max() <= 1e-5
        assert error(torch.softmax(last, 1), q.double()) < 1e-6


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("kind", ["potts", "diagonal", "matrix"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_mean_field_against_the_oracle(normalization, kind, self_term):
    labels, points = 5, 60
    logits = random(2, labels, points, dtype=torch.float64)
    features = [random(1, 2, points, seed=1), random(2, 5, points, seed=2)]
    features = [f.double() for f in features]
    terms = [torch.as_tensor(compats(kind, labels, 0.3, seed)).double() for seed in (3, 4)]
    options = {"normalization": normalization, "self_term": self_term}
    _, q = exact_mean_field(logits, features, terms, iterations=3, **options)
    for b in range(2):
        pairs = []
        for f, compat in zip(features, terms, strict=True):
            kernel = Oracle(f[min(b, len(f) - 1)].numpy())
            kernel.matrix -= 0 if self_term else np.eye(points)
            c = compat.numpy()
            pairs.append((kernel, c, normalization or "none"))
        oracle = MeanField(-logits[b].numpy(), pairs)
        # Its signs are pydensecrf's, and it symmetrises: put the matrices in their place.
        for i, (_, c, _) in enumerate(pairs):
            full = c * np.eye(labels) if c.ndim == 0 else np.diag(c) if c.ndim == 1 else c
            oracle.terms[i] = (oracle.terms[i][0], -full, *oracle.terms[i][2:])
        assert np.abs(oracle.run(3) - q[b].numpy()).max() < 1e-12


def test_mean_field_in_steps_batches_and_threads():
    """An odd number of points and labels: no vector is full at the ends."""
    labels, points = 7, 1237
    logits = 3 * random(3, labels, points)
    features = [random(1, 2, points, seed=1), 2 * random(3, 5, points, seed=2)]
    terms = [torch.tensor(0.5), compats("matrix", labels, 0.3)]
    options = {"normalization": "symmetric", "self_term": False}
    whole = exact_mean_field(logits, features, terms, iterations=3, **options)
    kernels = [ExactKernel(f, "symmetric", False) for f in features]
    q = None
    for _ in range(3):
        stepped = iterate_exact(logits, kernels, terms, 1, q)
        q = stepped[1]
    assert all(map(same_bits, stepped, whole))
    for b in range(3):
        own = [features[0], features[1][b : b + 1]]
        alone = exact_mean_field(logits[b : b + 1], own, terms, iterations=3, **options)
        assert all(map(same_bits, alone, (x[b : b + 1] for x in whole)))
    for count in (1, 2, 3, 4):
        with threads(count):
            again = exact_mean_field(logits, features, terms, iterations=3, **options)
        assert all(map(same_bits, again, whole))
    with torch.autocast("cpu", torch.bfloat16):
        again = exact_mean_field(logits, features, terms, iterations=3, **options)
    assert all(map(same_bits, again, whole))


def test_mean_field_without_iterations():
    logits = random(2, 5, 40)
    options = {"normalization": "after", "self_term": True}
    features, terms = [random(1, 2, 40)], [torch.tensor(1.0)]
    last, q = exact_mean_field(logits, features, terms, iterations=0, **options)
    assert torch.equal(last, logits) and error(q, logits.double().softmax(1)) < 1e-6
    start = random(2, 5, 40, seed=1).softmax(1)
    given = exact_mean_field(logits, features, terms, iterations=0, q=start, **options)
    assert torch.equal(given[1], start)
    once = exact_mean_field(logits, features, terms, iterations=1, q=start, **options)
    expected = logits + exact_gaussian_filter(start, features[0], normalization="after")
    assert error(once[0], expected.double()) < 1e-6


def test_one_form_of_compatibility_in_the_other():
    message = random(2, 4, 30)
    expected = apply_compat(torch.tensor(-1.5), message)
    assert same_bits(apply_compat(torch.full((4,), -1.5), message), expected)
    assert torch.equal(apply_compat(-1.5 * torch.eye(4), message), expected)
    matrix = random(4, 4, seed=1)
    assert error(apply_compat(matrix, message), (matrix.double() @ message.double())) < 1e-5


def test_forbidden_labels_stay_forbidden():
    logits = random(1, 3, 30)
    logits[:, 1] = -float("inf")
    options = {"normalization": "symmetric", "self_term": True}
    _, q = exact_mean_field(
        logits, [random(1, 2, 30)], [torch.tensor(2.0)], iterations=2, **options
    )
    assert (q[:, 1] == 0).all() and error(q.sum(1), torch.ones(1, 30).double()) < 1e-6
