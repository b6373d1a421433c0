# SPDX-License-Identifier: Apache-2.0
"""Which pictures `pydense predict` reads, and where their labels go."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from . import _output
from ._errors import CommandError, UsageError, printable, reason
from ._pictures import SUFFIXES

_FILES = frozenset((*SUFFIXES, *_output.OVERLAY_SUFFIXES, *_output.PROBABILITY_SUFFIXES))
_NUMBER = re.compile(r"%(0?)(\d*)d")


@dataclass(frozen=True)
class Frame:
    """One picture: what to read and what to write."""

    image: Path
    output: Path
    overlay: Path | None
    truth: Path | None

    @property
    def outputs(self) -> list[Path]:
        """All files to write."""
        return [path for path in (self.output, self.overlay) if path is not None]


def plan(arguments: argparse.Namespace) -> list[Frame]:
    """All pictures with their outputs, checked to be writable.

    Raises:
        CommandError: No picture, an output that cannot be written, names that meet.
        UsageError: A file named as the output of several pictures.
    """
    images = [path for given in arguments.inputs for path in _pictures(given)]
    single = len(arguments.inputs) == 1 and images == arguments.inputs
    legend: list[Path] = []
    if arguments.legend:
        _output.check_suffix(arguments.legend, (".png",), "--legend")
        legend = [arguments.legend]
    frames = []
    for image in images:
        places = [
            _place(path, image, single, option)
            for path, option in (
                (arguments.output, "--output"),
                (arguments.overlay, "--overlay"),
            )
        ]
        assert places[0] is not None
        frames.append(Frame(image, places[0], places[1], _truth(arguments.truth, image, single)))
    truths = [frame.truth for frame in frames if frame.truth]
    _output.check_outputs(
        [*legend, *(path for frame in frames for path in frame.outputs)],
        [*images, *truths, arguments.checkpoint],
    )
    return frames


def _pictures(given: Path) -> list[Path]:
    """The pictures that an argument names."""
    try:
        if given.is_dir():
            rows = sorted(given.iterdir())
            found = [p for p in rows if p.suffix.lower() in SUFFIXES and p.name[:1] != "."]
            if not found:
                raise CommandError(f"{printable(given)} holds no picture")
            return found
        place = _NUMBER.search(given.name)
        if place is None or given.exists():
            return [given]
        digits = rf"\d{{{place[2]},}}" if place[1] and place[2] else r"\d+"
        before, after = given.name[: place.start()], given.name[place.end() :]
        pattern = re.compile(f"{re.escape(before)}({digits}){re.escape(after)}")
        matches = ((pattern.fullmatch(path.name), path) for path in given.parent.iterdir())
        numbered = sorted((int(found[1]), path) for found, path in matches if found)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {printable(given)}: {reason(error)}") from None
    if not numbered:
        raise CommandError(f"no frame is called {printable(given)}")
    return [path for _, path in numbered]


def _place(path: Path | None, image: Path, single: bool, option: str) -> Path | None:
    if path is None:
        return None
    suffixes = (".png",) if option == "--output" else _output.OVERLAY_SUFFIXES
    if path.suffix.lower() in suffixes and not path.is_dir():
        if not single:
            raise UsageError(f"{option} must be a folder for more than one picture")
        return path
    if path.suffix.lower() in _FILES and not path.is_dir():
        raise UsageError(
            f"{option} must end in {' or '.join(suffixes)} or be a folder, got "
            f"{printable(path.name)}"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {printable(path)}: {reason(error)}") from None
    return path / f"{image.stem}.png"


def _truth(path: Path | None, image: Path, single: bool) -> Path | None:
    if path is None:
        return None
    if path.is_dir():
        return path / f"{image.stem}.png"
    if not single:
        raise UsageError("--truth must be a folder for more than one picture")
    return path
