# SPDX-License-Identifier: Apache-2.0
"""Label maps: writing them with a palette, reading true ones, comparing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import CommandError, printable
from ._legends import Legend
from ._output import Writer
from ._palette import voc_colors
from ._pictures import grey16, open_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


def colors_of(legend: Legend | None, classes: int) -> NDArray[np.uint8]:
    """(classes, 3): the legend's colours, Pascal VOC's without one."""
    import numpy as np

    if legend is None:
        return voc_colors(np.arange(classes))
    return np.array(legend.colors, dtype=np.uint8)


def writer(
    labels: NDArray[np.integer], colors: NDArray[np.uint8], legend: Legend | None = None
) -> Writer:
    """A palette PNG of indices; 16-bit grey for more than 256.

    Indices are those of the legend's own maps, as :func:`read_truth` reads them: ADE20K counts its
    classes from 1.
    """
    import numpy as np
    from PIL import Image

    first = legend.first if legend else 0
    labels = labels.astype(np.int64) + first
    colors = np.concatenate([np.zeros((first, 3), np.uint8), colors])
    if len(colors) > 256:
        wide = Image.fromarray(labels.astype(np.uint16))
        return lambda stream: wide.save(stream, format="PNG")
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(colors.tobytes(), "RGB")
    return lambda stream: picture.save(stream, format="PNG")


def read_truth(
    path: Path, size: tuple[int, int], legend: Legend | None, classes: int, max_pixels: int
) -> NDArray[np.int64]:
    """True labels (H, W) in the order of the logits, -1 where there is no truth.

    Index pictures (palette, grey) and colour pictures in the legend's colours.

    Raises:
        CommandError: Another size; an index or a colour that is no label.
    """
    import numpy as np

    picture = open_picture(path, max_pixels=max_pixels, orient=False)
    name = printable(path)
    if (picture.height, picture.width) != size:
        raise CommandError(
            f"{name} is {picture.width}x{picture.height}, but the picture is {size[1]}x{size[0]}"
        )
    wide = grey16(picture)
    if wide is None and picture.mode not in ("P", "L", "1"):
        return _from_colors(picture, name, legend)
    values = wide if wide is not None else np.asarray(picture)
    found = values.astype(np.int64)
    if wide is None and picture.mode == "L":
        found //= picture.info.get("grey_step", 1)
    void, first = (255, 0) if legend is None else (legend.void, legend.first)
    absent = (found == void) | (found == 255)
    labels = np.where(absent, -1, found - first)
    if labels.max() >= classes or labels[~absent].min(initial=0) < 0:
        wrong = int(found[(labels >= classes) | (~absent & (labels < 0))][0])
        raise CommandError(f"{name} has the index {wrong}, which is none of {classes} labels")
    return labels


def _from_colors(picture: Image.Image, name: str, legend: Legend | None) -> NDArray[np.int64]:
    import numpy as np

    if legend is None:
        raise CommandError(f"{name} is a colour picture: its colours need --labels")
    rgb = np.asarray(picture.convert("RGB")).astype(np.int64)
    code = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
    labels = np.full(code.shape, -2, dtype=np.int64)
    # Backwards: where two classes share a colour (ADE20K's road and skyscraper) the first counts.
    for color in legend.void_colors:
        labels[code == _code(color)] = -1
    for index in reversed(range(len(legend.colors))):
        labels[code == _code(legend.colors[index])] = index
    if (labels == -2).any():
        wrong = int(code[labels == -2][0])
        raise CommandError(f"{name} has the colour #{wrong:06x}, which is none of the labels'")
    return labels


def _code(color: tuple[int, int, int]) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


class Scores:
    """One confusion matrix over all pictures, rows are the truth.

    Args:
        classes: Number of labels.
    """

    def __init__(self, classes: int) -> None:
        import numpy as np

        self.classes, self.pictures = classes, 0
        self.matrix = np.zeros((classes, classes), dtype=np.int64)

    def add(self, truth: NDArray[np.int64], labels: NDArray[np.integer]) -> None:
        """Count a picture; truth below 0 does not."""
        import numpy as np

        known = truth >= 0
        pairs = truth[known] * self.classes + labels[known].astype(np.int64)
        counts = np.bincount(pairs, minlength=self.classes**2)
        self.matrix += counts.reshape(self.classes, self.classes)
        self.pictures += 1

    def lines(self, names: tuple[str, ...] | None) -> list[str]:
        """The report: mean intersection over union, pixel accuracy, each class."""
        import numpy as np

        hits = self.matrix.diagonal()
        truth, union = self.matrix.sum(1), self.matrix.sum(0) + self.matrix.sum(1) - hits
        if not truth.sum():
            return ["no pixel has a true label: nothing to compare"]
        with np.errstate(invalid="ignore"):
            each = hits / union
        lines = [
            f"mIoU {100 * np.nanmean(each):.2f} over {int((union > 0).sum())} classes that were "
            f"found or are true, {100 * each[truth > 0].mean():.2f} over the "
            f"{int((truth > 0).sum())} true ones; pixel accuracy "
            f"{100 * hits.sum() / truth.sum():.2f} ({self.pictures} pictures)"
        ]
        for index in np.flatnonzero(union):
            name = names[index] if names else str(index)
            lines.append(f"  {name:<20} IoU {100 * each[index]:6.2f}")
        return lines


def draw_legend(
    names: tuple[str, ...], colors: NDArray[np.uint8], first: int = 0
) -> NDArray[np.uint8]:
    """A picture of all names and colours, in columns of 25; ``first`` is the first one's index."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font, line, column = ImageFont.load_default(14), 22, 190
    rows = min(len(names), 25)
    columns = -(-len(names) // rows)
    picture = Image.new("RGB", (columns * column + 8, rows * line + 8), (255, 255, 255))
    pencil = ImageDraw.Draw(picture)
    for index, name in enumerate(names):
        x, y = 8 + index // rows * column, 6 + index % rows * line
        red, green, blue = (int(c) for c in colors[index])
        pencil.rectangle((x, y, x + 24, y + line - 6), (red, green, blue), (90, 90, 90))
        pencil.text((x + 32, y), f"{first + index} {name}", (20, 20, 20), font)
    return np.asarray(picture)
