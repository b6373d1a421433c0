# SPDX-License-Identifier: Apache-2.0
"""The dense-CRF benchmarks: inputs, checks, and small runs from end to end."""

import os
import subprocess
import sys

import numpy as np
import pytest
from _benchmarks import ROOT

pytest.importorskip("torch")

from benchmarks import (
    _crf_cases,
    _crf_rivals,
    _result,
    bench_dense_crf,
    bench_dense_crf_scaling,
    bench_dense_crf_training,
    train_crf_as_rnn,
)
from benchmarks._harness import stages_of


def test_resize_is_bilinear_with_half_pixel_centres():
    ramp = np.arange(8, dtype=np.float32)[None, :, None].repeat(3, axis=0)
    same = _crf_cases.resize(ramp, 3, 8)
    np.testing.assert_array_equal(same, ramp)
    np.testing.assert_allclose(_crf_cases.resize(ramp, 3, 4)[0, :, 0], [0.5, 2.5, 4.5, 6.5])


def test_unary_energies_are_negative_log_probabilities_from_a_seed():
    unary = _crf_cases.make_unary(30, 40, 5)
    assert unary.shape == (5, 1200)
    assert unary.dtype == np.float32
    assert unary.flags.c_contiguous
    np.testing.assert_allclose(np.exp(-unary).sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(unary, _crf_cases.make_unary(30, 40, 5))
    assert len(np.unique(unary.argmin(axis=0))) == 5


@pytest.mark.parametrize(
    ("name", "size"), [("coffee", (400, 600)), ("coffee", (40, 61)), ("noise", (16, 16))]
)
def test_pictures_are_what_pydensecrf_accepts(name, size):
    pytest.importorskip("skimage")
    image = _crf_cases.load_picture(name, *size)
    assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert image.std() > 20


def test_traffic_formula_on_a_case_done_by_hand():
    # N = 10, L = 3, one kernel with d = 2 and M = 4.
    iteration = 4 * 10 * 3 + 8 * 10 * 3 + 3 * (8 * 4 * 3 + 8 * 4) + 8 * 4 * 3
    moved = _crf_cases.moved_bytes(10, 3, {2: 4})
    assert moved["inference"] == 10 * iteration + 4 * 10 * 3
    build = 8 * 3 * 14 + (8 * 10 * 3 + 3 * (8 * 4 + 8 * 4) + 8 * 4) + 4 * 10
    assert moved["build"] == build


def test_photos_of_the_test_data_are_read_in_place(pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("PYDENSE_TEST_DATA", str(pictures))
    problems = [p for p in _crf_cases.PROBLEMS if p.picture.startswith("voc-")]
    assert _crf_cases.available(problems) == problems
    assert len({p.picture for p in problems}) == 3
    for p in problems:
        # At its own size: nothing is resampled.
        assert _crf_cases.voc_file(p.picture).name == f"{p.picture[4:]}_0img.png"
        image = _crf_cases.load_picture(p.picture, p.height, p.width)
        assert image.shape == (p.height, p.width, 3)
        assert image.flags.c_contiguous
        assert image.flags.writeable
    from PIL import Image

    with Image.open(_crf_cases.voc_file(p.picture)) as file:
        assert np.array_equal(image, np.asarray(file.convert("RGB")))
    monkeypatch.setenv("PYDENSE_TEST_DATA", str(tmp_path))
    assert _crf_cases.available(problems) == []


def test_labels_count_as_wrong_only_where_the_probabilities_decide():
    # By pixel: same label; a tie within 1e-3; decided in one of the two; decided in both.
    ours = np.array([[0.9, 0.5002, 0.5002, 0.8], [0.1, 0.4998, 0.4998, 0.2]], np.float32)
    theirs = np.array([[0.8, 0.4999, 0.4, 0.1], [0.2, 0.5001, 0.6, 0.9]], np.float32)
    figures = _crf_rivals.compare({"pydense": ours.reshape(1, 2, 2, 2), "other": theirs})
    assert figures["other"]["labels_differ"] == 3
    assert figures["other"]["decided_labels_differ"] == 2
    assert figures["other"]["max_abs_dq"] == pytest.approx(0.7)
    run = {"case": "c", "isa": "avx2", "threads": 2, "checks": figures}
    assert bench_dense_crf.wrong_labels([run]) == [
        "c, avx2, 2 thread(s): other has other labels at 2 decided pixels"
    ]
    fine = _crf_rivals.compare({"pydense": ours, "other": ours})
    assert bench_dense_crf.wrong_labels([{**run, "checks": fine}]) == []


def test_all_rivals_solve_the_same_problem():
    problem = _crf_cases.QUICK[0]
    rivals = _crf_rivals.rivals_of(problem)
    assert {"pydense", "pydense warm", "pydense.densecrf", "plain torch"} <= set(rivals)
    results = {}
    for label, rival in rivals.items():
        _crf_rivals.prime(label)
        stages = stages_of(rival)
        value = None
        for stage in stages.values():
            value = stage(value)
        results[label] = value
    figures = _crf_rivals.compare(results)
    for label in rivals:
        if label != "pydense":
            assert figures[label]["decided_labels_differ"] == 0
            assert figures[label]["max_abs_dq"] < 1e-3
    # The drop-in and the torch path, cold and warm, have the same bits.
    assert figures["pydense warm"]["max_abs_dq"] == 0
    assert figures["pydense.densecrf"]["max_abs_dq"] == 0
    start = np.exp(-_crf_cases.make_unary(problem.height, problem.width, problem.labels))
    assert np.abs(results["pydense"].numpy().reshape(start.shape) - start).max() > 0.5


def test_mosaic_mirrors_the_photo_at_its_edges():
    pytest.importorskip("skimage")
    photo = _crf_cases.load_picture(*bench_dense_crf_scaling.PHOTO)
    mosaic = bench_dense_crf_scaling.mosaic(850, 1300)
    height, width = photo.shape[:2]
    assert np.array_equal(mosaic[:height, :width], photo)
    assert np.array_equal(mosaic[:height, width : 2 * width], photo[:, ::-1])
    assert np.array_equal(mosaic[height : 2 * height, :width], photo[::-1])
    assert np.array_equal(mosaic[2 * height :, :width], photo[:50])
    assert np.array_equal(mosaic[:, 2 * width :], mosaic[:, :100])


def test_sizes_double_along_every_axis():
    for axis, sizes in bench_dense_crf_scaling.AXES.items():
        values = [bench_dense_crf_scaling.value_of(axis, size) for size in sizes]
        np.testing.assert_allclose(np.divide(values[1:], values[:-1]), 2, rtol=0.01)


def run_quick(module, path, threads, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--rounds", "2"]
    command += ["--threads", *threads, *arguments, "--output", str(path)]
    # Spinning OpenMP threads make this test take minutes where others use the machine.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(path.parent) not in path.read_text()
    return _result.load_result(path), done.stdout


def test_quick_run_writes_a_valid_result(tmp_path):
    from pydense import _core

    isa = _core.cpu_capability()
    result, _ = run_quick("bench_dense_crf", tmp_path / "dense_crf.json", ["2"], "--isa", isa)
    assert len(result["runs"]) == len(_crf_cases.QUICK)
    for run in result["runs"]:
        assert run["isa"] == isa
        assert set(run["rivals"]["pydense.densecrf"]["seconds"]) == {"build", "inference", "total"}
        assert set(run["variants"]) == {"pydense warm", "pydense.densecrf"}
        assert set(run["memory"]) == set(run["rivals"]) - {"pydense warm"}
        assert run["memory"]["pydense"] > 0
        assert run["limit"]["total"]["times_limit"] > 0
        for figures in run["checks"].values():
            assert figures["decided_labels_differ"] == 0
    first, last = result["runs"]
    assert first["ratios"]["plain torch"]["total"]["rounds"] == 1  # of two
    assert "plain torch" not in last["ratios"]
    assert "--isa" in result["command"]
    assert result["machine"]["environment"]["OMP_WAIT_POLICY"] == "passive"


def test_quick_scaling_run_writes_a_valid_result(tmp_path):
    result, printed = run_quick("bench_dense_crf_scaling", tmp_path / "scaling.json", ["1", "2"])
    assert result["kind"] == "scaling"
    assert [run["case"] for run in result["runs"]] == [
        axis for axis in bench_dense_crf_scaling.QUICK for _ in range(2)
    ]
    assert result["runs"][0]["params"]["values"] == [600, 2400]
    assert printed.count("time ~ size^") == 6


def test_quick_training_run_writes_a_valid_result(tmp_path):
    result, _ = run_quick(
        "bench_dense_crf_training", tmp_path / "training.json", ["1"], "--no-memory"
    )
    assert len(result["runs"]) == len(bench_dense_crf_training.QUICK)
    first, last = result["runs"]
    assert first["checks"]["recompute"]["max_relative"] == 0
    assert first["checks"]["plain torch"]["max_relative"] < 1e-4
    assert {"forward", "recompute", "plain torch"} <= set(first["ratios"])
    assert set(last["ratios"]) == {"forward"}  # a batch
    assert last["params"]["train_bandwidths"]


def test_experiment_counts_what_it_says(tmp_path):
    """Mean IoU, and that a step of each kind moves what it should."""
    import torch

    labels = torch.tensor([[[0, 0, 1, 11], [1, 1, 2, 11]]], dtype=torch.uint8)
    scores = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 5], [1, 1, 0, 5]]]), 11)
    images = scores.movedim(3, 1).float()
    # Class 0: 1 of 3, class 1: 3 of 4, class 2: 0 of 1.
    expected = 100 * (1 / 3 + 3 / 4 + 0) / 3
    assert train_crf_as_rnn.mean_iou(torch.nn.Identity(), (images, labels), 2) == pytest.approx(
        expected
    )
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (4, 3, 24, 32), generator=generator, dtype=torch.uint8)
    truths = torch.randint(12, (4, 24, 32), generator=generator, dtype=torch.uint8)
    model = train_crf_as_rnn.WithCRF(train_crf_as_rnn.Net(8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_crf_as_rnn.train(model, (pictures, truths), 2, 2, 1e-2, 0)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
