# SPDX-License-Identifier: Apache-2.0
"""Odd inputs: a distribution or a clear error, never a crash (tools/fuzz_densecrf.py runs more)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pydense.densecrf as dcrf
from pydense.densecrf.utils import (
    create_pairwise_bilateral,
    create_pairwise_gaussian,
    unary_from_labels,
    unary_from_softmax,
)

TOOL = Path(__file__).resolve().parent.parent / "tools" / "fuzz_densecrf.py"
REFUSALS = (ValueError, TypeError)


def assert_distribution(q, shape):
    assert q.shape == shape and q.dtype == np.float32
    assert np.isfinite(q).all()
    assert q.min() >= 0
    assert np.abs(q.sum(axis=0, dtype=np.float64) - 1).max() < 1e-4


sizes = st.one_of(
    st.sampled_from([(1, 1), (1, 50), (50, 1), (2, 1), (3, 3)]),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
)
labels = st.sampled_from([1, 2, 3, 5, 8, 17, 21])
norms = st.sampled_from(list(dcrf.NormalizationType))
# float32 positions are exact up to 2^24; below this the lattice's coordinates may overflow.
sigmas = st.one_of(
    st.sampled_from([1e-2, 0.5, 1, 3, 80, 1e6, 1e30, 1e200, 1.7e308]), st.floats(1e-2, 1e9)
)
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def compats(count):
    weights = st.floats(-1e20, 1e20)
    return st.one_of(
        weights,
        hnp.arrays(np.float64, (count,), elements=weights),
        hnp.arrays(np.float64, (count, count), elements=weights),
    )


@st.composite
def valid_models(draw):
    """(w, h, L, unary, [calls]) with nothing wrong, however extreme."""
    (w, h), count = draw(sizes), draw(labels)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    magnitude = draw(st.sampled_from([0.0, 1e-40, 1.0, 50.0, 1e10, 3e38]))
    unary = (magnitude * rng.uniform(-1, 1, (count, w * h))).astype(np.float32)
    if draw(st.booleans()):
        unary[1:, rng.random(w * h) < 0.5] = np.inf
    calls = []
    for _ in range(draw(st.integers(0, 2))):
        compat, norm = draw(compats(count)), draw(norms)
        if draw(st.booleans()):
            calls.append(("addPairwiseGaussian", draw(sigmas), compat, 1, norm))
            continue
        channels = draw(st.sampled_from([1, 3, 4]))
        levels = draw(st.sampled_from([1, 2, 256]))  # 1: one colour everywhere
        image = (rng.integers(0, levels, (h, w, channels)) * (255 // levels)).astype(np.uint8)
        colour = draw(sigmas)
        calls.append(("addPairwiseBilateral", draw(sigmas), colour, image, compat, 1, norm))
    return w, h, count, unary, calls


@settings(max_examples=500)
@given(valid_models(), st.integers(0, 5))
def test_valid_models_always_work(parts, iterations):
    w, h, count, unary, calls = parts
    crf = dcrf.DenseCRF2D(w, h, count)
    crf.setUnaryEnergy(unary)
    for name, *arguments in calls:
        getattr(crf, name)(*arguments)
    q = crf.inference(iterations)
    assert_distribution(q, (count, w * h))
    assert not q[np.isinf(unary)].any()
    assert np.isfinite(crf.klDivergence(q))
    stepped, tmp1, tmp2 = crf.startInference()
    for _ in range(iterations):
        crf.stepInference(stepped, tmp1, tmp2)
    assert np.array_equal(stepped, q)


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.lists(st.floats(), max_size=4),
    st.lists(st.lists(st.integers(-5, 5), max_size=3), max_size=3),
    st.just(object()),
    hnp.arrays(
        st.one_of(hnp.scalar_dtypes(), st.just(np.dtype(object))),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
)
any_floats = hnp.arrays(
    st.sampled_from([np.float32, np.float64]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    elements=st.floats(width=32),
)
whatever = st.one_of(anything, any_floats, st.floats(), st.sampled_from([0, -1, 1e-30, 3, 80]))


@settings(max_examples=500)
@given(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)),
    st.lists(
        st.tuples(
            st.sampled_from(["unary", "gaussian", "bilateral", "features"]), whatever, whatever
        ),
        max_size=3,
    ),
    st.one_of(st.integers(-2, 3), anything),
    st.data(),
)
def test_anything_is_a_distribution_or_refused(size, calls, iterations, data):
    w, h, count = size
    if isinstance(iterations, int) and iterations > 50:
        iterations = 50  # a valid request, only a long one
    try:
        crf = dcrf.DenseCRF2D(w, h, count)
        assert min(size) > 0
        right_shape = hnp.arrays(np.float32, (count, w * h), elements=st.floats(width=32))
        for kind, first, second in calls:
            try:
                if kind == "unary":
                    crf.setUnaryEnergy(data.draw(st.one_of(right_shape, st.just(first))))
                elif kind == "gaussian":
                    crf.addPairwiseGaussian(first, second)
                elif kind == "features":
                    shape = (data.draw(st.integers(1, 3)), w * h)
                    features = hnp.arrays(np.float32, shape, elements=st.floats(width=32))
                    crf.addPairwiseEnergy(data.draw(st.one_of(features, st.just(first))), second)
                else:
                    image = np.zeros((h, w, 3), np.uint8)
                    crf.addPairwiseBilateral(first, second, image, 3)
                    crf.addPairwiseBilateral(3, 3, first, second)
            except REFUSALS as error:
                assert str(error)
        q = crf.inference(iterations)
    except REFUSALS as error:
        assert str(error)
        return
    assert_distribution(q, (count, w * h))
    assert np.isfinite(crf.klDivergence(q))


@settings(max_examples=150)
@given(whatever, whatever, whatever, whatever)
@example(np.zeros((0, 0), int), 2, 0.5, True)
def test_utils_return_or_refuse(first, second, third, fourth):
    def attempt(function, *arguments):
        try:
            result = function(*arguments)
        except REFUSALS as error:
            assert str(error)
            return
        assert result.dtype == np.float32 and result.ndim == 2
        assert not np.isnan(result).any()

    second_small = second if not isinstance(second, int) else second % 1000
    attempt(unary_from_labels, first, second_small, third)
    attempt(unary_from_labels, np.arange(4).reshape(2, 2), second_small, third, fourth)
    attempt(unary_from_softmax, first, second, third)
    attempt(create_pairwise_gaussian, first, (3, 4))
    attempt(create_pairwise_bilateral, first, second, third, fourth)
    attempt(create_pairwise_bilateral, 3, second, np.zeros((3, 4, 3)), 2)
    attempt(create_pairwise_bilateral, 3, 3, first, fourth)


@settings(max_examples=100)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.integers(1, 4), st.integers(0, 9)),
        elements=st.floats(0, 1, width=32),
    ),
    st.one_of(st.none(), st.floats(2**-10, 1)),
    st.one_of(st.none(), st.floats(0, 1)),
)
def test_softmax_energies_fit_the_model(sm, scale, clip):
    energy = unary_from_softmax(sm, scale, clip)
    assert energy.shape == (len(sm), sm.shape[1])
    assert not np.isnan(energy).any() and (energy >= 0).all()
    possible = np.isfinite(energy).any(axis=0).all()
    if energy.size and possible:
        crf = dcrf.DenseCRF(sm.shape[1], len(sm))
        crf.setUnaryEnergy(energy)
        assert_distribution(crf.inference(1), energy.shape)


@pytest.mark.parametrize("shape", [(30_000, 1), (1, 30_000), (30_000, 3), (2, 30_000)])
@pytest.mark.parametrize("count", [2, 21])
def test_long_strips(shape, count):
    """Colours and labels of a strip: each half takes the label of its majority."""
    h, w = shape
    rng = np.random.default_rng(0)
    truth = (np.arange(h * w).reshape(h, w) * 2 // (h * w)).astype(np.uint8)
    noisy = np.where(rng.random(shape) < 0.2, 1 - truth, truth)
    image = np.repeat(50 + 150 * truth[..., None], 3, axis=2).astype(np.uint8)
    crf = dcrf.DenseCRF2D(w, h, count)
    crf.setUnaryEnergy(unary_from_labels(noisy, count, 0.7, zero_unsure=False))
    crf.addPairwiseGaussian(3, 3)
    crf.addPairwiseBilateral(80, 13, image, 10)
    q = crf.inference(5)
    assert_distribution(q, (count, h * w))
    assert (np.argmax(q, axis=0) != truth.ravel()).sum() == 0


def test_one_colour_and_huge_sigmas():
    """With infinite range and one colour, every pixel hears the average of all."""
    unary = np.zeros((2, 400), np.float32)
    unary[0, :220] = unary[1, 220:] = -1
    for sigma in (1e6, 1e20, 1e300):
        crf = dcrf.DenseCRF2D(20, 20, 2)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseBilateral(sigma, sigma, np.full((20, 20, 3), 77, np.uint8), 50)
        q = crf.inference(5)
        assert_distribution(q, (2, 400))
        assert (q[0] > 0.99).all()


def test_tiny_sigmas_leave_pixels_alone():
    """Far below a pixel no two pixels share a vertex: each hears itself only."""
    rng = np.random.default_rng(0)
    unary = rng.normal(size=(3, 600)).astype(np.float32)
    crf = dcrf.DenseCRF2D(30, 20, 3)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(0.02, 2)
    expected = np.exp(-unary.astype(np.float64))
    expected /= expected.sum(axis=0)
    for _ in range(3):
        q = np.exp(-unary + 2 * expected)
        expected = q / q.sum(axis=0)
    assert np.abs(crf.inference(3) - expected).max() < 1e-5


def test_fuzz_tool_runs(run_python):
    result = run_python(str(TOOL), "--examples", "150", "--seed", "7", timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "150 cases" in result.stdout and " 0 found" in result.stdout
    ok = int(result.stdout.rpartition(":")[2].split()[0])
    assert ok > 75, "most cases should reach inference"
