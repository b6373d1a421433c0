# SPDX-License-Identifier: Apache-2.0
"""What the drop-in refuses, and that the texts say what to do."""

from __future__ import annotations

import decimal
import re
import warnings

import numpy as np
import pytest

import pydense.densecrf as dcrf

W, H, L = 7, 4, 3
N = W * H
NAN, INF = np.nan, np.inf


@pytest.fixture
def crf():
    return dcrf.DenseCRF2D(W, H, L)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def no_warnings():
    """Refusing is an exception, not a RuntimeWarning from NumPy on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refuses(kind, text):
    return pytest.raises(kind, match=re.escape(text))


@pytest.mark.parametrize("number", [0, -1, -(10**30)])
def test_sizes_below_one(number):
    for name, build in {
        "DenseCRF: nvar": lambda: dcrf.DenseCRF(number, 2),
        "DenseCRF: nlabels": lambda: dcrf.DenseCRF(2, number),
        "DenseCRF2D: w": lambda: dcrf.DenseCRF2D(number, 2, 2),
        "DenseCRF2D: h": lambda: dcrf.DenseCRF2D(2, number, 2),
        "DenseCRF2D: nlabels": lambda: dcrf.DenseCRF2D(2, 2, number),
    }.items():
        with refuses(ValueError, f"{name} must be at least 1, got {number}"):
            build()


@pytest.mark.parametrize("number", [2.0, "2", None, [2], np.array([2, 2]), 2j])
def test_sizes_that_are_no_integers(number):
    for build in (
        lambda: dcrf.DenseCRF(number, 2),
        lambda: dcrf.DenseCRF(2, number),
        lambda: dcrf.DenseCRF2D(number, 2, 2),
        lambda: dcrf.DenseCRF2D(2, number, 2),
        lambda: dcrf.DenseCRF2D(2, 2, number),
        lambda: dcrf.DenseCRF(2, 2).inference(number),
    ):
        with refuses(TypeError, "must be an integer, got"):
            build()


def test_numbers_that_the_core_cannot_count(crf):
    with pytest.raises(ValueError, match=r"DenseCRF: nlabels must be at most 65536, got 70000"):
        dcrf.DenseCRF(1, 70_000)
    with pytest.raises(ValueError, match=r"inference: niter must be at most 2147483647"):
        crf.inference(2**40)
    with pytest.raises(MemoryError):
        dcrf.DenseCRF(2**46, 2).inference(1)


def test_sizes_beyond_the_address_space():
    for build in (
        lambda: dcrf.DenseCRF(2**62, 2),
        lambda: dcrf.DenseCRF(10**30, 1),
        lambda: dcrf.DenseCRF2D(2**31, 2**31, 21),
    ):
        with refuses(ValueError, "nvar * nlabels must be addressable, got"):
            build()
    with pytest.raises(ValueError):
        dcrf.DenseCRF(1, 10**9)


def test_iterations(crf):
    with refuses(ValueError, "inference: niter must be at least 0, got -1"):
        crf.inference(-1)
    assert crf.inference(np.int64(1)).shape == (L, N)
    with pytest.raises((ValueError, TypeError)):
        crf.inference(2**40)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((N, L), "transpose it"),
        ((L, H, W), "u.reshape(nlabels, -1)"),
        ((H, W, L), "np.moveaxis(u, -1, 0).reshape(nlabels, -1)"),
        ((L, N + 1), "DenseCRF2D takes width first"),
        ((L - 1, N), "DenseCRF2D takes width first"),
        ((L * N,), "DenseCRF2D takes width first"),
        ((0, 0), "DenseCRF2D takes width first"),
        ((), "DenseCRF2D takes width first"),
    ],
)
def test_unary_shapes(crf, shape, hint):
    text = f"setUnaryEnergy: u must have shape (nlabels, nvar) = ({L}, {N}), got {shape}"
    with refuses(ValueError, text) as error:
        crf.setUnaryEnergy(np.zeros(shape, np.float32))
    assert hint in str(error.value)
    if len(shape) == 2:
        with refuses(ValueError, f"setUnary: u must have shape (nlabels, nvar) = ({L}, {N})"):
            crf.setUnary(dcrf.ConstUnary(np.zeros(shape)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [NAN, -INF, "all inf"])
def test_unary_values(crf, bad, dtype):
    unary = np.zeros((L, N), dtype)
    unary[slice(None) if bad == "all inf" else 1, 5] = INF if bad == "all inf" else bad
    before = crf.inference(1)
    with refuses(ValueError, "setUnaryEnergy: u must hold no NaN, no -inf and a finite") as error:
        crf.setUnaryEnergy(unary)
    assert str(error.value).endswith("at point 5")
    with refuses(ValueError, "setUnary: u must hold no NaN"):
        crf.setUnary(dcrf.ConstUnary(unary))
    assert np.array_equal(crf.inference(1), before)


@pytest.mark.parametrize(
    "bad", [None, "energy", np.zeros((L, N), complex), np.full((L, N), "a"), [[None] * N] * L, {}]
)
def test_unary_types(crf, bad):
    with refuses(TypeError, "setUnaryEnergy: u must hold real numbers, got"):
        crf.setUnaryEnergy(bad)
    with refuses(TypeError, "ConstUnary: u must hold real numbers, got"):
        dcrf.ConstUnary(bad)


def test_unary_objects(crf):
    with refuses(TypeError, "setUnary: u must be a Unary, got ndarray"):
        crf.setUnary(np.zeros((L, N)))
    with refuses(TypeError, "must be made as ConstUnary or LogisticUnary"):
        dcrf.Unary()
    with refuses(ValueError, "ConstUnary: u must be two-dimensional, got shape (3,)"):
        dcrf.ConstUnary(np.zeros(3))
    with refuses(ValueError, "LogisticUnary: L (labels, D) and f (D, points) must agree in D"):
        dcrf.LogisticUnary(np.zeros((L, 4)), np.zeros((5, N)))
    with refuses(ValueError, "LogisticUnary: f must be finite"):
        dcrf.LogisticUnary(np.zeros((L, 1)), np.full((1, N), NAN))
    with refuses(ValueError, "setUnaryEnergy: u (labels, D) and f (D, points) must agree in D"):
        crf.setUnaryEnergy(np.zeros((L, 4)), np.zeros((5, N)))
    with refuses(ValueError, "setUnaryEnergy: u @ f must have shape (nlabels, nvar)"):
        crf.setUnaryEnergy(np.zeros((L, 4)), np.zeros((4, N + 1)))
    with refuses(ValueError, "setUnaryEnergy: u @ f must hold no NaN, no -inf"):
        crf.setUnaryEnergy(np.full((L, 1), -1e30), np.full((1, N), 1e30))  # overflows in float32


BAD_SIGMAS = [0, -1, NAN, INF, -INF, 1e-60, (3, 0), (3, NAN)]


@pytest.mark.parametrize("sigma", BAD_SIGMAS)
def test_sigmas(crf, image, sigma):
    before = crf.inference(1)
    with refuses(ValueError, "addPairwiseGaussian: sxy must be positive and finite, got"):
        crf.addPairwiseGaussian(sigma, 3)
    with refuses(ValueError, "addPairwiseBilateral: sxy must be positive and finite, got"):
        crf.addPairwiseBilateral(sigma, 13, image, 3)
    colour = (*sigma, 1) if isinstance(sigma, tuple) else sigma
    with refuses(ValueError, "addPairwiseBilateral: srgb must be positive and finite, got"):
        crf.addPairwiseBilateral(80, colour, image, 3)
    assert np.array_equal(crf.inference(1), before)


@pytest.mark.parametrize("sigma", [(3,), (3, 3, 3), [[3, 3]], np.ones((2, 2))])
def test_sigma_counts(crf, image, sigma):
    with refuses(ValueError, "addPairwiseGaussian: sxy must be a number or 2 numbers, got"):
        crf.addPairwiseGaussian(sigma, 3)
    with refuses(ValueError, "addPairwiseBilateral: srgb must be a number or 3 numbers, got"):
        crf.addPairwiseBilateral(3, [*np.ravel(sigma), 1, 1, 1], image, 3)


@pytest.mark.parametrize("bad", [None, "3", 3j, decimal.Decimal(3), object()])
def test_sigma_and_compat_types(crf, image, bad):
    with refuses(TypeError, "sxy must hold real numbers"):
        crf.addPairwiseGaussian(bad, 3)
    with refuses(TypeError, "srgb must hold real numbers"):
        crf.addPairwiseBilateral(3, bad, image, 3)
    with refuses(TypeError, "compat must hold real numbers"):
        crf.addPairwiseGaussian(3, bad)


@pytest.mark.parametrize("sigma", [1e-44, 1e-20, 1e-8])
def test_tiny_sigmas_are_refused_not_aliased(crf, image, sigma):
    text = "features must be finite and within"
    with refuses(ValueError, f"addPairwiseGaussian: {text}"):
        crf.addPairwiseGaussian(sigma, 3)
    with refuses(ValueError, f"addPairwiseBilateral: {text}"):
        crf.addPairwiseBilateral(80, sigma, image, 3)
    assert np.array_equal(crf.inference(2), np.full((L, N), 1 / 3, np.float32))


@pytest.mark.parametrize(
    "compat",
    [NAN, INF, -INF, 1e21, [1, NAN, 1], [0, 0, -INF], np.full((L, L), NAN), [[INF] * L] * L],
)
def test_compat_values(crf, compat):
    with refuses(ValueError, "addPairwiseGaussian: compat must be finite"):
        crf.addPairwiseGaussian(3, compat)


@pytest.mark.parametrize("shape", [(0,), (1,), (L - 1,), (L + 1,), (L, 1), (1, L), (L, L, L)])
def test_compat_shapes(crf, image, shape):
    text = f"compat must be a number or have shape ({L},) or ({L}, {L}) for {L} labels, got"
    with refuses(ValueError, f"addPairwiseGaussian: {text} shape {shape}"):
        crf.addPairwiseGaussian(3, np.ones(shape))
    with refuses(ValueError, f"addPairwiseBilateral: {text} shape {shape}"):
        crf.addPairwiseBilateral(3, 3, image, np.ones(shape))
    with refuses(ValueError, f"addPairwiseEnergy: {text} shape {shape}"):
        crf.addPairwiseEnergy(np.zeros((2, N)), np.ones(shape))


@pytest.mark.parametrize("shape", [(W, H, 3), (H, W + 1, 3), (H * W, 3), (H, W, 0), (1, H, W, 3)])
def test_image_shapes(crf, shape):
    text = (
        "addPairwiseBilateral: rgbim must have shape (h, w) or (h, w, channels) with h = 4, w = 7"
    )
    with refuses(ValueError, text) as error:
        crf.addPairwiseBilateral(80, 13, np.zeros(shape, np.uint8), 3)
    assert f"got {shape}" in str(error.value)
    assert ("width first" in str(error.value)) == (shape == (W, H, 3))


def test_image_values(crf, image):
    for bad in (NAN, INF, -INF):
        wrong = image.astype(np.float64)
        wrong[2, 3, 1] = bad
        with refuses(ValueError, "addPairwiseBilateral: rgbim must be finite"):
            crf.addPairwiseBilateral(80, 13, wrong, 3)
    for bad in (None, "picture.png", image.astype(complex), image.astype(object)):
        with refuses(TypeError, "addPairwiseBilateral: rgbim must hold real numbers"):
            crf.addPairwiseBilateral(80, 13, bad, 3)


def test_features(crf):
    text = "addPairwiseEnergy: features must have shape (d, nvar) = (d, 28), got"
    for shape in [(N, 5), (2, N + 1), (N,), (0, N), (2, H, W), ()]:
        with refuses(ValueError, f"{text} {shape}") as error:
            crf.addPairwiseEnergy(np.zeros(shape), 3)
        assert ("transpose it" in str(error.value)) == (shape == (N, 5))
    for bad in (NAN, INF, 1e300):
        features = np.zeros((3, N))
        features[1, 4] = bad
        with refuses(ValueError, "addPairwiseEnergy: features must be finite"):
            crf.addPairwiseEnergy(features, 3)
    with refuses(TypeError, "addPairwiseEnergy: features must hold real numbers, got None"):
        crf.addPairwiseEnergy(None, 3)


@pytest.mark.parametrize("number", [-1, 4, 99])
def test_enum_values(crf, number):
    with pytest.raises(ValueError, match="normalization must be"):
        crf.addPairwiseGaussian(3, 3, normalization=number)
    with pytest.raises(ValueError, match="kernel must be"):
        crf.addPairwiseGaussian(3, 3, kernel=number)
    with refuses(TypeError, "normalization must be an integer, got str"):
        crf.addPairwiseGaussian(3, 3, normalization="symmetric")
    with refuses(TypeError, "kernel must be an integer, got None"):
        crf.addPairwiseGaussian(3, 3, kernel=None)


def test_marginals(crf):
    q, tmp1, tmp2 = crf.startInference()
    frozen = q.copy()
    frozen.flags.writeable = False
    for bad, text in [
        (frozen, "stepInference: Q must be writeable"),
        (np.zeros((N, L), np.float32), "stepInference: Q must have shape"),
        (np.zeros((0, 0), np.float32), "stepInference: Q must have shape"),
        (np.full((L, N), NAN, np.float32), "stepInference: Q must hold probabilities"),
        (np.full((L, N), INF, np.float32), "stepInference: Q must hold probabilities"),
        (np.full((L, N), -1e30, np.float32), "stepInference: Q must hold probabilities"),
    ]:
        with refuses(ValueError, text):
            crf.stepInference(bad, tmp1, tmp2)
    for bad in (q.astype(np.float64), q.astype(">f4"), q.tolist(), None):
        with refuses(TypeError, "stepInference: Q must be a float32 array, got"):
            crf.stepInference(bad, tmp1, tmp2)
    one_nan = q.copy()
    one_nan[1, 7] = NAN
    with refuses(ValueError, "klDivergence: Q must hold probabilities"):
        crf.klDivergence(one_nan)
    with refuses(ValueError, "klDivergence: Q must have shape"):
        crf.klDivergence(q.T)
    with refuses(TypeError, "klDivergence: Q must hold real numbers, got None"):
        crf.klDivergence(None)


def test_a_refused_call_changes_nothing(crf, image):
    crf.setUnaryEnergy(np.random.default_rng(1).normal(size=(L, N)))
    crf.addPairwiseGaussian(3, 3)
    before = crf.inference(3)
    for call in (
        lambda: crf.addPairwiseGaussian(3, [1, 2]),
        lambda: crf.addPairwiseGaussian(1e-9, 3),
        lambda: crf.addPairwiseBilateral(3, 3, image, 3, normalization=7),
        lambda: crf.addPairwiseBilateral(3, 3, image, 3, kernel=7),
        lambda: crf.setUnaryEnergy(np.full((L, N), NAN)),
        lambda: crf.inference(-1),
    ):
        with pytest.raises(ValueError):
            call()
    assert np.array_equal(crf.inference(3), before)
