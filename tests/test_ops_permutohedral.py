# SPDX-License-Identifier: Apache-2.0
"""pydense.ops.permutohedral_filter: against the plain-torch lattice, brute force and itself."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from _ops import NORMALIZATIONS, layouts, one_number, random, same_bits, threads
from _ops import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense import _core, reference
from pydense.ops import permutohedral_filter


def error(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def matrix(features, **options):
    """K as a (P, P) matrix for features (1, d, P), column by column."""
    points = features.shape[-1]
    eye = torch.eye(points, dtype=features.dtype).unsqueeze(0)  # channel j = unit vector j
    return permutohedral_filter(eye, features, **options)[0].T


@pytest.mark.parametrize("reverse", [False, True])
def test_bits_of_the_numpy_door(reverse):
    features, values = 3 * random(1, 5, 30, 40, seed=1), random(1, 21, 30, 40, seed=2)
    expected = _core.Lattice(features.view(5, -1).numpy()).filter(
        values.view(21, -1).numpy(), reverse=reverse
    )
    out = permutohedral_filter(values, features, reverse=reverse)
    assert np.array_equal(out.view(21, -1).numpy(), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("self_term", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dims", [1, 2, 5, 9])
def test_against_the_reference(dims, normalization, self_term, reverse):
    options = {"normalization": normalization, "self_term": self_term, "reverse": reverse}
    features, values = random(2, dims, 200, seed=dims) / dims**0.5, random(2, 3, 200, seed=10)
    expected = reference.permutohedral_filter(values.double(), features.double(), **options)
    out = permutohedral_filter(values.double(), features.double(), **options)
    assert error(out, expected) < 1e-10
    plain = error(reference.permutohedral_filter(values, features, **options), expected)
    assert error(permutohedral_filter(values, features, **options), expected) < 2 * plain + 1e-6


@settings(max_examples=40)
@given(
    batch=st.integers(0, 3),
    shared=st.booleans(),
    channels=st.integers(1, 40),
    dims=st.integers(1, 12),
    spatial=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    normalization=st.sampled_from(NORMALIZATIONS),
    self_term=st.booleans(),
    scale=st.floats(0.01, 30),
)
def test_any_shape(batch, shared, channels, dims, spatial, normalization, self_term, scale):
    options = {"normalization": normalization, "self_term": self_term}
    features = scale * random(1 if shared else batch, dims, *spatial, seed=3, dtype=torch.float64)
    values = random(batch, channels, *spatial, seed=4, dtype=torch.float64)
    out = permutohedral_filter(values, features, **options)
    assert out.shape == values.shape and out.dtype == torch.float64 and out.is_contiguous()
    if batch:
        expected = reference.permutohedral_filter(values, features, **options)
        # What is left without a point itself may be 1e-3 of what there was.
        tolerance = 1e-10 if self_term else 1e-8
        assert (out - expected).abs().max() <= tolerance * (1 + expected.abs().max())
    single = permutohedral_filter(values.float(), features.float(), **options)
    for b in range(batch):
        own = features if shared else features[b : b + 1]
        alone = permutohedral_filter(values[b : b + 1].float(), own.float(), **options)
        assert same_bits(single[b : b + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_self_term_is_the_diagonal(normalization, dtype):
    """Without the self term, K is K with the diagonal that unit vectors show set to 0."""
    features = random(1, 3, 60, seed=5, dtype=dtype)
    kernel = matrix(features).double()
    kernel.fill_diagonal_(0)
    mass = kernel.sum(1)
    assert mass.min() > 0.01
    expected = {
        "symmetric": mass.rsqrt()[:, None] * kernel * mass.rsqrt(),
        "before": kernel / mass,
        "after": kernel / mass[:, None],
        None: kernel,
    }[normalization]
    out = matrix(features, normalization=normalization, self_term=False)
    assert error(out, expected) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_points_far_from_all_others(normalization):
    """Without the self term nothing is left of K, and what is left must not be rounding errors."""
    features = 100 * torch.arange(6.0).view(1, 1, 6) * torch.tensor([1.0, -2.0]).view(1, 2, 1)
    values = random(1, 2, 6, seed=6)
    for dtype, tolerance in ((torch.float32, 5e-4), (torch.float64, 1e-11)):
        x, f = values.to(dtype), features.to(dtype)
        alone = permutohedral_filter(x, f, normalization=normalization, self_term=False)
        assert alone.abs().max() < tolerance
        kept = permutohedral_filter(x, f, normalization=normalization)
        if normalization is not None:
            assert error(kept, x) < 1e-6


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_reverse_is_the_transpose(normalization):
    features = random(1, 5, 80, seed=7, dtype=torch.float64)
    for self_term in (False, True):
        options = {"normalization": normalization, "self_term": self_term}
        forward = matrix(features, **options)
        assert error(matrix(features, reverse=True, **options), forward.T) < 1e-12
        assert error(forward, forward.T) > 1e-3  # or the line above proves nothing


def test_normalised_mass_is_one():
    features, ones = random(1, 5, 300, seed=8), torch.ones(1, 1, 300)
    out = permutohedral_filter(ones, features, normalization="after")
    assert (out - 1).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 5, 37), (2, 5, 9, 11), (2, 5, 3, 4, 5)])
def test_layouts(shape):
    values, features = random(*shape, seed=9), random(2, 3, *shape[2:], seed=10)
    expected = permutohedral_filter(values, features)
    for name, x in layouts(values):
        before = x.clone()
        assert same_bits(permutohedral_filter(x, features), expected), name
        assert torch.equal(x, before), name
    for name, f in layouts(features):
        out = permutohedral_filter(values, f)
        assert same_bits(out, expected) and out.is_contiguous(), name
    flat = permutohedral_filter(values.flatten(2), features.flatten(2))
    assert same_bits(flat.view(shape), expected)


def test_expanded():
    features = random(1, 3, 6, 7, seed=11)
    constant = one_number((2, 4, 6, 7))
    expected = permutohedral_filter(constant.contiguous(), features)
    assert same_bits(permutohedral_filter(constant, features), expected)
    assert same_bits(permutohedral_filter(constant, features.expand(2, 3, 6, 7)), expected)
    everywhere = one_number((1, 3, 6, 7))  # all points at one place: the mean of all
    out = permutohedral_filter(random(1, 2, 6, 7), everywhere, normalization="after")
    assert (out - random(1, 2, 6, 7).mean((2, 3), keepdim=True)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(dtype):
    values, features = random(2, 3, 50, seed=12).to(dtype), random(2, 4, 50, seed=13)
    wide = permutohedral_filter(values.float(), features)
    out = permutohedral_filter(values, features)
    assert out.dtype == dtype and same_bits(out, wide.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(permutohedral_filter(values, features), out)
        assert same_bits(permutohedral_filter(values.float(), features), wide)
    rounded = features.to(dtype)
    assert same_bits(
        permutohedral_filter(values.float(), rounded),
        permutohedral_filter(values.float(), rounded.float()),
    )


def test_features_of_other_dtypes():
    values, features = random(1, 2, 40), torch.arange(40).view(1, 1, 40)
    expected = permutohedral_filter(values, features.float())
    for dtype in (torch.uint8, torch.int64, torch.float64):
        assert same_bits(permutohedral_filter(values, features.to(dtype)), expected)


def test_no_points():
    for shape in ((2, 3, 0), (2, 3, 0, 5), (2, 3, 4, 0, 5), (0, 3, 4, 5)):
        out = permutohedral_filter(torch.zeros(shape), torch.zeros(shape), normalization="after")
        assert out.shape == shape


def test_threads_and_runs():
    """60,000 points: more than one band of the lattice."""
    features, values = 2 * random(2, 5, 300, 200, seed=14), random(2, 5, 300, 200, seed=15)
    results = []
    for count in (1, 2, 4, 4):
        with threads(count):
            results.append(permutohedral_filter(values, features, normalization="symmetric"))
    assert all(same_bits(result, results[0]) for result in results)


def test_nan_in_values_stays_near():
    values, features = random(1, 1, 100), 10 * torch.arange(100.0).view(1, 1, 100)
    values[..., 30] = float("nan")
    out = permutohedral_filter(values, features)
    assert out[..., 30].isnan() and not out[..., 40:].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_out_of_range(bad, dtype):
    features = random(2, 3, 50, seed=16, dtype=dtype)
    features[1, 2, 49] = bad
    with pytest.raises(ValueError, match=r"features must be finite and within"):
        permutohedral_filter(random(2, 2, 50), features)


V, F = torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((None, F), TypeError, "values must be a tensor, got None"),
        ((V.numpy(), F), TypeError, "values must be a tensor, got ndarray"),
        ((V.int(), F), TypeError, "values must be of dtype float32, float64, float16 or bfloat16"),
        ((V.to(torch.complex64), F), TypeError, "values must be of dtype"),
        ((V[0, 0], F), ValueError, "values must have a shape out of (N, C, P), (N, C, H, W)"),
        ((V[:, :0], F), ValueError, "with C >= 1, got (2, 0, 4, 5)"),
        ((V, None), TypeError, "features must be a tensor, got None"),
        ((V, F.to(torch.complex64)), TypeError, "features must hold real numbers, got"),
        ((V, F[:, :0]), ValueError, "features must have shape (N or 1, channels, 4, 5)"),
        ((V, F[..., :4]), ValueError, "features must have shape (N or 1, channels, 4, 5)"),
        ((V, F.flatten(2)), ValueError, "features must have shape (N or 1, channels, 4, 5)"),
        ((V, torch.zeros(3, 2, 4, 5)), ValueError, "with N = 2 for a values of shape"),
        ((V, torch.zeros(2, 33, 4, 5)), ValueError, "features must have at most 32 dimensions"),
    ],
)
def test_bad_tensors(arguments, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        permutohedral_filter(*arguments)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"normalization": "sym"}, ValueError, "must be one of 'symmetric', 'before', 'after'"),
        ({"normalization": 3}, ValueError, "normalization must be one of"),
        ({"self_term": 1}, TypeError, "permutohedral_filter: self_term must be a bool, got int"),
        ({"reverse": "yes"}, TypeError, "permutohedral_filter: reverse must be a bool, got str"),
    ],
)
def test_bad_options(options, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        permutohedral_filter(V, F, **options)


def test_other_devices():
    for values, features in ((V.to("meta"), F), (V, F.to("meta"))):
        with pytest.raises(NotImplementedError, match=r"must be on the CPU.*, got meta"):
            permutohedral_filter(values, features)
