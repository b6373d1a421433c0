# SPDX-License-Identifier: Apache-2.0
"""What `pydense predict` does."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _labelmaps, _output
from ._errors import CommandError, UsageError, printable, reason
from ._legends import LEGENDS, Legend
from ._memory import require_memory
from ._palette import blend
from ._pictures import read_image
from ._predict_files import Frame, plan

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from pydense.checkpoints import Preprocessing, Report
    from pydense.models import SegmentationModel


@dataclass(frozen=True)
class Network:
    """A model with its weights, and what belongs to them."""

    model: SegmentationModel
    preprocessing: Preprocessing
    legend: Legend | None
    description: str

    @property
    def classes(self) -> int:
        """Number of labels."""
        return self.model.num_classes


def predict(arguments: argparse.Namespace) -> int:
    """Label all pictures; one that fails is reported and the others go on.

    Returns:
        0 when all went well, 1 when at least one picture failed.
    """
    frames = plan(arguments)
    network = build(arguments)
    if not arguments.quiet:
        print(network.description)
    if arguments.legend:
        names = network.legend.names if network.legend else None
        names = names or tuple(f"class {i}" for i in range(network.classes))
        colors = _labelmaps.colors_of(network.legend, network.classes)
        with _output.Outputs() as outputs:
            first = network.legend.first if network.legend else 0
            picture = _labelmaps.draw_legend(names, colors, first)
            outputs.write(arguments.legend, _output.picture_writer(arguments.legend, picture))
    return _work(frames, network, arguments)


# ---- the network ----


def build(arguments: argparse.Namespace) -> Network:
    """The model with its weights.

    The keys and shapes of the file are compared with the model's before there is memory for any:
    what a file says of itself cannot make the model larger than the file.

    Raises:
        CommandError: A checkpoint that cannot be read or does not fit, preprocessing not known.
        UsageError: A model, a label set or preprocessing that does not exist, or not given.
    """
    import torch

    from pydense import checkpoints, models
    from pydense.nn import CRFasRNN

    try:
        tensors, about = checkpoints.read(arguments.checkpoint)
    except checkpoints.CheckpointError as error:
        raise CommandError(printable(str(error))) from None
    name = arguments.model or about.model
    if not name:
        raise UsageError("--model must be given: the checkpoint does not say which it is for")
    if name not in models.list_models():
        raise UsageError(
            f"--model must be one of {', '.join(models.list_models())}, got {printable(name)}"
        )
    if about.model and about.model != name:
        raise UsageError(f"--model is {name}, but the checkpoint is of {printable(about.model)}")
    labels = arguments.labels or about.labels
    if labels and labels not in LEGENDS:
        raise CommandError(f"the checkpoint has unknown labels: {printable(labels)}")
    legend = LEGENDS[labels] if labels else None
    options = dict(about.options) | _given_options(arguments.option)
    if arguments.classes or (legend and "num_classes" not in options):
        options["num_classes"] = arguments.classes or len(legend.names)  # type: ignore[union-attr]
    if "features_only" in options:
        raise CommandError("networks with the option features_only label nothing")
    try:
        with torch.device("meta"):
            draft = models.get_model(name, **options)
    except Exception as error:  # options come from the file: any value may stand there
        raise CommandError(f"{name} cannot be built: {reason(error)}") from None
    if arguments.crf and any(isinstance(module, CRFasRNN) for module in draft.modules()):
        raise UsageError(f"--crf: {name} ends in a CRF of its own, which is always run")
    try:
        report, _ = checkpoints.plan(draft, tensors, format=arguments.format)
        report.about = about
        if not report.complete:
            text = f"the checkpoint does not fit {name}: {report}"
            if report.options:
                text += f"\n{_other_options(report)}"
            raise CommandError(text.replace("\n", "; "))
        _require_all_weights(name, report)
        preprocessing = _preprocessing(arguments.preprocess, about, report, arguments.format)
        model = models.get_model(name, **options)
        checkpoints.load(model, tensors, format=report.format)
    except checkpoints.CheckpointError as error:
        raise CommandError(printable(str(error)).replace("\\n", "; ")) from None
    except (TypeError, ValueError) as error:
        raise CommandError(f"{name} cannot be built: {reason(error)}") from None
    if legend is not None and len(legend.names) != model.num_classes:
        raise CommandError(
            f"{labels} has {len(legend.names)} labels, but the network {model.num_classes} classes"
        )
    try:
        model = model.eval().to(arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {arguments.device}: {reason(error)}") from None
    first, *rest = str(report).splitlines()
    if report.source and preprocessing == report.preprocessing:
        rest.append(f"input as in {report.source}")
    if report.options:
        rest.append(_other_options(report))
    lines = [f"{name}: {first}; input {preprocessing}", *(f"  {line}" for line in rest)]
    text = "\n".join(printable(line) for line in lines)
    return Network(model, checkpoints.PREPROCESSING[preprocessing], legend, text)


def _given_options(rows: list[str]) -> dict[str, Any]:
    from pydense.checkpoints._files import parse_option

    try:
        return dict(parse_option(row) for row in rows)
    except ValueError as error:
        raise UsageError(f"--option {printable(str(error))}") from None


def _other_options(report: Report) -> str:
    """How to give the network the options that the checkpoint's has."""
    rows = (f"{key}={str(value).lower()}" for key, value in report.options.items())
    return "give " + " ".join(f"--option {row}" for row in rows)


def _require_all_weights(name: str, report: Report) -> None:
    """An error for formats that begin a training: they leave the head as the constructor made it.

    Raises:
        CommandError: Weights of the network that the checkpoint has not.
    """
    left = [key for key in report.kept if not key.endswith("num_batches_tracked")]
    if left:
        more = f", and {len(left) - 8} more" if len(left) > 8 else ""
        raise CommandError(
            f"checkpoints of {report.format} only begin a training of {name}, they have no weights "
            f"for {', '.join(left[:8])}{more}"
        )


def _preprocessing(given: str | None, about: Any, report: Any, format: str | None) -> str:
    from pydense.checkpoints import PREPROCESSING

    known = ", ".join(PREPROCESSING)
    if given is not None and given not in PREPROCESSING:
        raise UsageError(f"--preprocess must be one of {known}, got {given}")
    sure = format is not None or not report.equivalent
    chosen = given or about.preprocessing or (report.preprocessing if sure else None)
    if not chosen:
        hint = ""
        if report.preprocessing:
            hint = f" (checkpoints of {report.format}: {report.preprocessing}, or give --format)"
        elif report.source:
            hint = f" ({report.source})"
        raise CommandError(
            "the checkpoint does not say what its network expects of a picture: give --preprocess, "
            f"one of {known}{hint}"
        )
    if chosen not in PREPROCESSING:
        raise CommandError(f"the checkpoint has unknown preprocessing: {printable(chosen)}")
    return str(chosen)


# ---- the work ----


def _work(frames: list[Frame], network: Network, arguments: argparse.Namespace) -> int:
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    from ._folder import _report_failure

    class Speed(progress.ProgressColumn):
        """Frames per second since the start."""

        def render(self, task: progress.Task) -> Text:
            rate = task.completed / task.elapsed if task.elapsed else 0.0
            return Text(f"{rate:.2f} frames/s")

    console = Console(stderr=True, quiet=arguments.quiet)
    scores = _labelmaps.Scores(network.classes) if arguments.truth else None
    failures, inside, begin = 0, 0.0, time.perf_counter()
    with progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        Speed(),
        progress.TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("predict", total=len(frames))

        def fail(rows: list[Frame], error: Exception) -> int:
            known = isinstance(error, (CommandError, UsageError, ValueError))
            text = str(error) if known else f"{type(error).__name__}: {reason(error)}"
            for frame in rows:
                _report_failure(frame.image, printable(text), console)
            bar.advance(task, len(rows))
            return len(rows)

        for rows, images, error in _batches(frames, arguments):
            if error is not None:
                failures += fail(rows, error)
                continue
            try:
                start = time.perf_counter()
                labels = _labels(network, images, arguments)
                inside += time.perf_counter() - start
            except Exception as caught:  # whatever it is, it is these pictures': go on
                failures += fail(rows, caught)
                continue
            for frame, image, found in zip(rows, images, labels, strict=True):
                try:
                    _write(frame, image, found, network, arguments, scores)
                    bar.advance(task)
                except Exception as caught:
                    failures += fail([frame], caught)
    seconds, done = time.perf_counter() - begin, len(frames) - failures
    if not arguments.quiet:
        print(
            f"labelled {done} of {len(frames)} pictures in {seconds:.1f} s: "
            f"{done / max(seconds, 1e-9):.2f} frames/s, the network alone "
            f"{done / max(inside, 1e-9):.2f} frames/s; {failures} failed"
        )
    if scores is not None and scores.pictures:
        for line in scores.lines(network.legend.names if network.legend else None):
            print(line)
    return 1 if failures else 0


def _batches(
    frames: list[Frame], arguments: argparse.Namespace
) -> Iterator[tuple[list[Frame], list[NDArray[np.uint8]], Exception | None]]:
    """Pictures of equal size in a row, up to a batch; those that cannot be read, with the error."""
    rows: list[Frame] = []
    images: list[NDArray[np.uint8]] = []
    for frame in frames:
        try:
            image = read_image(frame.image, max_pixels=arguments.max_pixels)
        except Exception as error:
            yield [frame], [], error
            continue
        if rows and (len(rows) == arguments.batch or image.shape != images[0].shape):
            yield rows, images, None
            rows, images = [], []
        rows, images = [*rows, frame], [*images, image]
    if rows:
        yield rows, images, None


def _labels(
    network: Network, images: list[NDArray[np.uint8]], arguments: argparse.Namespace
) -> NDArray[np.integer]:
    """(N, H, W)."""
    import numpy as np
    import torch

    from pydense.models import average_logits, predict_labels

    pixels = torch.from_numpy(np.stack(images))
    x = network.preprocessing(pixels).contiguous().to(arguments.device)
    how: dict[str, Any] = {"scales": arguments.scales, "flip": arguments.flip}
    found: torch.Tensor
    crf = getattr(network.model, "crf", None)
    if crf is None and not arguments.crf:
        dtype = torch.uint8 if network.classes <= 256 else torch.int64
        found = predict_labels(network.model, x, dtype=dtype, **how)
    else:
        from pydense.nn import DenseCRF

        require_memory(pixels.shape[1] * pixels.shape[2], network.classes)
        logits = average_logits(network.model, x, **how).cpu()
        crf = DenseCRF(iterations=5) if crf is None else crf.cpu()  # where the logits are
        with torch.no_grad():
            found = crf(logits, pixels.permute(0, 3, 1, 2)).argmax(1)
    labels: NDArray[np.integer] = found.cpu().numpy()
    return labels


def _write(
    frame: Frame,
    image: NDArray[np.uint8],
    labels: NDArray[np.integer],
    network: Network,
    arguments: argparse.Namespace,
    scores: _labelmaps.Scores | None,
) -> None:
    colors = _labelmaps.colors_of(network.legend, network.classes)
    truth = None
    if scores is not None and frame.truth is not None:
        size = (labels.shape[0], labels.shape[1])
        truth = _labelmaps.read_truth(
            frame.truth, size, network.legend, network.classes, arguments.max_pixels
        )
    with _output.Outputs() as outputs:
        outputs.write(frame.output, _labelmaps.writer(labels, colors, network.legend))
        if frame.overlay:
            mixed = blend(image, colors[labels], arguments.overlay_opacity)
            outputs.write(frame.overlay, _output.picture_writer(frame.overlay, mixed))
    if scores is not None and truth is not None:
        scores.add(truth, labels)
