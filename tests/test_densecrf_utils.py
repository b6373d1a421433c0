# SPDX-License-Identifier: Apache-2.0
"""pydense.densecrf.utils: definitions written out, and what is refused."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest

import pydense.densecrf as dcrf
from pydense.densecrf import utils
from pydense.densecrf.utils import (
    create_pairwise_bilateral,
    create_pairwise_gaussian,
    unary_from_labels,
    unary_from_softmax,
)


def refuses(kind, text):
    return pytest.raises(kind, match=re.escape(text))


def test_signatures():
    expected = {
        "unary_from_labels": "(labels, n_labels, gt_prob, zero_unsure=True)",
        "unary_from_softmax": "(sm, scale=None, clip=1e-05)",
        "compute_unary": "(labels, M, GT_PROB=0.5)",
        "softmax_to_unary": "(sm, GT_PROB=1)",
        "create_pairwise_gaussian": "(sdims, shape)",
        "create_pairwise_bilateral": "(sdims, schan, img, chdim=-1)",
    }
    assert sorted(expected) == sorted(utils.__all__)
    for name, text in expected.items():
        parameters = inspect.signature(getattr(utils, name)).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert str(inspect.Signature(bare)) == text


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("zero_unsure", [True, False])
def test_unary_from_labels(dtype, zero_unsure):
    n, p = 3, 0.6
    labels = np.array([[0, 1], [2, 3 if zero_unsure else 0]], dtype)
    energy = unary_from_labels(labels, n, p, zero_unsure)
    assert energy.shape == (n, 4) and energy.dtype == np.float32
    for point, label in enumerate(labels.ravel().tolist()):
        for candidate in range(n):
            if zero_unsure and label == 0:
                expected = 1 / n
            else:
                right = candidate == (label - 1 if zero_unsure else label)
                expected = p if right else (1 - p) / (n - 1)
            assert energy[candidate, point] == pytest.approx(-math.log(expected), rel=1e-6)
    assert np.exp(-energy).sum(axis=0) == pytest.approx(np.ones(4), rel=1e-6)


def test_unary_from_labels_edge_cases():
    assert np.array_equal(
        unary_from_labels([[0, 1]], 2, 0.5), unary_from_labels(np.array([[0, 1]]), 2, 0.5)
    )
    one = unary_from_labels(np.array([0, 1]), 1, 0.7)  # pydensecrf divides by zero here
    assert one == pytest.approx(np.array([[0, -math.log(0.7)]]), rel=1e-6)
    mask = np.array([True, False])
    assert np.array_equal(unary_from_labels(mask, 2, 0.7, False), unary_from_labels([2, 1], 2, 0.7))
    assert unary_from_labels(np.zeros((0, 4), int), 3, 0.5).shape == (3, 0)
    order = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert np.array_equal(
        unary_from_labels(order, 6, 0.9), unary_from_labels(order.ravel(order="C"), 6, 0.9)
    )


def test_unary_from_labels_refuses():
    labels = np.array([0, 1, 2])
    for p in (0, 1, -0.1, 1.5, np.nan, np.inf):
        with refuses(ValueError, "unary_from_labels: gt_prob must be in (0, 1), got"):
            unary_from_labels(labels, 3, p)
    with refuses(ValueError, "labels must be in [0, 1] for 1 labels with zero_unsure=True, got"):
        unary_from_labels(labels, 1, 0.5)
    with refuses(ValueError, "labels must be in [0, 1] for 2 labels with zero_unsure=False, got"):
        unary_from_labels(labels, 2, 0.5, zero_unsure=False)
    with refuses(ValueError, "got [-1, 2]"):
        unary_from_labels([-1, 2], 3, 0.5)
    with refuses(ValueError, "n_labels must be at least 1, got 0"):
        unary_from_labels(labels, 0, 0.5)
    with refuses(TypeError, "n_labels must be an integer"):
        unary_from_labels(labels, 3.0, 0.5)
    with refuses(TypeError, "labels must be integers, got dtype float64"):
        unary_from_labels(labels.astype(float), 3, 0.5)
    for bad in (None, "labels", labels.astype(complex)):
        with refuses(TypeError, "labels must hold real numbers"):
            unary_from_labels(bad, 3, 0.5)
    for bad in (None, "0.5", [0.5, 0.5]):
        with refuses(TypeError, "gt_prob must"):
            unary_from_labels(labels, 3, bad)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [None, 0.3, 1])
@pytest.mark.parametrize("clip", [1e-5, 0.1, None])
def test_unary_from_softmax(dtype, scale, clip):
    rng = np.random.default_rng(0)
    sm = rng.dirichlet(np.ones(4), (5, 6)).astype(dtype)
    sm = np.moveaxis(sm, 2, 0)
    kept = sm.copy()
    energy = unary_from_softmax(sm, scale, clip)
    assert energy.shape == (4, 30) and energy.dtype == np.float32
    assert np.array_equal(sm, kept)
    p = sm.reshape(4, 30).astype(np.float64)
    p = p if scale is None else scale * p + (1 - scale) / 4
    p = p if clip is None else np.clip(p, clip, 1)
    assert energy == pytest.approx(-np.log(p), rel=1e-5, abs=1e-6)


def test_unary_from_softmax_edge_cases():
    hot = np.array([[0, 1], [1, 0]])
    assert unary_from_softmax(hot) == pytest.approx(-np.log([[1e-5, 1], [1, 1e-5]]))
    forbidden = unary_from_softmax(hot, clip=None)
    assert np.array_equal(forbidden, [[np.inf, 0], [0, np.inf]])
    crf = dcrf.DenseCRF(2, 2)
    crf.setUnaryEnergy(forbidden)
    assert np.array_equal(crf.inference(1), hot)
    assert np.array_equal(
        unary_from_softmax(np.array([0.5, 0.5])), -np.log([[0.5], [0.5]], dtype="f")
    )
    half = unary_from_softmax(np.array([[0.0], [1.0]], np.float16))
    assert half == pytest.approx(-np.log([[1e-5], [1]]), rel=1e-5)


def test_unary_from_softmax_refuses():
    sm = np.full((2, 3), 0.5)
    for scale in (0, -1, 1.01, np.nan):
        with refuses(ValueError, "scale must be in (0, 1], got"):
            unary_from_softmax(sm, scale)
    for clip in (-1e-5, 1.1, np.nan):
        with refuses(ValueError, "clip must be in [0, 1], got"):
            unary_from_softmax(sm, clip=clip)
    with refuses(ValueError, "sm must have shape (classes, ...), got ()"):
        unary_from_softmax(np.float64(0.5))
    with refuses(ValueError, "sm must have shape (classes, ...), got (0, 3)"):
        unary_from_softmax(sm[:0])
    for bad, clip in [(np.nan, 1e-5), (np.nan, None), (-0.5, None)]:
        wrong = sm.copy()
        wrong[1, 1] = bad
        with refuses(ValueError, "sm must hold probabilities, got NaN or negative numbers"):
            unary_from_softmax(wrong, clip=clip)
    for bad in (None, "sm", sm.astype(complex)):
        with refuses(TypeError, "sm must hold real numbers"):
            unary_from_softmax(bad)


def test_deprecated_names():
    labels, sm = np.array([0, 1, 2]), np.array([[0.25, 0.0], [0.75, 1.0]])
    with pytest.warns(DeprecationWarning, match="use unary_from_labels"):
        assert np.array_equal(utils.compute_unary(labels, 2), unary_from_labels(labels, 2, 0.5))
    with pytest.warns(DeprecationWarning, match="use unary_from_softmax"):
        assert np.array_equal(utils.softmax_to_unary(sm), unary_from_softmax(sm, clip=None))
    with pytest.warns(DeprecationWarning, match="use unary_from_softmax"):
        expected = unary_from_softmax(sm, 0.5, clip=None)
        assert np.array_equal(utils.softmax_to_unary(sm, 0.5), expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1), (2, 1, 3, 2)])
def test_create_pairwise_gaussian(shape):
    sigmas = [1.5 + axis for axis in range(len(shape))]
    features = create_pairwise_gaussian(sigmas, shape)
    assert features.dtype == np.float32 and features.flags.c_contiguous
    assert features.shape == (len(shape), math.prod(shape))
    for point, index in enumerate(np.ndindex(*shape)):
        expected = [np.float32(i) / np.float32(s) for i, s in zip(index, sigmas, strict=True)]
        assert features[:, point].tolist() == expected
    same = create_pairwise_gaussian(3, shape)
    assert np.array_equal(same, create_pairwise_gaussian((3,) * len(shape), np.array(shape)))


@pytest.mark.parametrize(
    ("shape", "chdim"),
    [
        ((5, 4), -1),
        ((5, 4, 3), 2),
        ((3, 5, 4), 0),
        ((5, 3, 4), 1),
        ((2, 3, 4), -1),
        ((3, 4, 2), -3),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_create_pairwise_bilateral(shape, chdim, dtype):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    channels = image[None] if chdim == -1 else np.rollaxis(image, chdim)
    sdims = [2.0 + axis for axis in range(channels.ndim - 1)]
    schan = [5.0 + channel for channel in range(len(channels))]
    kept = image.copy()
    features = create_pairwise_bilateral(sdims, schan, image, chdim)
    assert np.array_equal(image, kept)
    assert features.dtype == np.float32 and features.flags.c_contiguous
    d = len(sdims)
    assert np.array_equal(features[:d], create_pairwise_gaussian(sdims, channels.shape[1:]))
    for row, channel, sigma in zip(features[d:], channels, schan, strict=True):
        assert np.array_equal(row, channel.astype(np.float32).ravel() / np.float32(sigma))
    everywhere = create_pairwise_bilateral(2, 5, np.asfortranarray(image)[::-1], chdim)
    expected = create_pairwise_bilateral((2,) * d, (5,) * len(schan), image[::-1].copy(), chdim)
    assert np.array_equal(everywhere, expected)


def test_the_order_differs_from_densecrf2d():
    """(y, x) here, (x, y) there: the same model up to the lattice's asymmetry, not bit by bit."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    unary = rng.normal(size=(3, 600))
    there = dcrf.DenseCRF2D(30, 20, 3)
    there.addPairwiseBilateral((40, 25), 60, image, 4)
    here, reordered = dcrf.DenseCRF(600, 3), dcrf.DenseCRF(600, 3)
    features = create_pairwise_bilateral((25, 40), 60, image, chdim=2)
    here.addPairwiseEnergy(features, 4)
    reordered.addPairwiseEnergy(features[[1, 0, 2, 3, 4]], 4)
    for crf in (there, here, reordered):
        crf.setUnaryEnergy(unary)
    assert np.array_equal(there.inference(2), reordered.inference(2))
    assert np.abs(there.inference(2) - here.inference(2)).max() > 1e-4


def test_features_refuse():
    image = np.zeros((4, 5, 3), np.uint8)
    for bad in (0, -1, np.nan, np.inf, (3, 0)):
        with refuses(ValueError, "create_pairwise_gaussian: sdims must be positive and finite"):
            create_pairwise_gaussian(bad, (4, 5))
        with refuses(ValueError, "create_pairwise_bilateral: sdims must be positive and finite"):
            create_pairwise_bilateral(bad, 3, image, 2)
        channels = (*bad, 1) if isinstance(bad, tuple) else bad
        with refuses(ValueError, "create_pairwise_bilateral: schan must be positive and finite"):
            create_pairwise_bilateral(3, channels, image, 2)
    with refuses(ValueError, "sdims must be a number or 2 numbers"):
        create_pairwise_gaussian((3, 3, 3), (4, 5))
    with refuses(ValueError, "schan must be a number or 3 numbers"):
        create_pairwise_bilateral((3, 3), (3, 3, 3, 3), image, 2)
    with refuses(ValueError, "sdims must be a number or 3 numbers"):
        create_pairwise_bilateral((3, 3), 3, image)  # forgot chdim
    for shape in [(), (0, 3), (3, -1)]:
        with refuses(ValueError, "create_pairwise_gaussian: shape must"):
            create_pairwise_gaussian(3, shape)
    with refuses(TypeError, "shape must be an integer"):
        create_pairwise_gaussian(3, (4.0, 5))
    for chdim in (3, 99):
        with refuses(ValueError, "create_pairwise_bilateral: chdim must be an axis of img or -1"):
            create_pairwise_bilateral(3, 3, image, chdim)
    with refuses(ValueError, "create_pairwise_bilateral: chdim must be at least -3, got -4"):
        create_pairwise_bilateral(3, 3, image, -4)
    for bad in (np.zeros((0, 5, 3)), np.zeros((4, 5, 0)), np.float64(3)):
        with refuses(ValueError, "create_pairwise_bilateral:"):
            create_pairwise_bilateral(3, 3, bad, 2 if np.ndim(bad) else -1)
    with refuses(ValueError, "create_pairwise_bilateral: img must be finite"):
        create_pairwise_bilateral(3, 3, np.full((4, 5), np.nan))
    for bad in (None, "image", image.astype(complex)):
        with refuses(TypeError, "create_pairwise_bilateral: img must hold real numbers"):
            create_pairwise_bilateral(3, 3, bad, 2)
