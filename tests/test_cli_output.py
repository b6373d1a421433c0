# SPDX-License-Identifier: Apache-2.0
"""`pydense refine`: outputs are whole or absent, and inputs are never overwritten."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from _cli import load, rough_labels, run, run_error, run_ok, save, scene

from pydense.cli import _inference, _output


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    (tmp_path / "out").mkdir()
    image = save(tmp_path / "image.png", scene())
    annotation = save(tmp_path / "labels.png", rough_labels())
    return image, annotation, tmp_path / "out" / "out.png"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when the CRF is run: outputs are to be checked before."""

    def refine(*_: object) -> None:
        raise AssertionError("computed before the outputs were checked")

    monkeypatch.setattr(_inference, "refine", refine)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("option", ["--output", "--overlay", "--labels"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["same", "other name", "symbolic link", "hard link"])
def test_inputs_are_never_overwritten(
    files: tuple[Path, Path, Path], option: str, victim: int, how: str
) -> None:
    image, annotation, output = files
    before = files[victim].read_bytes()
    target = output.with_name("target.png")
    if how == "symbolic link":
        target.symlink_to(files[victim])
    elif how == "hard link":
        target.hardlink_to(files[victim])
    elif how == "same":
        target = files[victim]
    else:
        target = files[victim].parent / "out" / ".." / files[victim].name
    outputs = {"--output": output, option: target}
    message = run_error(
        "refine", image, annotation, *(part for pair in outputs.items() for part in pair)
    )
    assert message == f"cannot write {target}: it is one of the inputs"
    assert files[victim].read_bytes() == before


@pytest.mark.usefixtures("no_work")
def test_impossible_outputs_are_found_before_the_work(files: tuple[Path, Path, Path]) -> None:
    image, annotation, output = files
    folder = output.with_name("folder.png")
    folder.mkdir()
    pipe = output.with_name("pipe.png")
    os.mkfifo(pipe)
    lost = output.with_name("lost.png")
    lost.symlink_to(output.parent / "missing" / "file.png")
    cases = {
        output.parent / "missing" / "out.png": "no such folder",
        image / "out.png": "no such folder",
        folder: "not a regular file",
        pipe: "not a regular file",
        lost: "no such folder",
        output.with_name("x" * 300 + ".png"): "",
        output.with_name("nul\0.png"): "",
    }
    for target, message in cases.items():
        assert message in run_error("refine", image, annotation, "-o", target), target
        assert message in run_error(
            "refine", image, annotation, "-o", output, "--overlay", target
        ), target
    message = run_error("refine", image, annotation, "-o", output, "--labels", output)
    assert message == f"cannot write {output}: named for two outputs"
    assert set(output.parent.iterdir()) == {folder, pipe, lost}


@pytest.mark.usefixtures("no_work")
def test_read_only_folder(files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, as these tests may be run by root, whom no permission stops."""
    image, annotation, output = files
    asked = []

    def access(path: str, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)
    message = run_error("refine", image, annotation, "-o", output)
    assert message == f"cannot write {output}: the folder is not writable"
    assert asked == [(str(output.parent.resolve()), os.W_OK | os.X_OK)]


@pytest.mark.parametrize("old", [None, b"precious"])
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_failing_write_leaves_everything_as_it_was(
    files: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    old: bytes | None,
    failing: int,
) -> None:
    """The disk fills up in the middle of one of four files: none of them may change."""
    image, annotation, output = files
    names = ["out.png", "overlay.jpg", "labels.npy", "q.npz"]
    paths = [output.with_name(name) for name in names]
    if old is not None:
        for path in paths:
            path.write_bytes(old)
    write = _output.Outputs.write

    def full_disk(self: _output.Outputs, path: Path, writer: _output.Writer) -> None:
        def half(stream: object) -> None:
            stream.write(b"half of the fi")  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write(self, path, half if path.name == names[failing] else writer)

    monkeypatch.setattr(_output.Outputs, "write", full_disk)
    command = (
        *("refine", image, annotation, "-o", paths[0], "--overlay", paths[1]),
        *("--labels", paths[2], "--probabilities", paths[3]),
    )
    message = run_error(*command)
    assert message == f"cannot write {paths[failing]}: No space left on device"
    left = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    assert left == ({} if old is None else dict.fromkeys(names, old))
    monkeypatch.undo()
    run_ok(*command)
    assert {path.name for path in output.parent.iterdir()} == set(names)
    assert load(paths[0]).shape == load(paths[1]).shape[:2] == np.load(paths[2]).shape


def test_interrupt_while_writing(
    files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, annotation, output = files
    output.write_bytes(b"precious")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.Image.Image.save", interrupt)
    assert run("refine", image, annotation, "-o", output).code == 130
    assert [path.read_bytes() for path in output.parent.iterdir()] == [b"precious"]


def test_old_output_is_replaced_and_keeps_link(files: tuple[Path, Path, Path]) -> None:
    image, annotation, output = files
    real = output.with_name("real.png")
    real.write_bytes(b"old")
    output.symlink_to(real)
    run_ok("refine", image, annotation, "-o", output)
    assert output.is_symlink()
    assert load(real).shape == (24, 32)


def test_output_honours_the_umask(files: tuple[Path, Path, Path]) -> None:
    image, annotation, output = files
    before = os.umask(0o027)
    try:
        run_ok("refine", image, annotation, "-o", output)
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == 0o640


def test_failure_while_renaming(tmp_path: Path) -> None:
    """What was staged disappears when the rename fails (the folder was removed meanwhile)."""
    folder = tmp_path / "gone.png"
    with (
        pytest.raises(Exception, match=r"cannot write .*gone\.png"),
        _output.Outputs() as outputs,
    ):
        outputs.write(folder, lambda stream: stream.flush())
        folder.mkdir()
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == [folder]
