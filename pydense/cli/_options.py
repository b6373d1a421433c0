# SPDX-License-Identifier: Apache-2.0
"""The options of `pydense refine` (imports nothing heavy: every `pydense` run reads this)."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._annotations import Unknown

_DESCRIPTION = """\
Refine a rough annotation of a photo with a dense CRF.

ANNOTATION is one of
  a colour picture    every colour is a label, black is unknown
  a palette picture   every index is a label, 255 is unknown (but if black is in use at
                      an index other than 0 it is read as a colour picture)
  a grey picture      every value is a label, 255 is unknown (65535 in 16-bit pictures)
  .npy or .npz        probabilities, floating point (L, H, W) or (H, W, L); or labels,
                      integers (H, W), where 255 and negative numbers are unknown
Transparent pixels of a colour picture are unknown. The result is written in the style of the
annotation: the same colours, the same palette, or indices with the Pascal VOC palette.

Pictures are PNG, JPEG, BMP, GIF, PPM or WebP. EXIF orientation is respected in all of them, 16-bit
photos are reduced to 8 bits, transparent photos are laid over white."""

_EPILOG = """\
The defaults (Gaussian 3 weight 3, bilateral 80/13 weight 10, 5 iterations, trust 0.7, feature
order row, column, r, g, b) are those of pydensecrf's example inference.py and give its example
results (photos of 320x240) pixel for pixel. The sxy are in pixels: larger photos want larger
ones."""


def add_parser(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Add the command and its options; the caller sets what runs it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "refine",
        help="refine annotations of photos with a dense CRF",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE", nargs="?", type=Path, help="the photo")
    parser.add_argument("annotation", metavar="ANNOTATION", nargs="?", type=Path, help="see above")

    out = parser.add_argument_group("output (in folder mode every FILE is a folder)")
    out.add_argument(
        "-o", "--output", metavar="OUT.png", type=Path, required=True, help="the refined labels"
    )
    out.add_argument("--overlay", metavar="FILE", type=Path, help="the photo blended with them")
    out.add_argument(
        "--overlay-opacity", metavar="X", type=_fraction, default=0.5, help="0..1 (default 0.5)"
    )
    out.add_argument(
        "--labels", metavar="FILE", type=Path, help="the labels as indices, .png (palette) or .npy"
    )
    out.add_argument(
        "--probabilities",
        metavar="FILE",
        type=Path,
        help="float32 (L, H, W) as .npy, or as .npz together with the label numbers",
    )
    out.add_argument("-q", "--quiet", action="store_true", help="print errors only")

    folders = parser.add_argument_group("many pictures, matched by name without suffix")
    folders.add_argument("--input-dir", metavar="DIR", type=Path, help="photos, not IMAGE")
    folders.add_argument(
        "--annotation-dir", metavar="DIR", type=Path, help="annotations, not ANNOTATION"
    )

    crf = parser.add_argument_group(
        "dense CRF (Gaussian: position; bilateral: position and colour)"
    )
    crf.add_argument(
        "--gaussian-sxy", type=_positive, default=3.0, **_help("X", "deviation in pixels (3)")
    )
    crf.add_argument(
        "--gaussian-compat", type=_weight, default=3.0, **_help("W", "weight, 0 for none (3)")
    )
    crf.add_argument(
        "--bilateral-sxy", type=_positive, default=80.0, **_help("X", "deviation in pixels (80)")
    )
    crf.add_argument(
        "--bilateral-srgb",
        type=_positive,
        default=13.0,
        **_help("X", "deviation in colour steps of 0..255 (13)"),
    )
    crf.add_argument(
        "--bilateral-compat", type=_weight, default=10.0, **_help("W", "weight, 0 for none (10)")
    )
    crf.add_argument("--iterations", type=_count, default=5, **_help("N", "mean-field updates (5)"))
    crf.add_argument(
        "--gt-prob", type=_trust, default=0.7, **_help("P", "trust in annotated labels, 0..1 (0.7)")
    )
    crf.add_argument(
        "--normalization",
        choices=("symmetric", "before", "after", "none"),
        default="symmetric",
        help="of the kernels (symmetric)",
    )
    crf.add_argument(
        "--threads", type=threads, **_help("N", "threads; the result does not depend on it")
    )

    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--annotation-format",
        choices=("auto", "colors", "indices"),
        default="auto",
        help="how to read picture annotations",
    )
    known = reading.add_mutually_exclusive_group()
    known.add_argument(
        "--unknown", type=_unknown, **_help("X", "the unknown #rrggbb or index, or none")
    )
    known.add_argument(
        "--no-zero-unsure",
        dest="unknown",
        action="store_const",
        const="none",
        help="the same as --unknown none: black (255) is a label like any other",
    )
    reading.add_argument("--key", metavar="NAME", help="the array to take from a .npz")
    reading.add_argument(
        "--max-pixels",
        type=_pixels,
        default=64_000_000,
        **_help("N", "refuse larger pictures (64000000)"),
    )
    reading.add_argument(
        "--ignore-orientation", action="store_true", help="use pixels as stored, not EXIF-turned"
    )
    return parser


def _help(metavar: str, text: str) -> dict[str, Any]:
    return {"metavar": metavar, "help": text}


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _checked(value: Any, fine: bool, what: str) -> Any:
    if not fine:
        raise argparse.ArgumentTypeError(f"must be {what}, got {value}")
    return value


def _positive(text: str) -> float:
    return float(_checked(_number(text), _number(text) > 0, "greater than 0"))


def _weight(text: str) -> float:
    return _number(text)


def _fraction(text: str) -> float:
    return float(_checked(_number(text), 0 <= _number(text) <= 1, "in 0..1"))


def _trust(text: str) -> float:
    return float(_checked(_number(text), 0 < _number(text) < 1, "between 0 and 1"))


def _count(text: str) -> int:
    return int(_checked(int(text), 0 <= int(text) <= 10_000, "in 0..10000"))


def threads(text: str) -> int:
    """Parse a number of threads."""
    return int(_checked(int(text), 1 <= int(text) <= 1024, "in 1..1024"))


def _pixels(text: str) -> int:
    return int(_checked(int(text), int(text) > 0, "greater than 0"))


def _unknown(text: str) -> Unknown:
    if text == "none":
        return "none"
    if text.startswith("#") and len(text) == 7:
        try:
            red, green, blue = bytes.fromhex(text[1:])
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be like #ff0000, got {text}") from None
        return red, green, blue
    try:
        index = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be #rrggbb, an index or none, got {text}") from None
    return int(_checked(index, 0 <= index <= 65535, "an index in 0..65535"))
