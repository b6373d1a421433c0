# SPDX-License-Identifier: Apache-2.0
"""`pydense refine --input-dir`: all pictures of a folder, one after another, failures aside."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import _arrays, _output, _pictures
from ._errors import CommandError, UsageError, printable, reason

if TYPE_CHECKING:
    from rich.console import Console

    from ._refine import Job, Settings


def run_folder(arguments: argparse.Namespace, settings: Settings) -> int:
    """Refine every photo that has an annotation of the same stem.

    A picture that fails is reported and the others go on.

    Returns:
        0 when all went well, 1 when at least one picture failed.

    Raises:
        CommandError: nothing to do, or the folders cannot be used.
    """
    from rich.console import Console

    jobs, lonely = plan(arguments)
    console = Console(stderr=True, quiet=arguments.quiet)
    if lonely:
        console.print(
            f"left out: {lonely} files without a partner of the same name",
            markup=False,
            highlight=False,
        )
    start = time.perf_counter()
    failures = _work(jobs, settings, console)
    seconds = time.perf_counter() - start
    if not arguments.quiet:
        done = len(jobs) - failures
        print(
            f"refined {done} of {len(jobs)} pictures in {seconds:.1f} s "
            f"({done / max(seconds, 1e-9):.2f} pictures/s), {failures} failed"
        )
    return 1 if failures else 0


def _work(jobs: list[Job], settings: Settings, console: Console) -> int:
    """Refine all; return how many failed."""
    from rich import progress
    from rich.text import Text

    from ._refine import refine_picture

    class Speed(progress.ProgressColumn):
        """Pictures per second since the start."""

        def render(self, task: progress.Task) -> Text:
            rate = task.completed / task.elapsed if task.elapsed else 0.0
            return Text(f"{rate:.2f} pictures/s")

    failures = 0
    with progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Speed(),
        progress.TimeRemainingColumn(),
        console=console,
        # Lines that others print while the bar is drawn stay as they are written.
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task("refine", total=len(jobs))
        for job in jobs:
            try:
                refine_picture(job, settings)
            except Exception as error:  # whatever it is, it is this picture's: go on
                failures += 1
                known = isinstance(error, (CommandError, UsageError))
                text = str(error) if known else f"{type(error).__name__}: {reason(error)}"
                _report_failure(job.image, text, console)
            bar.advance(task)
    return failures


def _report_failure(image: Path, text: str, console: Console) -> None:
    line = f"pydense: error: {printable(image.name)}: {text}"
    if console.quiet:  # errors are printed all the same
        print(line, file=sys.stderr)
    else:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def plan(arguments: argparse.Namespace) -> tuple[list[Job], int]:
    """Pair photos with annotations and make sure that everything can be written.

    Returns:
        The jobs in the order of their names, and how many files have no partner.
    """
    from ._refine import Job

    photos = _by_stem(arguments.input_dir, _pictures.SUFFIXES)
    annotations = _by_stem(arguments.annotation_dir, _pictures.SUFFIXES | _arrays.SUFFIXES)
    stems = sorted(photos.keys() & annotations.keys())
    for paths in (group[stem] for stem in stems for group in (photos, annotations)):
        if len(paths) > 1:
            names = " and ".join(printable(path) for path in paths)
            raise CommandError(f"{names} differ in their suffix only: which one is meant?")
    if not stems:
        raise CommandError(
            f"no picture in {printable(arguments.input_dir)} has an annotation of the same name "
            f"in {printable(arguments.annotation_dir)}"
        )
    folders = (
        arguments.output,
        arguments.overlay,
        arguments.labels,
        arguments.probabilities,
    )
    for folder in folders:
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                raise CommandError(f"cannot write {printable(folder)}: {reason(error)}") from None
    jobs = [
        Job(
            image=photos[stem][0],
            annotation=annotations[stem][0],
            output=arguments.output / f"{stem}.png",
            overlay=arguments.overlay and arguments.overlay / f"{stem}.png",
            labels=arguments.labels and arguments.labels / f"{stem}.png",
            probabilities=arguments.probabilities and arguments.probabilities / f"{stem}.npz",
        )
        for stem in stems
    ]
    groups = [*photos.values(), *annotations.values()]
    inputs = [path for paths in groups for path in paths]
    _output.check_outputs([path for job in jobs for path in job.outputs], inputs)
    return jobs, len(inputs) - 2 * len(stems)


def _by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, list[Path]]:
    """List the files of a folder that end in one of `suffixes`, by stem."""
    found: dict[str, list[Path]] = defaultdict(list)
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                found[path.stem].append(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {printable(folder)}: {reason(error)}") from None
    return dict(found)
