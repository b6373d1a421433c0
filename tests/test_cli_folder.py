# SPDX-License-Identifier: Apache-2.0
"""`pydense refine --input-dir`: many pictures, where one failure does not stop the others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from _cli import (
    load,
    rough_labels,
    run,
    run_error,
    run_ok,
    run_on_terminal,
    save,
    save_palette,
    scene,
)

from pydense.cli import _refine
from pydense.cli._palette import voc_colors


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three photos of different kinds and sizes, with annotations of different kinds."""
    photos, annotations, output = (tmp_path / name for name in ("photos", "rough", "out/deep"))
    photos.mkdir()
    annotations.mkdir()
    save(photos / "a.jpg", scene(20, 30))
    save(photos / "b.PNG", scene(24, 32))
    save(photos / "c.d.png", scene(18, 25))
    save_palette(annotations / "a.png", rough_labels(20, 30), voc_colors(np.arange(256)))
    save(annotations / "b.png", rough_labels(24, 32))
    soft = np.stack([rough_labels(18, 25) == 1, rough_labels(18, 25) == 0]) * 0.6 + 0.2
    np.save(annotations / "c.d.npy", soft)
    return photos, annotations, output


def command(folders: tuple[Path, Path, Path]) -> tuple[object, ...]:
    photos, annotations, output = folders
    return "refine", "--input-dir", photos, "--annotation-dir", annotations, "-o", output


def test_all_pictures(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos, annotations, output = folders
    extra = {name: tmp_path / name for name in ("overlay", "labels", "probabilities")}
    options = [part for name, path in extra.items() for part in (f"--{name}", path)]
    result = run(*command(folders), *options)
    assert result.code == 0
    assert "refined 3 of 3 pictures in " in result.out
    assert "pictures/s), 0 failed" in result.out
    assert sorted(os.listdir(output)) == ["a.png", "b.png", "c.d.png"]
    assert sorted(os.listdir(extra["overlay"])) == ["a.png", "b.png", "c.d.png"]
    assert sorted(os.listdir(extra["labels"])) == ["a.png", "b.png", "c.d.png"]
    assert sorted(os.listdir(extra["probabilities"])) == ["a.npz", "b.npz", "c.d.npz"]
    single = tmp_path / "single.png"
    for photo, annotation in (("a.jpg", "a.png"), ("b.PNG", "b.png"), ("c.d.png", "c.d.npy")):
        run_ok("refine", photos / photo, annotations / annotation, "-o", single)
        written = output / f"{Path(photo).stem}.png"
        assert written.read_bytes() == single.read_bytes()
        np.testing.assert_array_equal(load(extra["labels"] / written.name), load(single))


def test_failures_do_not_stop_the_others(folders: tuple[Path, Path, Path]) -> None:
    photos, annotations, output = folders
    (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    save(annotations / "b.png", rough_labels(24, 31))
    save(photos / "e[red].png", scene(9, 9))
    (annotations / "e[red].npz").write_bytes(b"nothing")
    result = run(*command(folders))
    assert result.code == 1
    assert "refined 1 of 4 pictures in " in result.out
    assert "3 failed" in result.out
    errors = [line for line in result.err.splitlines() if "error" in line]
    assert len(errors) == 3
    assert errors[0].startswith("pydense: error: a.jpg: cannot read ")
    assert errors[1].endswith("b.png is 31x24, but the image is 32x24")
    assert errors[2].startswith("pydense: error: e[red].png: cannot read ")  # no markup
    assert os.listdir(output) == ["c.d.png"]
    quiet = run(*command(folders), "--quiet")
    assert (quiet.code, quiet.out) == (1, "")
    assert quiet.err.splitlines() == errors


def test_an_unforeseen_error_is_that_pictures_alone(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    refine_picture = _refine.refine_picture

    def fail_on_b(job: _refine.Job, settings: _refine.Settings) -> _refine.Outcome:
        if job.image.name == "b.PNG":
            raise MemoryError
        if job.image.name == "c.d.png":
            raise KeyError("surprise")
        return refine_picture(job, settings)

    monkeypatch.setattr(_refine, "refine_picture", fail_on_b)
    result = run(*command(folders))
    assert result.code == 1
    assert "pydense: error: b.PNG: MemoryError: not enough memory\n" in result.err
    assert "pydense: error: c.d.png: KeyError: 'surprise'\n" in result.err
    assert os.listdir(folders[2]) == ["a.png"]


def test_options_wrong_for_one_picture_are_its_failure(folders: tuple[Path, Path, Path]) -> None:
    result = run(*command(folders), "--unknown", 255)  # not for the probabilities of c.d
    assert result.code == 1
    assert "c.d.png: --unknown does not go with probabilities" in result.err
    assert sorted(os.listdir(folders[2])) == ["a.png", "b.png"]


def test_files_without_partner_are_counted(folders: tuple[Path, Path, Path]) -> None:
    photos, annotations, output = folders
    save(photos / "lonely.png", scene(5, 5))
    save(annotations / "single.png", rough_labels(5, 5))
    (photos / "notes.txt").write_text("not a picture")
    (photos / ".hidden.png").write_bytes(b"")
    result = run(*command(folders))
    assert result.code == 0
    assert "left out: 2 files without a partner of the same name" in result.err
    assert sorted(os.listdir(output)) == ["a.png", "b.png", "c.d.png"]


def test_nothing_to_do(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos, annotations, output = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    message = run_error(*command((photos, empty, output)))
    assert message == f"no picture in {photos} has an annotation of the same name in {empty}"
    assert not output.exists()
    for bad, why in ((tmp_path / "missing", "No such file"), (photos / "a.jpg", "Not a directory")):
        assert why in run_error(*command((bad, annotations, output)))
        assert why in run_error(*command((photos, bad, output)))


def test_two_files_of_one_stem(folders: tuple[Path, Path, Path]) -> None:
    photos, annotations, output = folders
    save(photos / "a.png", scene(20, 30))
    message = run_error(*command(folders))
    assert message == f"{photos}/a.jpg and {photos}/a.png differ in their suffix only: " + (
        "which one is meant?"
    )
    assert not output.exists()
    (annotations / "a.png").unlink()  # without an annotation it does not matter
    assert run(*command(folders)).code == 0


def test_outputs_do_not_meet(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos, annotations, output = folders
    before = (annotations / "a.png").read_bytes()
    message = run_error(*command((photos, annotations, annotations)))
    assert message == f"cannot write {annotations}/a.png: it is one of the inputs"
    assert (annotations / "a.png").read_bytes() == before
    for option in ("--overlay", "--labels"):
        message = run_error(*command(folders), option, output)
        assert message == f"cannot write {output}/a.png: named for two outputs"
    assert os.listdir(output) == []
    file = tmp_path / "file"
    file.touch()
    assert run_error(*command((photos, annotations, file))) == f"cannot write {file}: File exists"


def test_an_unpaired_input_is_safe_too(folders: tuple[Path, Path, Path]) -> None:
    """The result for the annotation of a photo must not replace another photo."""
    photos, annotations, _ = folders
    (photos / "other.png").symlink_to(photos / "b.PNG")
    (annotations / "out").mkdir()
    (annotations / "out" / "a.png").symlink_to(photos / "other.png")
    message = run_error(*command((photos, annotations, annotations / "out")))
    assert message.endswith("a.png: it is one of the inputs")


def test_progress_on_a_terminal(folders: tuple[Path, Path, Path]) -> None:
    """On a terminal there is a bar with the count and the pictures per second."""
    shown, _ = run_on_terminal(*command(folders))
    assert "3/3" in shown and "pictures/s" in shown and "\x1b[" in shown
