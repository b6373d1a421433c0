# SPDX-License-Identifier: Apache-2.0
"""Helpers of the test_cli_* files: run the command in this process, make small pictures."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import pydense
from pydense.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: Any) -> Result:
    """Run `pydense ARGUMENTS` through main()."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def run_ok(*arguments: Any) -> Result:
    result = run(*arguments)
    assert (result.code, result.err) == (0, ""), result
    return result


def run_error(*arguments: Any, code: int = 1) -> str:
    """Run a command that must fail cleanly, and return its message."""
    result = run(*arguments)
    assert result.code == code, result
    *usage, message = result.err.splitlines()
    assert code == 2 or not usage, result
    assert message.startswith("pydense: error: "), result
    assert "internal error" not in message
    assert "Traceback" not in result.err
    return message.removeprefix("pydense: error: ")


def run_on_terminal(*arguments: Any) -> tuple[str, str]:
    """Run the command with a terminal as its stderr: what is shown there, and its output."""
    leader, follower = os.openpty()
    program = (sys.executable, "-m", "pydense.cli", *(str(part) for part in arguments))
    package = Path(pydense.__file__).resolve().parent.parent
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(package)}
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:  # the other side is closed
                break
            if not data:
                break
            shown += data
        assert process.stdout is not None
        printed = process.stdout.read()
        assert process.wait() == 0, shown
    os.close(leader)
    return shown.decode(), printed.decode()


def scene(height: int = 24, width: int = 32) -> np.ndarray:
    """A photo-like uint8 (H, W, 3): a bright disc on a dark ground, with noise."""
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[:height, :width]
    disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2
    image = np.where(disc[..., None], (200, 170, 60), (40, 70, 110))
    return (image + rng.integers(-12, 13, image.shape)).astype(np.uint8)


def rough_labels(height: int = 24, width: int = 32) -> np.ndarray:
    """A rough annotation of `scene`, uint8 (H, W): 0 ground, 1 disc, 255 unknown between them."""
    labels = np.full((height, width), 255, np.uint8)
    labels[:3], labels[-3:], labels[:, :6], labels[:, -6:] = 0, 0, 0, 0
    middle = slice(height // 2 - 3, height // 2 + 3), slice(width // 2 - 3, width // 2 + 3)
    labels[middle] = 1
    return labels


def save(path: Path, array: np.ndarray, **options: Any) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def load(path: Path, mode: str | None = None) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture if mode is None else picture.convert(mode))


def save_palette(path: Path, indices: np.ndarray, palette: np.ndarray, **options: Any) -> Path:
    picture = Image.fromarray(indices)
    picture.putpalette(palette.astype(np.uint8).tobytes(), "RGB")
    assert picture.mode == "P"
    picture.save(path, **options)
    return path
