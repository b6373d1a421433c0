# SPDX-License-Identifier: Apache-2.0
"""The lattice filter: against an independent implementation, and its algebra."""

from __future__ import annotations

import numpy as np
import pytest
from _bits import assert_same_bits
from _oracle import PermutohedralLattice
from hypothesis import given, settings
from hypothesis import strategies as st

from pydense import _core

TOLERANCE = 1e-5  # of the largest value of the result


def random(shape, seed, scale=1.0):
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return values.astype(np.float32)


def clustered(d, n, seed, spread):
    """Points in a few clusters: vertices are shared, and lie far apart from cluster to cluster."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-spread, spread, (d, 1 + n // 8))
    near = centres[:, rng.integers(0, centres.shape[1], n)]
    return (near + rng.normal(scale=0.3, size=(d, n))).astype(np.float32)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


@pytest.mark.parametrize("d", range(1, 21))
@pytest.mark.parametrize("scale", [0.4, 2.0])
def test_dimensions(d, scale):
    n = 120
    features, values = random((d, n), d, scale), random((3, n), 100 + d)
    oracle, lattice = PermutohedralLattice(features), _core.Lattice(features)
    assert (lattice.num_points, lattice.num_dims) == (n, d)
    assert lattice.num_vertices == len(oracle.vertices)
    assert_close(lattice.filter(values), oracle.filter(values))
    assert_close(lattice.filter(values, reverse=True), oracle.transposed(values))


@pytest.mark.parametrize(
    "channels", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 21, 24, 25, 31, 32, 33, 48, 49, 150, 200]
)
def test_channels(channels):
    features, values = random((5, 97), 1, 1.5), random((channels, 97), channels)
    oracle = PermutohedralLattice(features)
    lattice = _core.Lattice(features)
    assert_close(lattice.filter(values), oracle.filter(values))
    assert_close(lattice.filter(values, reverse=True), oracle.transposed(values))


@pytest.mark.parametrize("n", [*range(1, 20), 31, 33, 63, 64, 65, 8191, 8192, 8193, 16385])
def test_points(n):
    features, values = random((2, n), n, 3), random((4, n), 7 * n)
    oracle = PermutohedralLattice(features)
    lattice = _core.Lattice(features)
    assert lattice.num_vertices == len(oracle.vertices)
    assert_close(lattice.filter(values), oracle.filter(values))


@pytest.mark.parametrize(
    ("d", "spread"),
    # Bits in a key: d * log2(range); one word holds 64.
    [(1, 1e5), (3, 1e4), (4, 3e4), (5, 2e3), (5, 2e4), (8, 1e4), (16, 1e3), (16, 2e4), (20, 1e4)],
)
def test_wide_ranges(d, spread):
    # Float32 cannot place points this far out to better than spread * 1e-7, so both embed in it.
    features, values = clustered(d, 200, d, spread), random((3, 200), d)
    oracle = PermutohedralLattice(features, geometry=np.float32)
    lattice = _core.Lattice(features)
    assert lattice.num_vertices == len(oracle.vertices)
    assert_close(lattice.filter(values), oracle.filter(values))


@pytest.mark.parametrize("offset", [-3e4, 1e4])
def test_far_from_the_origin(offset):
    grid = np.indices((9, 11), dtype=np.float32).reshape(2, -1)
    features, values = grid / np.float32(3) + np.float32(offset), random((2, 99), 3)
    oracle = PermutohedralLattice(features, geometry=np.float32)
    assert_close(_core.Lattice(features).filter(values), oracle.filter(values))


def test_grid_with_ties():
    """Integer coordinates put many points exactly on the faces between simplices."""
    grid = np.indices((12, 13), dtype=np.float32).reshape(2, -1)
    values = random((5, 156), 4)
    for sigma in (0.5, 1, 3, 80):
        features = grid / np.float32(sigma)
        oracle = PermutohedralLattice(features, geometry=np.float32)
        lattice = _core.Lattice(features)
        assert lattice.num_vertices == len(oracle.vertices)
        assert_close(lattice.filter(values), oracle.filter(values))


@settings(max_examples=150)
@given(
    d=st.integers(1, 20),
    n=st.integers(1, 200),
    channels=st.integers(1, 40),
    scale=st.floats(1e-3, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_adjoint_and_linear(d, n, channels, scale, seed):
    rng = np.random.default_rng(seed)
    lattice = _core.Lattice(rng.normal(scale=scale, size=(d, n)).astype(np.float32))
    x, y = (rng.normal(size=(channels, n)).astype(np.float32) for _ in range(2))
    kx, ky = lattice.filter(x), lattice.filter(y)
    size = np.abs(y.astype(np.float64) * kx).sum() + 1e-30
    left, right = np.vdot(y, kx.astype(np.float64)), np.vdot(lattice.filter(y, reverse=True), x)
    assert abs(left - right) <= 1e-4 * size
    assert_close(lattice.filter(2 * x - 3 * y), 2 * kx.astype(np.float64) - 3 * ky, 1e-4)
    assert (lattice.filter(np.ones((1, n), np.float32)) > 0).all()
    assert not lattice.filter(np.zeros((1, n), np.float32)).any()


def test_identical_points_share_their_simplex():
    """Memory grows with the vertices found, not with N (d + 1)."""
    n, d = 20_000, 5
    one = _core.Lattice(np.full((d, n), 0.3, np.float32))
    all_different = _core.Lattice(random((d, n), 0, 100))
    assert one.num_vertices == d + 1
    assert all_different.num_vertices > n
    per_point = 6 * (d + 1) * n  # a weight and a short index per point and vertex of its simplex
    assert per_point <= one.nbytes <= per_point + 100_000
    assert all_different.nbytes > one.nbytes + 4 * all_different.num_vertices
    # Every point gets the same average of all.
    values = random((2, n), 1)
    mass = one.filter(np.ones((1, n), np.float32))
    expected = np.repeat(values.mean(axis=1, dtype=np.float64, keepdims=True), n, axis=1)
    assert np.abs(one.filter(values) / mass - expected).max() < 1e-5


def strided_variants(array):
    """The same numbers in every memory layout NumPy can make."""
    rows, columns = array.shape
    yield "fortran", np.asfortranarray(array)
    every_other = np.zeros((2 * rows, 3 * columns), np.float32)
    every_other[::2, ::3] = array
    yield "sliced", every_other[::2, ::3]
    yield "reversed", np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    frozen = array.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    raw = np.zeros(4 * array.size + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(array.shape)
    unaligned[...] = array
    yield "unaligned", unaligned
    record = np.zeros(array.shape, np.dtype([("pad", np.uint8), ("value", np.float32)]))
    record["value"] = array
    yield "odd strides", record["value"]


def test_strides():
    features, values = random((5, 50), 5, 2), random((7, 50), 6)
    expected = _core.Lattice(features).filter(values)
    for (name, f), (_, v) in zip(strided_variants(features), strided_variants(values), strict=True):
        before = v.copy()
        assert np.array_equal(_core.Lattice(f).filter(v), expected), name
        assert np.array_equal(before, v), name
    one = np.broadcast_to(np.float32(1), (3, 50))
    assert np.array_equal(
        _core.Lattice(features).filter(one), _core.Lattice(features).filter(one.copy())
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9, -1e9, 3e38])
@pytest.mark.parametrize("d", [1, 2, 5, 16])
def test_features_out_of_range_are_an_error(bad, d):
    for position in (0, 41, 99):
        features = random((d, 100), 1)
        features[d - 1, position] = bad
        with pytest.raises(ValueError, match="features must be finite and within"):
            _core.Lattice(features)


@pytest.mark.parametrize("d", [1, 2, 5, 16, 20])
def test_the_range_is_large_or_refused(d):
    """Going outwards, results stay right until an error stops them: no aliasing of keys."""
    values, refused = random((2, 40), 1), 0
    for exponent in range(0, 9):
        features = clustered(d, 40, 3, 10.0**exponent)
        try:
            lattice = _core.Lattice(features)
        except ValueError as error:
            assert "features must be finite and within" in str(error)
            refused += 1
            continue
        assert refused == 0, "a larger range was accepted after a smaller one was refused"
        assert exponent <= 6
        oracle = PermutohedralLattice(features, geometry=np.float32)
        assert lattice.num_vertices == len(oracle.vertices)
        assert_close(lattice.filter(values), oracle.filter(values))
    assert refused


@pytest.mark.parametrize(
    ("features", "error"),
    [
        (np.zeros(3, np.float32), ValueError),
        (np.zeros((2, 3, 4), np.float32), ValueError),
        (np.zeros((0, 3), np.float32), ValueError),
        (np.zeros((2, 0), np.float32), ValueError),
        (np.zeros((33, 4), np.float32), ValueError),
        (np.zeros((2, 3), np.float64), TypeError),
        (None, TypeError),
        ([[1.0, 2.0]], TypeError),
    ],
)
def test_bad_features(features, error):
    with pytest.raises(error):
        _core.Lattice(features)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (np.zeros((2, 9), np.float32), ValueError),
        (np.zeros(10, np.float32), ValueError),
        (np.zeros((0, 10), np.float32), ValueError),
        (np.zeros((2, 10), np.float64), TypeError),
        (None, TypeError),
    ],
)
def test_bad_values(values, error):
    with pytest.raises(error):
        _core.Lattice(random((2, 10), 1)).filter(values)


# N on both sides of a band of points, d for one-word and multi-word keys.
BITWISE_CASES = [(2, 20_011, 21), (5, 9_001, 3), (5, 30_000, 5), (16, 8_500, 9), (3, 40_000, 1)]


@pytest.mark.parametrize(("d", "n", "channels"), BITWISE_CASES)
def test_bitwise_the_same_everywhere(restore_core, d, n, channels):
    """For every thread count and every instruction set that has fused multiply-adds."""
    features, values = random((d, n), d, 4 if d < 10 else 0.5), random((channels, n), n)
    results = {}
    for capability in _core.cpu_capabilities():
        _core.set_cpu_capability(capability)
        assert _core.cpu_capability() == capability
        for threads in (1, 2, 3, 8):
            _core.set_num_threads(threads)
            assert _core.get_num_threads() == threads
            lattice = _core.Lattice(features)
            results[capability, threads] = (
                lattice.num_vertices,
                lattice.filter(values).tobytes(),
                lattice.filter(values, reverse=True).tobytes(),
            )
    assert_same_bits(results)


def test_lattice_serves_every_capability(restore_core):
    """One built with wide vectors is used by narrow ones: the data structure is the same."""
    features, values = random((5, 5000), 2, 3), random((21, 5000), 3)
    lattice = _core.Lattice(features)
    expected = lattice.filter(values)
    for capability in _core.cpu_capabilities():
        _core.set_cpu_capability(capability)
        if capability == "baseline":
            assert_close(lattice.filter(values), expected)
        else:
            assert np.array_equal(lattice.filter(values), expected)
