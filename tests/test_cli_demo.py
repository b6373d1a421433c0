# SPDX-License-Identifier: Apache-2.0
"""`pydense demo`: the photo, the pictures it writes, and that they are worth showing."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _cli import Result, load, run_error, run_ok

import pydense
import pydense.densecrf
import pydense.densecrf.utils
from pydense.cli import _demo

NAMES = {"photo", "annotation", "before", "after", "refined", "side-by-side"}

needs_photo = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("demo") / "new folder"
    return folder, run_ok("demo", "--output-dir", folder, "--threads", 2)


@needs_photo
def test_pictures_and_report(demo: tuple[Path, Result]) -> None:
    folder, result = demo
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in NAMES}
    for name in NAMES - {"side-by-side"}:
        assert load(folder / f"{name}.png").shape == (512, 512, 3)
    height, width, _ = load(folder / "side-by-side.png").shape
    assert (height > 512, width > 3 * 512) == (True, True)
    assert re.search(r"pydense\s+│\s+2\s+│\s+\d+\.\d ms", result.out)
    assert "512x512, 6 labels" in result.out


@needs_photo
def test_the_same_by_hand(demo: tuple[Path, Result], tmp_path: Path) -> None:
    """The command that the demo prints gives the demo's result."""
    folder, result = demo
    line = next(line for line in result.out.splitlines() if line.startswith("the same by hand: "))
    words = shlex.split(line.removeprefix("the same by hand: "))
    assert words[:1] + words[-2:] == ["pydense", "-o", "refined.png"]
    run_ok(*words[1:-1], tmp_path / "refined.png")
    np.testing.assert_array_equal(load(tmp_path / "refined.png"), load(folder / "refined.png"))


def edges(picture: np.ndarray) -> np.ndarray:
    """Bool (H, W - 1): where horizontally neighbouring pixels differ."""
    return (picture[:, 1:] != picture[:, :-1]).any(axis=2)


@needs_photo
def test_rough_becomes_sharp(demo: tuple[Path, Result]) -> None:
    folder, _ = demo
    photo, rough, after = (load(folder / f"{n}.png") for n in ("photo", "annotation", "refined"))
    known = rough.any(axis=2)
    assert 0.15 < (~known).mean() < 0.4  # rough: a good part of the photo is left open
    assert after.any(axis=2).all()  # complete
    assert (after == rough)[known].all(axis=1).mean() > 0.97  # faithful
    colors, counts = np.unique(after.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colors) == 6
    assert counts.min() > 5000  # no object got lost
    # Sharp: the labels change where the photo does. Contrast across the borders of the labels,
    # against that across the borders of the drawing and the photo's average.
    contrast = np.abs(photo[:, 1:].astype(int) - photo[:, :-1]).sum(axis=2)
    assert contrast[edges(after)].mean() > 2.5 * contrast[edges(rough)].mean()
    assert contrast[edges(after)].mean() > 3 * contrast.mean()


@needs_photo
def test_deterministic(demo: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = demo
    run_ok("demo", "--output-dir", tmp_path, "--threads", 1)
    for name in NAMES - {"side-by-side"}:  # which shows the time
        assert (tmp_path / f"{name}.png").read_bytes() == (folder / f"{name}.png").read_bytes()


@needs_photo
def test_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pydensecrf's place taken by pydense itself the two must agree exactly."""
    twin = (pydense.densecrf, pydense.densecrf.utils)
    monkeypatch.setattr(_demo, "_pydensecrf", lambda: (twin, ""))
    out = run_ok("demo", "--output-dir", tmp_path).out
    assert re.search(r"pydensecrf\s+│\s+1\s+│\s+\d+\.\d ms", out)
    assert re.search(r"pydense is \d+\.\d times as fast as pydensecrf", out)
    assert "largest difference of a probability 0.0e+00, 0 pixels differ" in out


@needs_photo
def test_against_pydensecrf_itself(tmp_path: Path) -> None:
    if importlib.util.find_spec("pydensecrf") is None:
        pytest.skip("pydensecrf is not installed")
    out = run_ok("demo", "--output-dir", tmp_path).out
    match = re.search(r"largest difference of a probability (\S+), (\d+) pixels differ", out)
    assert match is not None
    assert float(match[1]) <= 1e-4
    assert int(match[2]) == 0


def test_rival_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", fail)
    assert _demo._pydensecrf() == (
        None,
        "cannot be imported: pydensecrf.densecrf: undefined symbol",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _demo._pydensecrf() == (None, "not installed")


def test_without_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "skimage" else find_spec(name)
    )
    folder = tmp_path / "pictures"
    message = run_error("demo", "--output-dir", folder)
    assert "scikit-image, which is not installed: pip install 'pydense[demo]'" in message
    assert not folder.exists()


@needs_photo
def test_other_photo_and_bad_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run_error("demo", "--output-dir", file) == f"cannot write {file}: File exists"
    monkeypatch.setattr(_demo, "_PHOTO", "missing.png")
    assert "lacks its picture data/missing.png" in run_error("demo", "--output-dir", tmp_path)
    monkeypatch.setattr(_demo, "_PHOTO", "coffee.png")
    assert "is another picture than expected" in run_error("demo", "--output-dir", tmp_path)


def test_photo_ships_in_the_wheel() -> None:
    """It must not be one of the pictures that scikit-image downloads when asked for."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        shipped = files("scikit-image") or []
    except PackageNotFoundError:
        pytest.skip("scikit-image is not installed")
    assert f"skimage/data/{_demo._PHOTO}" in {str(path) for path in shipped}
