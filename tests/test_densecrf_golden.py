# SPDX-License-Identifier: Apache-2.0
"""Against numbers and pictures that other implementations produced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from _oracle import ExactKernel, MeanField, PermutohedralLattice

import pydense.densecrf as dcrf
from pydense import _core
from pydense.densecrf.utils import (
    create_pairwise_bilateral,
    create_pairwise_gaussian,
    unary_from_labels,
)

MONAI = json.loads((Path(__file__).parent / "data" / "monai_cpu.json").read_text())
NORMALIZATIONS = {
    "NO": dcrf.NO_NORMALIZATION,
    "BEFORE": dcrf.NORMALIZE_BEFORE,
    "AFTER": dcrf.NORMALIZE_AFTER,
    "SYM": dcrf.NORMALIZE_SYMMETRIC,
}
CORE_NAMES = {"NO": "none", "BEFORE": "before", "AFTER": "after", "SYM": "symmetric"}


def compats(golden, norm, kind):
    base = {"potts": 3.0, "diag": golden["compat_diag"], "matrix": golden["compat_matrix"]}[kind]
    second = 10.0 if kind == "potts" else 2 * base
    return (0.02 * base, 0.005 * second) if norm == "NO" else (base, second)


def crop_model(golden, norm, kind):
    image = golden["image"]
    height, width, _ = image.shape
    model = dcrf.DenseCRF2D(width, height, len(golden["unary"]))
    model.setUnaryEnergy(golden["unary"])
    first, second = compats(golden, norm, kind)
    model.addPairwiseGaussian(3, first, normalization=NORMALIZATIONS[norm])
    model.addPairwiseBilateral(80, 13, image, second, normalization=NORMALIZATIONS[norm])
    return model


@pytest.mark.parametrize("kind", ["potts", "diag", "matrix"])
@pytest.mark.parametrize("norm", NORMALIZATIONS)
def test_pydensecrf_crop(golden, norm, kind):
    model = crop_model(golden, norm, kind)
    tolerance = 1e-3 if norm == "NO" else 1e-4
    for iterations in (1, 5):
        expected = golden[f"pydensecrf_{norm}_{kind}_it{iterations}"]
        assert np.abs(model.inference(iterations) - expected).max() <= tolerance
    q, tmp1, tmp2 = model.startInference()
    objective = [model.klDivergence(q)]
    for _ in range(5):
        model.stepInference(q, tmp1, tmp2)
        objective.append(model.klDivergence(q))
    expected = golden[f"pydensecrf_{norm}_{kind}_kl"]
    # pydensecrf sums the pairwise part in float32: about 1e-5 of the result.
    np.testing.assert_allclose(objective, expected, rtol=2e-5)


def test_pydensecrf_generic_features(golden):
    image = golden["image"]
    model = dcrf.DenseCRF(image[..., 0].size, 4)
    model.setUnaryEnergy(golden["unary"])
    model.addPairwiseEnergy(create_pairwise_gaussian((3, 3), image.shape[:2]), 3)
    model.addPairwiseEnergy(create_pairwise_bilateral((80, 80), (13, 13, 13), image, chdim=2), 10)
    q = model.inference(5)
    assert np.abs(q - golden["pydensecrf_generic_SYM_potts_it5"]).max() <= 1e-4
    # The golden must tell the two orders of coordinates apart, or the test above proves nothing.
    assert np.abs(q - golden["pydensecrf_SYM_potts_it5"]).max() > 1e-2


def test_pydensecrf_volume(golden):
    volume, unary = golden["vol3d"], golden["vol3d_unary"]
    model = dcrf.DenseCRF(volume.size, len(unary))
    model.setUnaryEnergy(unary)
    model.addPairwiseEnergy(create_pairwise_gaussian((2, 2, 2), volume.shape), 2)
    model.addPairwiseEnergy(create_pairwise_bilateral((4, 4, 4), (8,), volume), 4)
    assert np.abs(model.inference(5) - golden["vol3d_Q_it5"]).max() <= 1e-4


def pack(picture):
    r, g, b = np.moveaxis(picture.astype(np.int64), 2, 0)
    return r + (g << 8) + (b << 16)


def picture_model(folder, number):
    image_module = pytest.importorskip("PIL.Image")

    def read(name):
        return np.asarray(image_module.open(folder / f"{name}{number}.png").convert("RGB"))

    image, colours = read("im"), pack(read("anno"))
    palette = np.unique(colours)
    palette = palette[palette != 0]  # black: not annotated
    labels = np.searchsorted(palette, colours) + 1
    labels[colours == 0] = 0
    model = dcrf.DenseCRF(labels.size, len(palette))
    model.setUnaryEnergy(unary_from_labels(labels, len(palette), 0.7, zero_unsure=True))
    model.addPairwiseEnergy(create_pairwise_gaussian((3, 3), labels.shape), 3)
    model.addPairwiseEnergy(create_pairwise_bilateral((80, 80), (13, 13, 13), image, 2), 10)
    return model, palette, pack(read("out"))


# The objective pydensecrf's example prints for each picture, to the digits printed there.
TRACES = {
    1: [-5.445e5, -8.915e5, -9.209e5, -9.226e5, -9.236e5],
    2: [-4.746e5, -6.985e5, -7.665e5, -7.706e5, -7.713e5],
    3: [-4.521e5, -8.966e5, -9.141e5, -9.146e5, -9.148e5],
}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_pydensecrf_pictures(pictures, number):
    model, palette, expected = picture_model(pictures / "crf" / "pydensecrf", number)
    q, tmp1, tmp2 = model.startInference()
    trace = []
    for _ in range(5):
        trace.append(model.klDivergence(q))
        model.stepInference(q, tmp1, tmp2)
    differing = palette[np.argmax(q, axis=0)].reshape(expected.shape) != expected
    assert int(differing.sum()) == 0
    assert int((palette[np.argmax(model.inference(5), axis=0)] != expected.ravel()).sum()) == 0
    np.testing.assert_allclose(trace, TRACES[number], atol=60)  # half a unit of the last digit


def coordinates(shape):
    return np.indices(shape, dtype=np.float32).reshape(len(shape), -1)


def normalised(lattice, values):
    mass = lattice.filter(np.ones((1, values.shape[1]), np.float32))
    return lattice.filter(values) / mass


def softmax(z):
    e = np.exp(z - z.max(axis=0))
    return e / e.sum(axis=0)


@pytest.mark.parametrize("name", [name for name in MONAI if name.startswith("crf")])
def test_monai_crf(name):
    table = MONAI[name]
    iterations, bi_weight, gauss_weight, bi_spatial, bi_colour, gauss_spatial, update, matrix = (
        table["params"]
    )
    for logits, reference, expected in zip(
        table["input"], table["features"], table["expected"], strict=True
    ):
        logits = np.array(logits, np.float32)
        grid, logits = coordinates(logits.shape[1:]), logits.reshape(len(logits), -1)
        reference = np.array(reference, np.float32).reshape(-1, logits.shape[1])
        bilateral = _core.Lattice(np.concatenate([grid / bi_spatial, reference / bi_colour]))
        gaussian = _core.Lattice(grid / np.float32(gauss_spatial))
        q = softmax(logits)
        for _ in range(int(iterations)):
            message = bi_weight * normalised(bilateral, q) + gauss_weight * normalised(gaussian, q)
            if matrix is not None:
                message = np.array(matrix, np.float32).T @ message
            q = softmax(logits + update * message).astype(np.float32)
        assert np.abs(q - np.array(expected).reshape(q.shape)).max() <= 1e-4


@pytest.mark.parametrize("name", [name for name in MONAI if name.startswith("phl")])
def test_monai_phl(name):
    table = MONAI[name]
    for values, features, expected in zip(
        table["input"], table["features"], table["expected"], strict=True
    ):
        values = np.array(values, np.float32).reshape(len(values), -1)
        features = np.array(features, np.float32).reshape(len(features), -1)
        sigmas = np.array(table["sigmas"][: len(features)], np.float32)  # MONAI ignores the rest
        lattice = _core.Lattice(features / sigmas[:, None])
        result = normalised(lattice, values)
        assert np.abs(result - np.array(expected).reshape(result.shape)).max() <= 1e-4


def crop_features(golden):
    image = golden["image"]
    height, width, _ = image.shape
    x, y = np.tile(np.arange(width), height), np.repeat(np.arange(height), width)
    spatial = np.stack([x, y]).astype(np.float32)
    colour = image.reshape(-1, 3).T.astype(np.float32)
    return spatial / np.float32(3), np.concatenate(
        [spatial / np.float32(80), colour / np.float32(13)]
    )


@pytest.mark.parametrize("norm", ["BEFORE", "AFTER", "SYM"])
def test_exact_oracle_agrees_with_recorded_brute_force(golden, norm):
    gaussian, bilateral = map(ExactKernel, crop_features(golden))
    oracle = MeanField(
        golden["unary"],
        [(gaussian, 3, CORE_NAMES[norm]), (bilateral, 10, CORE_NAMES[norm])],
    )
    for iterations in (1, 5):
        expected = golden[f"exact_{norm}_potts_it{iterations}"]
        assert np.abs(oracle.run(iterations) - expected).max() <= 1e-6


@pytest.mark.parametrize("kind", ["potts", "diag", "matrix"])
@pytest.mark.parametrize("norm", NORMALIZATIONS)
def test_lattice_oracle_agrees_with_both(golden, norm, kind):
    """The independent float64 lattice reproduces pydensecrf, and the core the lattice."""
    gaussian, bilateral = (
        PermutohedralLattice(f, geometry=np.float32) for f in crop_features(golden)
    )
    first, second = compats(golden, norm, kind)
    name = CORE_NAMES[norm]
    oracle = MeanField(golden["unary"], [(gaussian, first, name), (bilateral, second, name)])
    model = crop_model(golden, norm, kind)
    one = oracle.run(1)
    assert np.abs(one - golden[f"pydensecrf_{norm}_{kind}_it1"]).max() <= 1e-5
    assert np.abs(one - model.inference(1)).max() <= 1e-5
    assert model.klDivergence(one) == pytest.approx(oracle.kl_divergence(one), rel=1e-6)


def test_lattice_approximates_the_exact_kernel(golden):
    """Not a bound anyone needs, but it would catch an oracle and a core that are wrong together."""
    q = crop_model(golden, "SYM", "potts").inference(1)
    assert np.abs(q - golden["exact_SYM_potts_it1"]).mean() < 5e-3
