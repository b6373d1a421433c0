# SPDX-License-Identifier: Apache-2.0
"""`pydense refine`: the refinement of one picture. Options: `_options`; folders: `_folder`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _options
from ._errors import UsageError, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ._annotations import Annotation, AnnotationOptions
    from ._inference import Parameters
    from ._output import Outputs


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command and its options."""
    _options.add_parser(commands).set_defaults(run=run)


@dataclass(frozen=True)
class Job:
    """One picture to refine: what to read and what to write."""

    image: Path
    annotation: Path
    output: Path
    overlay: Path | None = None
    labels: Path | None = None
    probabilities: Path | None = None

    @property
    def outputs(self) -> list[Path]:
        """All files to write."""
        paths = (self.output, self.overlay, self.labels, self.probabilities)
        return [path for path in paths if path is not None]


@dataclass(frozen=True)
class Settings:
    """The options that are the same for every picture."""

    reading: AnnotationOptions
    parameters: Parameters
    opacity: float


@dataclass(frozen=True)
class Outcome:
    """What to tell about a refined picture; `seconds` is the CRF alone, without files."""

    width: int
    height: int
    description: str
    seconds: float


def run(arguments: argparse.Namespace) -> int:
    """Run `pydense refine`."""
    settings = _settings(arguments)
    single = (arguments.image, arguments.annotation)
    folders = (arguments.input_dir, arguments.annotation_dir)
    if all(single) and not any(folders):
        with limited_threads(arguments.threads):
            return _run_single(arguments, settings)
    if all(folders) and not any(single):
        from ._folder import run_folder

        with limited_threads(arguments.threads):
            return run_folder(arguments, settings)
    raise UsageError("give either IMAGE and ANNOTATION, or --input-dir and --annotation-dir")


def _settings(arguments: argparse.Namespace) -> Settings:
    from ._annotations import AnnotationOptions
    from ._inference import Parameters

    return Settings(
        reading=AnnotationOptions(
            form=arguments.annotation_format,
            unknown=arguments.unknown,
            key=arguments.key,
            max_pixels=arguments.max_pixels,
            orient=not arguments.ignore_orientation,
        ),
        parameters=Parameters(
            gaussian_sxy=arguments.gaussian_sxy,
            gaussian_compat=arguments.gaussian_compat,
            bilateral_sxy=arguments.bilateral_sxy,
            bilateral_srgb=arguments.bilateral_srgb,
            bilateral_compat=arguments.bilateral_compat,
            iterations=arguments.iterations,
            normalization=arguments.normalization,
            gt_prob=arguments.gt_prob,
        ),
        opacity=arguments.overlay_opacity,
    )


def _run_single(arguments: argparse.Namespace, settings: Settings) -> int:
    from . import _output

    job = Job(
        image=arguments.image,
        annotation=arguments.annotation,
        output=arguments.output,
        overlay=arguments.overlay,
        labels=arguments.labels,
        probabilities=arguments.probabilities,
    )
    _output.check_suffix(job.output, (".png",), "--output")
    if job.overlay:
        _output.check_suffix(job.overlay, _output.OVERLAY_SUFFIXES, "--overlay")
    if job.labels:
        _output.check_suffix(job.labels, _output.LABEL_SUFFIXES, "--labels")
    if job.probabilities:
        _output.check_suffix(job.probabilities, _output.PROBABILITY_SUFFIXES, "--probabilities")
    _output.check_outputs(job.outputs, (job.image, job.annotation))
    show = not arguments.quiet
    with _status(f"refining {printable(job.image)}") if show else nullcontext():
        outcome = refine_picture(job, settings)
    if show:
        names = ", ".join(printable(path) for path in job.outputs)
        print(f"annotation: {outcome.description}")
        print(f"image: {outcome.width}x{outcome.height}, refined in {outcome.seconds:.3f} s")
        print(f"wrote {names}")
    return 0


def refine_picture(job: Job, settings: Settings) -> Outcome:
    """Read, refine and write one picture. Its outputs appear together, or none does.

    Raises:
        CommandError: a file that cannot be read or written, or that does not fit the others.
    """
    from ._annotations import read_annotation
    from ._inference import refine
    from ._memory import require_memory
    from ._output import Outputs
    from ._pictures import read_image

    reading = settings.reading
    image = read_image(job.image, max_pixels=reading.max_pixels, orient=reading.orient)
    height, width = image.shape[:2]
    annotation = read_annotation(job.annotation, (height, width), reading)
    require_memory(height * width, len(annotation.ids))
    start = time.perf_counter()
    winners, probabilities = refine(image, annotation, settings.parameters)
    seconds = time.perf_counter() - start
    with Outputs() as outputs:
        write_outputs(outputs, job, image, annotation, winners, probabilities, settings.opacity)
    return Outcome(width, height, annotation.description, seconds)


def write_outputs(
    outputs: Outputs,
    job: Job,
    image: NDArray[np.uint8],
    annotation: Annotation,
    winners: NDArray[np.intp],
    probabilities: NDArray[np.float32],
    opacity: float,
) -> None:
    """Stage all files of one picture; see `_output` for the formats."""
    from . import _output
    from ._palette import blend

    as_colors = annotation.style == "colors"
    outputs.write(job.output, _output.label_writer(annotation, winners, as_colors=as_colors))
    if job.overlay:
        pixels = blend(image, annotation.colors[winners], opacity)
        outputs.write(job.overlay, _output.picture_writer(job.overlay, pixels))
    if job.labels:
        if job.labels.suffix.lower() == ".npy":
            outputs.write(job.labels, _output.ids_writer(annotation, winners))
        else:
            outputs.write(job.labels, _output.label_writer(annotation, winners, as_colors=False))
    if job.probabilities:
        writer = _output.probability_writer(job.probabilities, annotation, probabilities)
        outputs.write(job.probabilities, writer)


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Run with `count` threads and put the number back afterwards (None: leave it)."""
    if count is None:
        yield
        return
    import pydense

    before = pydense.get_num_threads()
    pydense.set_num_threads(count)
    try:
        yield
    finally:
        pydense.set_num_threads(before)


def _status(text: str) -> Any:
    """Show a spinner on a terminal; elsewhere nothing, and rich is not even imported."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(text))
