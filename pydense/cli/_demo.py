# SPDX-License-Identifier: Apache-2.0
"""`pydense demo`: a rough annotation of a real photo becomes a sharp segmentation."""

from __future__ import annotations

import argparse
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _options
from ._errors import CommandError, printable, reason

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from ._annotations import Annotation

_PHOTO = "astronaut.png"  # 512x512, ships inside the scikit-image wheel; NASA, public domain
_SIZE = (512, 512)
_ROUNDS = 5
_GT_PROB = 0.9  # the shapes below stay well inside the outlines: trust them more than 0.7

# What a person draws in a minute: a few corners per region, well inside or outside the outlines,
# and nothing where it gets fiddly. Later shapes lie over earlier ones. (colour, corners x, y)
_WALL, _FLAG, _PERSON = (70, 130, 180), (200, 40, 60), (245, 190, 60)
_SHUTTLE, _HELMET, _TABLE = (80, 180, 90), (160, 90, 200), (230, 120, 50)
_SHAPES: tuple[tuple[tuple[int, int, int], tuple[tuple[int, int], ...]], ...] = (
    (
        _WALL,
        ((78, 0), (150, 0), (140, 60), (140, 110), (165, 140), (120, 150), (100, 180), (88, 110)),
    ),
    (
        _WALL,
        ((310, 0), (375, 0), (372, 100), (350, 200), (352, 262), (320, 205), (285, 150), (315, 90)),
    ),
    (_WALL, ((465, 0), (512, 0), (512, 262), (480, 262), (468, 180))),
    (
        _FLAG,
        ((0, 0), (35, 0), (60, 100), (80, 205), (45, 240), (25, 300), (8, 440), (6, 495), (0, 500)),
    ),
    (
        _PERSON,
        (
            *((165, 50), (200, 25), (260, 28), (290, 70), (285, 110), (262, 135), (250, 175)),
            *((280, 190), (298, 240), (285, 282), (322, 262), (352, 335), (300, 370), (265, 440)),
            *((262, 512), (130, 512), (32, 505), (28, 415), (60, 290), (122, 245), (120, 190)),
            *((190, 160), (185, 130), (160, 95)),
        ),
    ),
    (
        _SHUTTLE,
        (
            *((405, 10), (425, 10), (432, 60), (450, 60), (453, 240), (462, 270), (450, 280)),
            *((375, 280), (372, 250), (365, 222), (385, 120), (385, 60), (400, 60)),
        ),
    ),
    (
        _HELMET,
        (
            *((300, 420), (345, 365), (400, 350), (450, 365), (490, 420), (503, 470), (503, 512)),
            *((290, 512), (285, 460)),
        ),
    ),
    (_TABLE, ((374, 296), (505, 290), (508, 440), (480, 380), (440, 350), (374, 338))),
)


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="refine a rough annotation of a photo and show it",
        description="Refine a rough annotation of a photo that ships with scikit-image, write "
        "pictures of before and after, and measure the time; where pydensecrf is "
        "installed, its time and result stand beside.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        default=Path("pydense-demo"),
        help="where the pictures go (default: pydense-demo)",
    )
    parser.add_argument(
        "--threads", metavar="N", type=_options.threads, help="threads (default: all CPUs)"
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Timing:
    """Median seconds of the whole inference, and the marginals it gave."""

    seconds: float
    marginals: NDArray[np.float32]


def run(arguments: argparse.Namespace) -> int:
    """Run `pydense demo`."""
    from ._refine import limited_threads

    with limited_threads(arguments.threads):
        return _run(arguments.output_dir)


def _run(folder: Path) -> int:
    import pydense

    from ._inference import unary_energy

    photo = _photo_path()
    paths = _output_paths(folder, photo)
    image, drawing, annotation = prepare(photo)
    unary = unary_energy(annotation, _GT_PROB)
    rival, rival_version = _pydensecrf()
    own, other = measure(image, unary, rival)
    winners = own.marginals.argmax(axis=0)
    caption = f"refined by pydense in {1000 * own.seconds:.0f} ms"
    _write_pictures(paths, image, drawing, annotation, winners, caption)
    _print_report(image, annotation, own, other, rival_version, pydense.get_num_threads())
    print(f"pictures in {printable(folder)}: {', '.join(path.name for path in paths.values())}")
    photo_name, drawing_name = (
        shlex.quote(printable(paths[name])) for name in ("photo", "annotation")
    )
    print(
        f"the same by hand: pydense refine {photo_name} {drawing_name} "
        f"--gt-prob {_GT_PROB} -o refined.png"
    )
    return 0


def _photo_path() -> Path:
    """Find the photo inside the installed scikit-image, without importing it."""
    import importlib.util

    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(
            "the demo's photo ships with scikit-image, which is not installed: "
            "pip install 'pydense[demo]' (or pip install scikit-image)"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / _PHOTO
    if not path.is_file():
        raise CommandError(
            f"the installed scikit-image lacks its picture data/{_PHOTO}: "
            "pip install --force-reinstall scikit-image"
        )
    return path


def _output_paths(folder: Path, photo: Path) -> dict[str, Path]:
    from ._output import check_outputs

    names = ("photo", "annotation", "before", "after", "refined", "side-by-side")
    paths = {name: folder / f"{name}.png" for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {printable(folder)}: {reason(error)}") from None
    check_outputs(paths.values(), (photo,))
    return paths


def prepare(photo: Path) -> tuple[NDArray[np.uint8], Image.Image, Annotation]:
    """Read the photo and draw the annotation.

    Returns:
        The photo (H, W, 3), the annotation as a colour picture (black is unknown), and as read.
    """
    from PIL import Image, ImageDraw

    from ._annotations import AnnotationOptions, from_colors
    from ._pictures import read_image

    image = read_image(photo, max_pixels=1_000_000)
    if image.shape[:2] != _SIZE:
        raise CommandError(f"{printable(photo)} is another picture than expected ({image.shape})")
    drawing = Image.new("RGB", (_SIZE[1], _SIZE[0]))
    pencil = ImageDraw.Draw(drawing)
    for color, corners in _SHAPES:
        pencil.polygon(corners, fill=color)
    return image, drawing, from_colors(drawing, AnnotationOptions())


def measure(
    image: NDArray[np.uint8],
    unary: NDArray[np.float32],
    rival: tuple[ModuleType, ModuleType] | None,
) -> tuple[Timing, Timing | None]:
    """Time the inference (features, lattices, iterations) and that of the rival, in turn.

    Args:
        image: uint8 (H, W, 3).
        unary: float32 (L, H*W).
        rival: the modules densecrf and utils of pydensecrf.

    Returns:
        Median times over the rounds, after one round that does not count.
    """
    from ._inference import Parameters, infer

    candidates: list[tuple[ModuleType, ModuleType] | None] = [None]
    if rival is not None:
        candidates.append(rival)
    seconds: list[list[float]] = [[] for _ in candidates]
    results: list[NDArray[np.float32]] = [infer(image, unary, Parameters(), c) for c in candidates]
    for _ in range(_ROUNDS):
        for times, candidate in zip(seconds, candidates, strict=True):
            start = time.perf_counter()
            infer(image, unary, Parameters(), candidate)
            times.append(time.perf_counter() - start)
    timings = [Timing(statistics.median(s), r) for s, r in zip(seconds, results, strict=True)]
    return timings[0], timings[1] if rival is not None else None


def _pydensecrf() -> tuple[tuple[ModuleType, ModuleType] | None, str]:
    """Return the modules of pydensecrf, or None and the reason why it cannot be compared."""
    import importlib
    import importlib.util

    if importlib.util.find_spec("pydensecrf") is None:
        return None, "not installed"
    try:
        crf = importlib.import_module("pydensecrf.densecrf")
        utils = importlib.import_module("pydensecrf.utils")
    except Exception as error:  # a binary built for another NumPy or Python fails in many ways
        return None, f"cannot be imported: {reason(error)}"
    return (crf, utils), ""


def _write_pictures(
    paths: dict[str, Path],
    image: NDArray[np.uint8],
    drawing: Image.Image,
    annotation: Annotation,
    winners: NDArray[np.intp],
    caption: str,
) -> None:
    import numpy as np

    from ._output import Outputs, picture_writer
    from ._palette import blend, draw_borders

    rough = np.asarray(drawing)
    known = rough.any(axis=2, keepdims=True)
    before = np.where(known, blend(image, rough, 0.6), image)
    refined = annotation.colors[winners]
    after = draw_borders(blend(image, refined, 0.6), winners, (255, 255, 255))
    panels = [
        ("photo", image),
        ("annotation, drawn by hand", before),
        (caption, after),
    ]
    wide = np.concatenate([_captioned(pixels, text) for text, pixels in panels], axis=1)
    pictures = {
        "photo": image,
        "annotation": rough,
        "before": before,
        "after": after,
        "refined": refined,
        "side-by-side": wide,
    }
    with Outputs() as outputs:
        for name, pixels in pictures.items():
            outputs.write(paths[name], picture_writer(paths[name], pixels))


def _captioned(pixels: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """Put a line of text above a picture and a thin margin around it."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    height, width = pixels.shape[:2]
    margin, strip = 6, 30
    panel = Image.new("RGB", (width + 2 * margin, height + strip + margin), (255, 255, 255))
    font = ImageFont.load_default(18)
    ImageDraw.Draw(panel).text((margin, 4), text, fill=(20, 20, 20), font=font)
    panel.paste(Image.fromarray(pixels), (margin, strip))
    return np.asarray(panel)


def _print_report(
    image: NDArray[np.uint8],
    annotation: Annotation,
    own: Timing,
    other: Timing | None,
    why_not: str,
    threads: int,
) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from ._inference import Parameters

    height, width = image.shape[:2]
    iterations = Parameters().iterations
    table = Table(
        title=f"dense CRF, {width}x{height}, {len(annotation.ids)} labels",
        caption=f"median of {_ROUNDS} runs",
        min_width=45,
    )
    table.add_column(f"features, lattices, {iterations} iterations", no_wrap=True)
    table.add_column("threads", justify="right")
    table.add_column("time", justify="right")
    table.add_row("pydense", str(threads), f"{1000 * own.seconds:.1f} ms")
    if other is not None:
        table.add_row("pydensecrf", "1", f"{1000 * other.seconds:.1f} ms")
    console = Console()
    console.print(table)
    if other is None:
        print(f"pydensecrf: {why_not}, no comparison")
        return
    difference = float(np.abs(own.marginals - other.marginals).max())
    pixels = int((own.marginals.argmax(axis=0) != other.marginals.argmax(axis=0)).sum())
    print(
        f"pydense is {other.seconds / own.seconds:.1f} times as fast as pydensecrf; "
        f"largest difference of a probability {difference:.1e}, {pixels} pixels differ"
    )
