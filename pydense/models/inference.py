# SPDX-License-Identifier: Apache-2.0
"""Inference over scales, mirror images and sliding windows, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pydense.ops import _crf_arguments as check

from ._base import SegmentationModel

AVERAGES = ("logits", "probabilities")
_MAX_SIZE = 2**31 - 65


@torch.no_grad()
def average_logits(
    model: SegmentationModel,
    x: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    average: str = "logits",
) -> Tensor:
    r"""The mean of what a network makes of a picture at several scales, mirrored, and by windows.

    Each result of the network is added to the sum as it leaves the network, of low resolution
    (:func:`pydense.ops.upsample_accumulate`): upsampled once, straight to the size of the picture,
    where evaluation codes upsample to the scaled size first and then resize. So the only tensor of
    full resolution is the sum.

    Args:
        model: In ``eval()``.
        x: (N, channels, H, W).
        scales: Of the picture (or of each window), bilinear, sizes rounded.
        flip: Also run the mirror image (left and right) of each.
        window: (height, width) of sliding windows, or one number; None for the whole picture. A
            picture smaller than that is one window.
        stride: (y, x) from window to window, or one number; two thirds of ``window`` if left out.
            The last window ends where the picture does.
        average: Of the ``"logits"`` or of the ``"probabilities"`` (softmax).

    Returns:
        (N, num_classes, H, W), float32 (float64 for float64 logits).

    Raises:
        ValueError: A number or word out of range.
        TypeError: An argument of the wrong type.
    """
    run = _Run(model, scales, flip, average)
    total: Tensor | None = None
    windows = _windows(x.shape[2], x.shape[3], window, stride)
    for top, height in windows[0]:
        for left, width in windows[1]:
            total = run.add(total, x, (top, left, height, width), (0, x.shape[2]))
    assert total is not None
    return total.div_(_counts(x, windows) * run.runs)


@torch.no_grad()
def predict_labels(
    model: SegmentationModel,
    x: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    average: str = "logits",
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """The labels of :func:`average_logits`, in the memory of one row of windows.

    Windows go from top to bottom. Sums are kept for the rows that the windows of one height cover,
    not for the picture: rows that no later window reaches become labels.

    Args:
        model: In ``eval()``.
        x: (N, channels, H, W).
        scales: As there.
        flip: As there.
        window: As there; None needs sums of the whole picture, or none where ``scales`` is (1,) and
            ``flip`` False: then it is ``model.predict``.
        stride: As there.
        average: As there.
        dtype: Of the labels, see :func:`pydense.ops.upsample_argmax`.

    Returns:
        (N, H, W) labels: those of :func:`average_logits` but for ties and rounding.

    Raises:
        ValueError: A number or word out of range.
        TypeError: An argument of the wrong type.

    Memory: N * num_classes * (height of a window) * W sums in float32, twice between two rows of
    windows, and what the network needs for one window.
    """
    run = _Run(model, scales, flip, average)
    rows, columns = _windows(x.shape[2], x.shape[3], window, stride)
    if window is None and tuple(run.scales) == (1.0,) and not flip:
        found: Tensor = model.predict(x, dtype=dtype)
        return found
    height, width = x.shape[2], x.shape[3]
    labels = torch.empty((x.shape[0], height, width), dtype=dtype, device=x.device)
    band: Tensor | None = None
    for index, (top, size) in enumerate(rows):
        if band is not None:
            # Rows that both windows cover are the first of the new band.
            kept = rows[index - 1][0] + size - top
            band = torch.cat([band[:, :, size - kept :], torch.zeros_like(band[:, :, kept:])], 2)
        for left, extent in columns:
            band = run.add(band, x, (top, left, size, extent), (top, size))
        assert band is not None
        end = rows[index + 1][0] if index + 1 < len(rows) else height
        # Sums are as good as means: how many windows cover a pixel is the same for all classes.
        done = band[:, :, : end - top]
        labels[:, top:end] = model.operators.upsample_argmax(done, (end - top, width), dtype=dtype)
    return labels


class _Run:
    """How often a window is run, and where its results go."""

    def __init__(
        self, model: SegmentationModel, scales: Sequence[float], flip: bool, average: str
    ) -> None:
        op = "inference"
        row = check.sequence(op, "scales", scales, "numbers")
        self.scales = [float(check.any_scales(op, "scales", scale)) for scale in row]  # type: ignore[arg-type]
        if not self.scales:
            raise ValueError(f"{op}: scales must not be empty, got {scales!r}")
        check.flag(op, "flip", flip)
        check.choice(op, "average", average, AVERAGES)
        self.model, self.flip, self.average = model, flip, average
        self.runs = len(self.scales) * (2 if flip else 1)

    def add(
        self,
        total: Tensor | None,
        x: Tensor,
        box: tuple[int, int, int, int],
        rows: tuple[int, int],
    ) -> Tensor:
        """Adds all runs of one window (top, left, height, width).

        Args:
            total: Sums of the rows (first, count), or None.
            x: The whole picture.
            box: The window.
            rows: First row and number of rows of ``total``.
        """
        top, left, height, width = box
        operators = self.model.operators
        part = x[:, :, top : top + height, left : left + width]
        for scores, align_corners in self._results(part):
            if total is None:
                dtype = torch.promote_types(scores.dtype, torch.float32)
                shape = (x.shape[0], scores.shape[1], rows[1], x.shape[3])
                total = torch.zeros(shape, dtype=dtype, device=x.device)
            operators.upsample_accumulate(
                total, scores, top - rows[0], left, (height, width), align_corners
            )
        assert total is not None
        return total

    def _results(self, part: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """What the network makes of a window: low-resolution maps that cover it, and how."""
        model, size = self.model, (part.shape[2], part.shape[3])
        for scale in self.scales:
            wanted = tuple(max(1, round(n * scale)) for n in size)
            scaled = part
            if wanted != size:
                scaled = model.operators.upsample_bilinear(part, wanted)
            for mirrored in (False, True) if self.flip else (False,):
                seen = scaled.flip(3) if mirrored else scaled
                low = model.forward_low(seen)
                seen_size = (seen.shape[2], seen.shape[3])
                frame = model.frame(low, seen_size)
                align_corners = frame.align_corners
                if frame.offset is not None:
                    low, align_corners = model.upsample(low, seen_size), False
                if mirrored:
                    low = low.flip(3)
                if self.average == "probabilities":
                    low = model.operators.upsample_softmax(low, size, align_corners)
                yield low, align_corners


def _pair(name: str, value: Any) -> tuple[int, int]:
    row = value if isinstance(value, (list, tuple)) else (value, value)
    if len(row) != 2:
        raise ValueError(f"inference: {name} must be a number or (y, x), got {value!r}")
    y, x = (check.integer("inference", name, n, 1, _MAX_SIZE) for n in row)
    return y, x


def _windows(height: int, width: int, window: Any, stride: Any) -> list[list[tuple[int, int]]]:
    """(first, size) of the windows along y and x."""
    if window is None:
        if stride is not None:
            raise ValueError(f"inference: stride must be None without window, got {stride!r}")
        return [[(0, height)], [(0, width)]]
    sizes = _pair("window", window)
    steps = tuple(max(1, n * 2 // 3) for n in sizes) if stride is None else _pair("stride", stride)
    found = []
    for length, size, step in zip((height, width), sizes, steps, strict=True):
        if step > size:
            raise ValueError(
                f"inference: stride must be at most window = {size} to miss no pixel, got {step}"
            )
        inside = min(length, size)
        starts = [*range(0, length - inside, step), length - inside]
        found.append([(start, inside) for start in starts])
    return found


def _counts(x: Tensor, windows: list[list[tuple[int, int]]]) -> Tensor:
    """How many windows cover each pixel, (H, W)."""
    rows, columns = (
        _covered(row, length, x) for row, length in zip(windows, x.shape[2:], strict=True)
    )
    return rows[:, None] * columns


def _covered(row: list[tuple[int, int]], length: int, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = torch.zeros(length, dtype=dtype, device=x.device)
    for first, size in row:
        count[first : first + size] += 1
    return count
