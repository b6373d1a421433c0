# SPDX-License-Identifier: Apache-2.0
"""The exact Gaussian filter by CUDA kernels, under the shim or on a GPU, and mean field with it."""

from __future__ import annotations

import pytest
import torch
from _crf_cuda import difference, kernels, relative
from _ops import NORMALIZATIONS, compats, layouts, picture, random, same_bits
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense.nn import DenseCRF
from pydense.ops import dense_crf, dense_crf_steps, exact_gaussian_filter


@pytest.mark.parametrize("self_term", [True, False])
@pytest.mark.parametrize("dims", [2, 5, 9])
def test_one_pass_against_float64(on_gpu, dims, self_term):
    for points, channels in ((130, 3), (300, 21)):
        features, values = random(1, dims, points, seed=dims), random(1, channels, points).abs()
        options = {"self_term": self_term}
        expected = exact_gaussian_filter(values.double(), features.double(), **options)
        out = on_gpu(exact_gaussian_filter, values, features, **options)
        assert out.dtype == torch.float32 and relative(out, expected) <= 1e-6
        wide = on_gpu(exact_gaussian_filter, values.double(), features.double(), **options)
        assert relative(wide, expected) <= 1e-14


@settings(max_examples=20)
@given(
    batch=st.integers(0, 3),
    shared=st.booleans(),
    channels=st.integers(1, 70),
    dims=st.integers(1, 12),
    spatial=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    normalization=st.sampled_from(NORMALIZATIONS),
    self_term=st.booleans(),
    scale=st.floats(0.01, 30),
)
def test_any_shape(on_gpu, batch, shared, channels, dims, spatial, scale, **options):
    features = scale * random(1 if shared else batch, dims, *spatial, seed=3, dtype=torch.float64)
    values = random(batch, channels, *spatial, seed=4, dtype=torch.float64)
    found = on_gpu(exact_gaussian_filter, values, features, **options)
    assert found.shape == values.shape and found.is_contiguous()
    if found.numel():
        expected = exact_gaussian_filter(values, features, **options)
        assert difference(found, expected) <= 1e-12 * (1 + float(expected.abs().max()))
    single = on_gpu(exact_gaussian_filter, values.float(), features.float(), **options)
    for b in range(batch):
        own = features if shared else features[b : b + 1]
        alone = on_gpu(
            exact_gaussian_filter, values[b : b + 1].float(), own.float(), schedule=b, **options
        )
        assert same_bits(single[b : b + 1], alone)


def test_layouts(on_gpu):
    values, features = random(2, 5, 7, 9), random(2, 3, 7, 9, seed=1)
    expected = on_gpu(exact_gaussian_filter, values, features)
    for (name, x), (_, f) in zip(layouts(values), layouts(features), strict=True):
        assert same_bits(on_gpu(exact_gaussian_filter, x, f), expected), name
    op = torch.ops.pydense.exact_gaussian_filter
    flat = on_gpu(op, values.flatten(2), features.flatten(2), True)
    for (name, x), (_, f) in zip(
        layouts(values.flatten(2)), layouts(features.flatten(2)), strict=True
    ):
        assert same_bits(on_gpu(op, x, f, True), flat), name


def test_nan_and_infinity(on_gpu):
    """As on the CPU: where the sums of the definition have them."""
    values, features = random(2, 3, 150), random(2, 2, 150, seed=1)
    values[0, 1, 7] = torch.nan
    values[1, 2, 7] = torch.inf
    features[1, 0, 140] = torch.inf
    for options in ({}, {"self_term": False}):
        expected = exact_gaussian_filter(values, features, **options)
        found = on_gpu(exact_gaussian_filter, values, features, **options)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dims", "points"), [(2, 150), (9, 150), (3, 1), (9, 5), (2, 300)])
def test_infinity_of_the_last_point(on_gpu, dims, points, dtype):
    """What fills the last tile of keys up is not there, whatever the last point is."""
    values = random(1, 2, points, dtype=dtype)
    features = random(1, dims, points, seed=1, dtype=dtype)
    features[0, dims - 1, -1] = torch.inf
    for options in ({}, {"self_term": False}, {"self_term": False, "normalization": "after"}):
        expected = exact_gaussian_filter(values, features, **options)
        found = on_gpu(exact_gaussian_filter, values, features, **options)
        torch.testing.assert_close(found, expected, equal_nan=True)
    features[0, 0, -1] = torch.nan
    found = on_gpu(exact_gaussian_filter, values, features, self_term=False)
    expected = exact_gaussian_filter(values, features, self_term=False)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("self_term", [True, False])
def test_gradients(on_gpu, self_term):
    """The same derivatives as on the CPU, of values and of features that images share."""

    def derive(values, features, weights):
        leaves = [x.detach().requires_grad_() for x in (values, features)]
        out = exact_gaussian_filter(*leaves, normalization="symmetric", self_term=self_term)
        return list(torch.autograd.grad((out * weights).sum(), leaves))

    values, features = random(2, 4, 30, dtype=torch.float64), random(1, 3, 30, seed=1)
    inputs = values, features.double(), random(2, 4, 30, seed=2, dtype=torch.float64)
    for found, expected in zip(on_gpu(derive, *inputs), derive(*inputs), strict=True):
        assert difference(found, expected) < 1e-11


@pytest.mark.parametrize("kind", ["potts", "diagonal", "matrix"])
@pytest.mark.parametrize("labels", [1, 5, 21])
def test_mean_field_of_the_cpu(on_gpu, labels, kind):
    logits, image = random(2, labels, 9, 11), picture(2, 3, 9, 11)
    options = {"backend": "exact", **kernels(kind, labels)}
    for iterations, limit in ((0, 1e-6), (1, 1e-5), (10, 1e-4)):
        for output in ("probabilities", "logits"):
            arguments = {"iterations": iterations, "output": output, **options}
            expected = dense_crf(logits, image, **arguments)
            found = on_gpu(dense_crf, logits, image, **arguments)
            scale = 1 + float(expected.abs().max()) if output == "logits" else 1
            assert difference(found, expected) <= limit * scale
            assert found.stride() == expected.stride()
    labels_found = on_gpu(dense_crf, logits, image, iterations=1, output="labels", **options)
    z = on_gpu(dense_crf, logits, image, iterations=1, output="logits", **options)
    assert torch.equal(labels_found, z.argmax(1))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalizations_batches_steps_and_orders(on_gpu, normalization):
    logits, image = random(2, 4, 8, 9), picture(2, 3, 8, 9)
    options = {"normalization": normalization, "self_term": False, "backend": "exact"}
    options |= kernels("diagonal", 4, 0.05 if normalization is None else 1)
    found = on_gpu(dense_crf, logits, image, iterations=3, **options)
    assert difference(found, dense_crf(logits, image, iterations=3, **options)) < 1e-5
    for i in range(2):
        one = on_gpu(dense_crf, logits[i : i + 1], image[i : i + 1], iterations=3, **options)
        assert same_bits(one, found[i : i + 1])

    def last(logits, image, **options):
        *_, q = dense_crf_steps(logits, image, **options)
        return q

    for schedule in range(3):
        again = on_gpu(last, logits, image, schedule=schedule, iterations=3, **options)
        assert same_bits(again, found)


def test_gradients_of_the_mean_field(on_gpu):
    """By logits, every form of a compatibility and features, through three iterations."""
    inputs = [random(2, 3, 5, 6), random(1, 4, 5, 6, seed=1), random(2, 3, 5, 6, seed=2)]
    inputs += [torch.as_tensor(compats(kind, 3, 0.3)) for kind in ("potts", "diagonal", "matrix")]

    def derive(logits, features, weights, *compatibilities):
        leaves = [x.double().requires_grad_() for x in (logits, features, *compatibilities)]
        terms = [{"features": leaves[1] * (i + 1), "compat": c} for i, c in enumerate(leaves[2:])]
        out = dense_crf(leaves[0], features=terms, iterations=3, backend="exact")
        return list(torch.autograd.grad((out * weights).sum(), leaves))

    for found, expected in zip(on_gpu(derive, *inputs), derive(*inputs), strict=True):
        assert difference(found, expected) <= 1e-10 * (1 + float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_layer(on_gpu, dtype):
    logits, image = random(1, 4, 6, 7).to(dtype), picture(1, 3, 6, 7)
    layer = DenseCRF(backend="exact")
    wide = on_gpu(layer, logits.float(), image)
    assert same_bits(on_gpu(layer, logits, image), wide.to(dtype))


def test_nothing(on_gpu):
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        x = torch.zeros(shape)
        assert on_gpu(exact_gaussian_filter, x, x, normalization="after").shape == shape
        out = on_gpu(dense_crf, x, x, backend="exact", **kernels("potts", 3))
        assert out.shape == shape
