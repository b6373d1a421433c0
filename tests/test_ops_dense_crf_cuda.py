# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the dense CRF, under the shim or on a GPU, against those of the CPU."""

from __future__ import annotations

import pytest
import torch
from _crf_cuda import difference, kernels
from _ops import NORMALIZATIONS, compats, layouts, picture, random, same_bits
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense.nn import DenseCRF
from pydense.ops import clear_lattice_cache, dense_crf, dense_crf_steps, permutohedral_filter

KINDS = ("potts", "diagonal", "matrix")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [1, 2, 5, 21, 140])
def test_iterations_of_the_cpu(on_gpu, labels, kind):
    logits, image = random(2, labels, 13, 17), picture(2, 3, 13, 17)
    options = kernels(kind, labels, 1 if labels < 100 or kind != "matrix" else 0.1)
    for iterations, limit in ((0, 1e-6), (1, 1e-5), (10, 1e-4)):
        if labels == 140 and iterations == 10:
            continue
        for output in ("probabilities", "logits"):
            arguments = {"iterations": iterations, "output": output, **options}
            expected = dense_crf(logits, image, **arguments)
            found = on_gpu(dense_crf, logits, image, **arguments)
            scale = 1 + float(expected.abs().max()) if output == "logits" else 1
            assert difference(found, expected) <= limit * scale
    found = on_gpu(dense_crf, logits, image, iterations=1, output="labels", **options)
    z = on_gpu(dense_crf, logits, image, iterations=1, output="logits", **options)
    assert torch.equal(found, z.argmax(1))


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalizations_in_float64(on_gpu, normalization, self_term):
    logits, image = random(2, 4, 9, 11, dtype=torch.float64), picture(1, 3, 9, 11)
    scale = 0.05 if normalization is None else 1.0
    options = {
        "normalization": normalization,
        "self_term": self_term,
        "iterations": 4,
        **kernels("matrix", 4, scale),
    }
    expected = dense_crf(logits, image, **options)
    assert difference(on_gpu(dense_crf, logits, image, **options), expected) < 1e-9


def test_many_kernels(on_gpu):
    logits = random(2, 3, 40, dtype=torch.float64)
    terms = [
        {"features": random(1 + i % 2, i, 40, seed=i), "compat": compats(KINDS[i % 3], 3, 0.3)}
        for i in range(1, 10)
    ]
    for self_term in (True, False):
        options = {"features": terms, "iterations": 2, "self_term": self_term}
        expected = dense_crf(logits, **options)
        assert difference(on_gpu(dense_crf, logits, **options), expected) < 1e-9


def test_layouts(on_gpu):
    logits, image = random(2, 5, 7, 9), picture(2, 3, 7, 9)
    options = {"iterations": 2, **kernels("potts", 5)}
    expected = on_gpu(dense_crf, logits, image, **options)
    for name, x in layouts(logits):
        out = on_gpu(dense_crf, x, image, **options)
        assert same_bits(out, expected), name
        assert out.stride() == dense_crf(x, image, **options).stride(), name
    for name, x in layouts(random(1, 3, 7, 9, seed=3)):
        filtered = on_gpu(permutohedral_filter, logits, x)
        assert same_bits(filtered, on_gpu(permutohedral_filter, logits, x.contiguous())), name


def test_alone_and_in_a_batch(on_gpu):
    logits, image = random(3, 5, 12, 10), picture(3, 3, 12, 10)
    options = kernels("potts", 5)
    together = on_gpu(dense_crf, logits, image, **options)
    shared = on_gpu(dense_crf, logits, image[:1], **options)
    for i in range(3):
        one = logits[i : i + 1]
        assert same_bits(together[i : i + 1], on_gpu(dense_crf, one, image[i : i + 1], **options))
        assert same_bits(shared[i : i + 1], on_gpu(dense_crf, one, image[:1], **options))


def test_same_bits_in_every_order(on_gpu):
    logits, image = random(2, 21, 15, 16), picture(2, 3, 15, 16)
    results = [
        on_gpu(dense_crf, logits, image, schedule=schedule, **kernels("matrix", 21))
        for schedule in range(4)
    ]
    assert all(same_bits(result, results[0]) for result in results)


def test_steps_are_the_iterations(on_gpu):
    logits, image = random(1, 5, 8, 9), picture(1, 3, 8, 9)
    options = {**kernels("diagonal", 5), "self_term": False}

    def last(logits, image, **options):
        *_, q = dense_crf_steps(logits, image, **options)
        return q

    found = on_gpu(last, logits, image, iterations=3, **options)
    assert same_bits(found, on_gpu(dense_crf, logits, image, iterations=3, **options))


@settings(max_examples=25)
@given(
    batch=st.integers(0, 3),
    shared=st.booleans(),
    channels=st.integers(1, 70),
    dims=st.integers(1, 12),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    normalization=st.sampled_from(NORMALIZATIONS),
    self_term=st.booleans(),
    reverse=st.booleans(),
    scale=st.floats(0.01, 30),
)
def test_any_filter(on_gpu, batch, shared, channels, dims, spatial, scale, **options):
    features = scale * random(1 if shared else batch, dims, *spatial, seed=3, dtype=torch.float64)
    values = random(batch, channels, *spatial, seed=4, dtype=torch.float64)
    found = on_gpu(permutohedral_filter, values, features, **options)
    assert found.shape == values.shape and found.is_contiguous()
    if batch:
        expected = permutohedral_filter(values, features, **options)
        tolerance = 1e-10 if options["self_term"] else 1e-8
        assert difference(found, expected) <= tolerance * (1 + float(expected.abs().max()))


def test_nothing(on_gpu):
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        logits, image = torch.zeros(shape), torch.zeros(shape)
        assert on_gpu(dense_crf, logits, image, **kernels("potts", 3)).shape == shape
        assert on_gpu(permutohedral_filter, logits, image).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(on_gpu, dtype):
    logits, image = random(1, 4, 6, 7).to(dtype), picture(1, 3, 6, 7)
    wide = on_gpu(DenseCRF(), logits.float(), image)
    assert same_bits(on_gpu(DenseCRF(), logits, image), wide.to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_features_that_are_refused(on_gpu, bad):
    features = random(2, 3, 50, seed=16)
    features[1, 2, 49] = bad
    with pytest.raises((ValueError, RuntimeError), match="features must be finite and within"):
        on_gpu(permutohedral_filter, random(2, 2, 50), features)


def test_what_is_no_distribution_is_nan(on_gpu):
    """Nothing is read back while iterating: the points get NaN, their labels -1, others nothing."""
    logits = random(1, 3, 30)
    logits[0, 1, 4] = torch.nan
    logits[0, :, 5] = -torch.inf
    logits[0, 0, 6] = -torch.inf
    far = {"features": [{"features": 100 * torch.arange(30.0).view(1, 1, 30), "compat": 1}]}
    q = on_gpu(dense_crf, logits, iterations=2, **far)
    labels = on_gpu(dense_crf, logits, iterations=2, output="labels", **far)
    ok = torch.tensor([i not in (4, 5) for i in range(30)])
    assert q[..., ~ok].isnan().all() and not q[..., ok].isnan().any()
    assert labels[0][~ok].eq(-1).all() and labels[0][ok].ge(0).all()
    assert q[0, 0, 6] == 0


def test_other_lattices_are_refused(on_gpu):
    clear_lattice_cache()
    op = torch.ops.pydense
    lattice = op.dense_crf_lattice(random(1, 3, 6, 7), "none", True)  # of the CPU

    def use(values, lattice):
        return op.permutohedral_filter(values, lattice, False)

    with pytest.raises((ValueError, RuntimeError), match="lattice must"):
        on_gpu(use, random(1, 2, 6, 7), lattice)

    def of_another_size(values, features):
        return use(values, op.dense_crf_lattice(features, "none", True))

    with pytest.raises((ValueError, RuntimeError), match="lattice must"):
        on_gpu(of_another_size, random(1, 2, 6, 7), random(1, 3, 40, 70))
    with pytest.raises((ValueError, RuntimeError), match="dtype float32, got float64"):
        on_gpu(of_another_size, random(1, 2, 6, 7), random(1, 3, 6, 7, dtype=torch.float64))
