# SPDX-License-Identifier: Apache-2.0
"""The drop-in's interface: names, signs, what it accepts and what it refuses."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from _oracle import MeanField, PermutohedralLattice

import pydense.densecrf as dcrf

W, H, L = 13, 9, 3
N = W * H


def random(shape, seed=0, scale=1.0):
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return values.astype(np.float32)


def picture(seed=0, channels=3):
    rng = np.random.default_rng(seed)
    smooth = np.indices((H, W)).sum(axis=0)[..., None] * 9 + rng.integers(0, 30, channels)
    return (smooth + rng.integers(0, 12, (H, W, channels))).astype(np.uint8)


def model(labels=L, unary=None, compat=3, image=None):
    crf = dcrf.DenseCRF2D(W, H, labels)
    crf.setUnaryEnergy(random((labels, N)) if unary is None else unary)
    crf.addPairwiseGaussian(sxy=3, compat=compat)
    crf.addPairwiseBilateral(
        sxy=20, srgb=13, rgbim=picture() if image is None else image, compat=compat
    )
    return crf


def test_public_names():
    """Everything pydensecrf.densecrf exports to scripts, with its parameter names and defaults."""
    for name in dcrf.__all__:
        assert hasattr(dcrf, name)
    signatures = {
        "DenseCRF": ["nvar", "nlabels"],
        "DenseCRF2D": ["w", "h", "nlabels"],
        "DenseCRF.setUnary": ["self", "u"],
        "DenseCRF.setUnaryEnergy": ["self", "u", "f"],
        "DenseCRF.addPairwiseEnergy": ["self", "features", "compat", "kernel", "normalization"],
        "DenseCRF.inference": ["self", "niter"],
        "DenseCRF.startInference": ["self"],
        "DenseCRF.stepInference": ["self", "Q", "tmp1", "tmp2"],
        "DenseCRF.klDivergence": ["self", "Q"],
        "DenseCRF2D.addPairwiseGaussian": ["self", "sxy", "compat", "kernel", "normalization"],
        "DenseCRF2D.addPairwiseBilateral": [
            *["self", "sxy", "srgb", "rgbim", "compat", "kernel", "normalization"]
        ],
        "ConstUnary": ["u"],
        "LogisticUnary": ["L", "f"],
    }
    for path, expected in signatures.items():
        found = dcrf
        for part in path.split("."):
            found = getattr(found, part)
        parameters = inspect.signature(found).parameters
        assert list(parameters) == expected, path
        if "kernel" in parameters:
            assert parameters["kernel"].default == dcrf.DIAG_KERNEL
            assert parameters["normalization"].default == dcrf.NORMALIZE_SYMMETRIC
    assert issubclass(dcrf.DenseCRF2D, dcrf.DenseCRF)
    assert issubclass(dcrf.ConstUnary, dcrf.Unary) and issubclass(dcrf.LogisticUnary, dcrf.Unary)


def test_enum_values():
    names = ["NO_NORMALIZATION", "NORMALIZE_BEFORE", "NORMALIZE_AFTER", "NORMALIZE_SYMMETRIC"]
    assert [getattr(dcrf, name) for name in names] == [0, 1, 2, 3]
    assert [dcrf.CONST_KERNEL, dcrf.DIAG_KERNEL, dcrf.FULL_KERNEL] == [0, 1, 2]
    assert [e.name for e in dcrf.NormalizationType] == names


COMPATS = {
    "potts": 2.5,
    "diagonal": np.array([1.0, -2.0, 0.5, -1.5, 0.0]),
    "matrix": random((5, 5), 5),  # not symmetric: only its symmetric part counts
}


@pytest.mark.parametrize("kind", COMPATS)
@pytest.mark.parametrize("norm", list(dcrf.NormalizationType))
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_against_the_oracle(kind, norm, d, labels):
    points = 211
    features = [random((d, points), 1, 1.5), random((d, points), 2, 0.7)]
    compat = COMPATS[kind]
    compat = compat if kind == "potts" else compat[(slice(labels),) * compat.ndim]
    compat = compat * 0.05 if norm == dcrf.NO_NORMALIZATION else compat  # row sums are ~50
    unary = random((labels, points), 3, 2)
    crf = dcrf.DenseCRF(points, labels)
    crf.setUnaryEnergy(unary)
    kernels = []
    for scale, f in zip((1, -0.3), features, strict=True):
        crf.addPairwiseEnergy(f, scale * compat, normalization=norm)
        name = norm.name.rpartition("_")[2].lower() if norm else "none"
        kernels.append((PermutohedralLattice(f), scale * compat, name))
    oracle = MeanField(unary, kernels)
    for iterations in (0, 1, 4):
        expected = oracle.run(iterations)
        assert np.abs(crf.inference(iterations) - expected).max() <= 2e-5
        objective = oracle.kl_divergence(expected)
        assert crf.klDivergence(expected) == pytest.approx(objective, rel=1e-5, abs=1e-2)


def test_sign_table():
    """The three lines of the table in the module's docstring."""
    potts = model(compat=2).inference(3)
    assert np.abs(potts - model(compat=[-2] * L).inference(3)).max() < 1e-6
    assert np.abs(potts - model(compat=-2 * np.eye(L)).inference(3)).max() < 1e-6
    assert np.abs(potts - model(compat=2 * (1 - np.eye(L))).inference(3)).max() < 1e-5
    # Label 0 is slightly likelier everywhere: attraction strengthens it, repulsion weakens it.
    leaning = np.zeros((L, N))
    leaning[0] = -0.5
    start = model(unary=leaning).inference(0)[0].mean()
    assert model(unary=leaning, compat=2).inference(3)[0].mean() > start + 0.2
    assert model(unary=leaning, compat=[0.5] * L).inference(3)[0].mean() < start - 0.02
    assert model(unary=leaning, compat=0.5 * np.eye(L)).inference(3)[0].mean() < start - 0.02
    matrix = random((L, L), 8)
    symmetric = model(compat=(matrix + matrix.T) / 2).inference(3)
    assert np.array_equal(model(compat=matrix).inference(3), symmetric)


def test_result_is_a_new_plain_array():
    crf = model()
    q = crf.inference(2)
    assert type(q) is np.ndarray and q.dtype == np.float32 and q.shape == (L, N)
    assert q.flags.writeable and q.flags.owndata and q.strides == (4, 4 * L)
    assert np.abs(q.sum(axis=0) - 1).max() < 1e-6
    kept = q.copy()
    q[...] = 0
    assert np.array_equal(crf.inference(2), kept)
    assert np.array_equal(np.array(crf.inference(2)), kept)


def test_missing_unary_is_uniform():
    crf = dcrf.DenseCRF2D(W, H, 4)
    assert np.array_equal(crf.inference(0), np.full((4, N), 0.25))
    assert np.array_equal(crf.startInference()[0], np.full((4, N), 0.25))
    crf.addPairwiseGaussian(3, 5)
    assert np.abs(crf.inference(3) - 0.25).max() < 1e-6
    # One label is favoured by the diagonal alone: Q follows it everywhere.
    crf.addPairwiseGaussian(3, [-2, 0, 0, 0])
    assert (np.argmax(crf.inference(3), axis=0) == 0).all()


def test_unary_is_copied_and_replaced():
    unary = random((L, N))
    crf = model(unary=unary)
    first = crf.inference(2)
    unary[...] = 0
    assert np.array_equal(crf.inference(2), first)
    crf.setUnaryEnergy(np.zeros((L, N)))
    assert not np.array_equal(crf.inference(2), first)
    energy = random((L, N))
    constant = dcrf.ConstUnary(energy)
    energy[...] = 0
    crf.setUnary(constant)
    assert np.array_equal(crf.inference(2), first)
    crf.setUnary(constant)  # pydensecrf empties the object on first use; here it stays whole
    assert np.array_equal(crf.inference(2), first)


def test_features_and_images_are_copied():
    image = picture()
    crf = model(image=image)
    features = random((2, N), 4)
    crf.addPairwiseEnergy(features, 1)
    first = crf.inference(2)
    image[...] = 0
    features[...] = 0
    assert np.array_equal(crf.inference(2), first)


def test_logistic_unary():
    weights, inputs = random((L, 5), 1), random((5, N), 2)
    expected = dcrf.DenseCRF2D(W, H, L)
    expected.setUnaryEnergy(weights @ inputs)
    by_object = dcrf.DenseCRF2D(W, H, L)
    by_object.setUnary(dcrf.LogisticUnary(weights, inputs))
    by_arguments = dcrf.DenseCRF2D(W, H, L)
    by_arguments.setUnaryEnergy(weights.astype(np.float64), np.asfortranarray(inputs))
    for crf in (by_object, by_arguments):
        assert np.abs(crf.inference(0) - expected.inference(0)).max() < 1e-6


def test_steps_are_inference():
    crf = model()
    q, tmp1, tmp2 = crf.startInference()
    assert np.array_equal(q, crf.inference(0))
    for iterations in range(1, 7):
        address = q.ctypes.data
        assert crf.stepInference(q, tmp1, tmp2) is None
        assert q.ctypes.data == address
        assert np.array_equal(q, crf.inference(iterations))


def test_steps_on_any_strides():
    crf = model()
    expected = crf.inference(1)
    start = crf.startInference()[0]
    record = np.zeros((L, N), np.dtype([("pad", np.uint8), ("value", np.float32)]))["value"]
    layouts = {
        "C order": np.empty((L, N), np.float32),
        "Fortran": np.empty((L, N), np.float32, order="F"),
        "sliced": np.empty((2 * L, 3 * N), np.float32)[::2, ::3],
        "reversed": np.empty((L, N), np.float32)[::-1, ::-1],
        "odd strides": record,
    }
    for name, q in layouts.items():
        q[...] = start
        crf.stepInference(q, None, None)
        assert np.array_equal(q, expected), name
        kl = crf.klDivergence(q)
        assert kl == crf.klDivergence(expected)
        assert kl == crf.klDivergence(expected.astype(np.float64))
        assert kl == crf.klDivergence(expected.tolist())
    untouched = np.zeros((2 * L, 3 * N), np.float32)
    view = untouched[::2, ::3]
    view[...] = start
    crf.stepInference(view, None, None)
    view[...] = 0
    assert not untouched.any()


def array_variants(array):
    frozen = array.copy()
    frozen.flags.writeable = False
    spread = np.zeros(tuple(2 * size for size in array.shape), array.dtype)
    spread[(slice(None, None, 2),) * array.ndim] = array
    return {
        "read-only": frozen,
        "Fortran": np.asfortranarray(array),
        "sliced": spread[(slice(None, None, 2),) * array.ndim],
        "float64": array.astype(np.float64),
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
        "list": array.tolist(),
    }


def test_unary_layouts():
    unary = random((L, N))
    expected = model(unary=unary).inference(2)
    for name, variant in array_variants(unary).items():
        assert np.array_equal(model(unary=variant).inference(2), expected), name
    half = unary.astype(np.float16)
    exact = model(unary=half.astype(np.float32)).inference(2)
    assert np.array_equal(model(unary=half).inference(2), exact)
    whole = np.arange(L * N).reshape(L, N) % 5
    assert np.array_equal(
        model(unary=whole).inference(2), model(unary=whole.astype(np.float32)).inference(2)
    )


def test_feature_layouts():
    features = random((4, N), 3)

    def run(f):
        crf = dcrf.DenseCRF(N, L)
        crf.setUnaryEnergy(random((L, N)))
        crf.addPairwiseEnergy(f, 3)
        return crf.inference(2)

    expected = run(features)
    for name, variant in array_variants(features).items():
        assert np.array_equal(run(variant), expected), name


def test_image_layouts():
    image = picture()
    expected = model(image=image).inference(2)
    for name, variant in array_variants(image).items():
        assert np.array_equal(model(image=variant).inference(2), expected), name
    for dtype in (np.int16, np.uint16, np.int64, np.uint64, np.float16, np.float32):
        assert np.array_equal(model(image=image.astype(dtype)).inference(2), expected), dtype


@pytest.mark.parametrize("channels", [None, 1, 2, 4, 9])
def test_images_of_any_channels(channels):
    """The same as handing in the features x, y, channels oneself."""
    image = picture(3, channels or 1)
    sigmas = np.linspace(5, 20, channels or 1)
    y, x = np.indices((H, W), dtype=np.float32)
    stacked = [x / np.float32(20), y / np.float32(10)]
    stacked += [image[..., c] / np.float32(s) for c, s in enumerate(sigmas)]
    unary = random((L, N))
    crf, by_hand = dcrf.DenseCRF2D(W, H, L), dcrf.DenseCRF(N, L)
    crf.addPairwiseBilateral((20, 10), sigmas, image[..., 0] if channels is None else image, 4)
    by_hand.addPairwiseEnergy(np.stack(stacked).reshape(len(stacked), -1), 4)
    for each in (crf, by_hand):
        each.setUnaryEnergy(unary)
    assert np.array_equal(crf.inference(3), by_hand.inference(3))


def test_scalars_broadcast():
    image, unary = picture(), random((L, N))
    results = []
    for sxy, srgb, compat in [
        (7, 13, 3),
        ((7, 7), (13, 13, 13), 3.0),
        (np.float32(7), np.int64(13), np.float32(3)),
        (np.array([7.0, 7.0]), np.full(3, 13), np.array(3.0)),
    ]:
        crf = dcrf.DenseCRF2D(W, H, L)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(sxy, compat)
        crf.addPairwiseBilateral(sxy, srgb, image, compat, dcrf.FULL_KERNEL, 3)
        results.append(crf.inference(2))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_forbidden_labels():
    """+inf energies: probability exactly 0 for ever, and an objective that stays finite."""
    unary = random((L, N))
    unary[1, ::3] = np.inf
    crf = model(unary=unary)
    q = crf.inference(5)
    assert not q[1, ::3].any()
    assert np.isfinite(q).all() and np.abs(q.sum(axis=0) - 1).max() < 1e-6
    assert np.isfinite(crf.klDivergence(q))


def test_subclass_with_own_constructor():
    class Mine(dcrf.DenseCRF2D):
        def __init__(self, image):
            super().__init__(image.shape[1], image.shape[0], 2)

    assert Mine(picture()).inference(1).shape == (2, N)
