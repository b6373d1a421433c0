# SPDX-License-Identifier: Apache-2.0
"""``pydense.densecrf.fit``: the grid, the refinement, scores and errors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from pydense.densecrf import (
    DEEPLAB_GRID,
    NORMALIZE_AFTER,
    NORMALIZE_BEFORE,
    NORMALIZE_SYMMETRIC,
    DenseCRF2D,
    fit,
)

SIZE = (24, 32)
GRID = {"bilateral_sxy": [1, 20], "bilateral_compat": [0.01, 4], "gaussian_compat": [0.01]}
START = {"gaussian_compat": 0.05, "bilateral_compat": 0.05, "bilateral_sxy": 20}


def problem(count=2, labels=3, seed=0):
    """Pictures of stripes in different colours, with noisy energies and a corner of unknown."""
    rng = np.random.default_rng(seed)
    unaries, images, truths = [], [], []
    for _ in range(count):
        truth = np.broadcast_to(np.arange(SIZE[1]) * labels // SIZE[1], SIZE).copy()
        image = 40 + 70 * truth[..., None] + rng.integers(0, 12, (*SIZE, 3))
        energy = (truth != np.arange(labels)[:, None, None]) * 1.0 + rng.normal(
            0, 1, (labels, *SIZE)
        )
        truth[:4, :4] = 255
        unaries.append(energy.astype(np.float32))
        images.append(image.astype(np.uint8))
        truths.append(truth)
    return unaries, images, truths


def miou(pictures, parameters, iterations):
    """By counting, label by label."""
    predictions, truths = [], []
    for unary, image, truth in zip(*pictures, strict=True):
        crf = DenseCRF2D(SIZE[1], SIZE[0], len(unary))
        crf.setUnaryEnergy(unary.reshape(len(unary), -1))
        crf.addPairwiseGaussian(
            sxy=parameters["gaussian_sxy"], compat=parameters["gaussian_compat"]
        )
        crf.addPairwiseBilateral(
            sxy=parameters["bilateral_sxy"],
            srgb=parameters["bilateral_srgb"],
            rgbim=image,
            compat=parameters["bilateral_compat"],
        )
        best = crf.inference(iterations).argmax(0).reshape(SIZE)
        predictions.append(best[truth != 255])
        truths.append(truth[truth != 255])
    p, t = np.concatenate(predictions), np.concatenate(truths)
    return np.mean([((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(3)])


class TestGrid:
    def test_tries_everything_and_returns_the_best(self):
        pictures, lines = problem(), []
        found = fit(*pictures, method="grid", grid=GRID, iterations=3, progress=lines.append)
        assert [trial.stage for trial in found.trials] == ["start"] + 4 * ["grid"]
        assert len(lines) == 5 and "miou" in lines[0]
        tried = {(t.parameters["bilateral_sxy"], t.parameters["bilateral_compat"])
                 for t in found.trials[1:]}  # fmt: skip
        assert tried == {(1, 0.01), (1, 4), (20, 0.01), (20, 4)}
        for trial in found.trials:
            assert trial.score == pytest.approx(miou(pictures, trial.parameters, 3), abs=1e-12)
        assert found.score == max(trial.score for trial in found.trials)
        assert len({trial.score for trial in found.trials}) > 2

    def test_metrics(self):
        pictures = problem()
        for metric, low, high in (("accuracy", 0.3, 1), ("nll", -20, 0)):
            grid = {"bilateral_compat": [1e-6, 3]}
            found = fit(*pictures, method="grid", grid=grid, metric=metric)
            assert low < found.score <= high and found.parameters["bilateral_compat"] != 1e-6

    def test_default_is_deeplabs(self):
        assert np.prod([len(v) for v in DEEPLAB_GRID.values()]) == 128

    @pytest.mark.parametrize(
        ("normalization", "word"),
        [(NORMALIZE_SYMMETRIC, "symmetric"), (NORMALIZE_BEFORE, "before")],
    )
    def test_result_goes_back_into_the_models(self, normalization, word):
        from pydense.nn import DenseCRF

        pictures = problem(1)
        found = fit(*pictures, method="grid", grid=GRID, normalization=normalization)
        unary, image = pictures[0][0], pictures[1][0]
        crf = DenseCRF2D(SIZE[1], SIZE[0], 3)
        crf.setUnaryEnergy(unary.reshape(3, -1))
        found.apply(crf, image)
        layer = DenseCRF(found.gaussian, found.bilateral, iterations=4, normalization=word)
        q = layer(-torch.tensor(unary)[None], torch.tensor(image).permute(2, 0, 1)[None])
        np.testing.assert_array_equal(q[0].reshape(3, -1).numpy(), crf.inference(4))


class TestLbfgs:
    @pytest.mark.parametrize("bandwidths", [False, True])
    def test_improves_the_likelihood(self, bandwidths):
        found = fit(
            *problem(),
            method="lbfgs",
            start=START,
            bandwidths=bandwidths,
            iterations=3,
            lbfgs_steps=4,
            metric="nll",
        )
        assert found.score > found.trials[0].score + 0.1
        assert found.parameters["bilateral_compat"] > 0.1
        moved = found.parameters["bilateral_srgb"] != 13
        assert moved == bandwidths

    def test_after_the_grid(self):
        grid = {"bilateral_compat": [0.01, 0.5]}
        options = {"grid": grid, "bandwidths": False, "lbfgs_steps": 2, "metric": "nll"}
        found = fit(*problem(), start=START, normalization=NORMALIZE_AFTER, **options)
        stages = [trial.stage for trial in found.trials]
        assert stages[:3] == ["start", "grid", "grid"] and "lbfgs" in stages
        assert found.score >= max(t.score for t in found.trials if t.stage == "grid")


def test_the_grid_needs_no_torch():
    code = (
        "import sys, numpy as np; from pydense.densecrf import fit;"
        "u = np.random.default_rng(0).normal(size=(2, 5, 6));"
        "fit([u], [np.zeros((5, 6), np.uint8)], [u.argmin(0)], method='grid',"
        "    grid={'gaussian_compat': [1]});"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_progress_on_stderr(capsys):
    fit(*problem(1), method="grid", grid={}, progress=True)
    assert "fit: start: miou" in capsys.readouterr().err


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"method": "random"}, "method must be one of"),
            ({"metric": "dice"}, "metric must be one of"),
            ({"grid": {"sxy": [1]}}, "grid must name"),
            ({"grid": {"gaussian_sxy": [0]}}, "must be positive and finite"),
            ({"grid": {"gaussian_sxy": []}}, "must be positive and finite"),
            ({"start": {"gaussian_sxy": float("nan")}}, "must be positive and finite"),
            ({"iterations": -1}, "iterations must be"),
            ({"ignore_label": 254}, r"labels\[0\] must be in \[0, 2\] or 254, got 255"),
        ],
    )
    def test_options(self, options, text):
        with pytest.raises(ValueError, match=f"fit: .*{text}|fit: {text}"):
            fit(*problem(1), **options)

    def test_arrays(self):
        u, i, t = problem(1)
        for arguments, text in (
            (([], [], []), "must be as many, at least 1"),
            ((u, i, t * 2), "must be as many"),
            (([u[0][0]], i, t), r"unaries\[0\] must have shape"),
            ((u, [i[0][1:]], t), r"images\[0\] must have shape"),
            ((u, i, [t[0].astype(float)]), r"labels\[0\] must be integers"),
            ((u, i, [np.full(SIZE, 255)]), "must have a pixel"),
        ):
            with pytest.raises(ValueError, match=f"fit: .*{text}"):
                fit(*arguments)
