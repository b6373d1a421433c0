# SPDX-License-Identifier: Apache-2.0
"""Annotations: what the user knows about a photo, in any of the forms people keep it in.

A colour picture (every colour is a label), an index picture (palette or grey: every number is a
label) or an array (integer labels, or probabilities) all become one `Annotation`, which remembers
how it came so that the result can be written in the same style.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import _arrays
from ._errors import CommandError, UsageError, printable, reason
from ._memory import require_memory
from ._palette import voc_colors
from ._pictures import grey16, has_alpha, open_picture

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

MAX_LABELS = 256
MAX_PROBABILITY_LABELS = 65536  # what a 16-bit label map can hold

Form = Literal["auto", "colors", "indices"]
# A colour, an index, or "none" for: every pixel is known. None: what is usual for the form.
Unknown = tuple[int, int, int] | int | Literal["none"] | None


@dataclass(frozen=True)
class Palette:
    """The palette of an index picture, as stored: RGB bytes, and the transparency entry."""

    rgb: bytes
    transparency: bytes | int | None


@dataclass(frozen=True)
class Annotation:
    """Labels or probabilities for the pixels of one photo.

    Attributes:
        labels: int32 (H, W). With `has_unknown`: 0 where unknown, else 1..L; without: 0..L-1.
            None when probabilities were given.
        probabilities: float32 (L, H, W), None when labels were given.
        has_unknown: whether some pixels are unknown (labels only).
        ids: int64 (L,), the number that stands for each label in index files.
        colors: uint8 (L, 3), the colour of each label.
        style: whether the result is written as colours or as indices.
        palette: the palette the annotation came with.
        description: how the file was understood, for the user to read.
    """

    labels: NDArray[np.int32] | None
    probabilities: NDArray[np.float32] | None
    has_unknown: bool
    ids: NDArray[np.int64]
    colors: NDArray[np.uint8]
    style: Literal["colors", "indices"]
    palette: Palette | None
    description: str


@dataclass(frozen=True)
class AnnotationOptions:
    """How to read annotations; see the options of `pydense refine` of the same names."""

    form: Form = "auto"
    unknown: Unknown = None
    key: str | None = None
    max_pixels: int = 64_000_000
    orient: bool = True


def read_annotation(path: Path, size: tuple[int, int], options: AnnotationOptions) -> Annotation:
    """Read the annotation of a photo.

    Args:
        path: a picture, or a .npy or .npz file.
        size: (H, W) of the photo, which the annotation must have too.
        options: how to understand the file.

    Raises:
        CommandError: unreadable, of another size, without labels, or with too many.
        UsageError: an option that does not fit the kind of file.
    """
    if path.suffix.lower() in _arrays.SUFFIXES:
        return _from_array(path, size, options)
    picture = open_picture(path, max_pixels=options.max_pixels, orient=options.orient)
    if (picture.height, picture.width) != size:
        raise CommandError(
            f"{printable(path)} is {picture.width}x{picture.height}, "
            f"but the image is {size[1]}x{size[0]}"
        )
    try:
        return _from_picture(picture, path, options)
    except CommandError as error:
        raise CommandError(f"{printable(path)}: {error}") from None
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # conversion of a picture with contradicting metadata
        raise CommandError(
            f"cannot read {printable(path)}: broken picture: {reason(error)}"
        ) from None


def _from_picture(picture: Image.Image, path: Path, options: AnnotationOptions) -> Annotation:
    import numpy as np

    wide = grey16(picture)
    is_index = wide is not None or picture.mode in ("P", "L", "1")
    if options.form == "indices" and not is_index:
        return _from_indices(_equal_channels(picture), None, "equal channels", 255, options)
    if options.form == "colors" or not is_index:
        return from_colors(picture, options)
    if wide is not None:
        return _from_indices(wide, None, "16-bit grey", 65535, options)
    values = np.asarray(picture).astype(np.uint8)
    if picture.mode != "P":
        values //= np.uint8(picture.info.get("grey_step", 1))
        kind = "black and white" if picture.mode == "1" else "grey"
        return _from_indices(values, None, kind, 255, options)
    palette = Palette(bytes(picture.getpalette("RGB") or b""), picture.info.get("transparency"))
    if options.form == "auto" and (
        isinstance(options.unknown, tuple)
        or (options.unknown is None and _is_colors(values, palette))
    ):
        return from_colors(picture, options)
    return _from_indices(values, palette, "palette", 255, options)


def _is_colors(values: NDArray[np.uint8], palette: Palette) -> bool:
    """Tell whether a palette picture is a colour picture that some program has compressed.

    In palettes made for labels black stands at 0 (background) or 255. An optimiser numbers the
    colours as it finds them: black in use at another index means that black is "unknown".
    """
    import numpy as np

    rgb = np.frombuffer(palette.rgb, dtype=np.uint8).reshape(-1, 3)
    used = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    inner = used[(used > 0) & (used < min(255, len(rgb)))]
    return bool((rgb[inner] == 0).all(axis=1).any())


def _equal_channels(picture: Image.Image) -> NDArray[np.uint8]:
    """Return the indices of a grey picture that was saved as RGB."""
    import numpy as np

    values = np.asarray(picture.convert("RGB"))
    if (values != values[..., :1]).any():
        raise CommandError("is a colour picture, its channels differ: not usable as indices")
    return np.ascontiguousarray(values[..., 0])


def from_colors(picture: Image.Image, options: AnnotationOptions) -> Annotation:
    """Read a decoded colour picture; labels are numbered by b * 65536 + g * 256 + r.

    Raises:
        CommandError: no labelled pixel, or more than `MAX_LABELS` colours.
        UsageError: an index given as the unknown colour.
    """
    import numpy as np

    unknown = (0, 0, 0) if options.unknown is None else options.unknown
    if isinstance(unknown, int):
        raise UsageError(
            f"--unknown must be a colour (#rrggbb) or none for a colour picture, got {unknown}"
        )
    clear = None
    if has_alpha(picture):
        rgba = np.asarray(picture.convert("RGBA"))
        rgb, clear = rgba[..., :3], rgba[..., 3] == 0
    else:
        rgb = np.asarray(picture.convert("RGB"))
    code = rgb[..., 0].astype(np.int32)
    code |= rgb[..., 1].astype(np.int32) << 8
    code |= rgb[..., 2].astype(np.int32) << 16
    absent = np.zeros(code.shape, dtype=np.bool_)
    if unknown != "none":
        red, green, blue = unknown
        absent |= code == (red | green << 8 | blue << 16)
        if clear is not None:
            absent |= clear
    present = np.zeros(1 << 24, dtype=np.bool_)
    present[code[~absent]] = True
    found = np.flatnonzero(present)
    if len(found) > MAX_LABELS:
        lossy = " (a JPEG changes colours: save it as PNG)" if picture.format == "JPEG" else ""
        raise CommandError(
            f"has {len(found)} colours, at most {MAX_LABELS} can be labels; "
            f"is it a photo, or drawn with smooth edges?{lossy}"
        )
    colors = np.stack([found & 255, found >> 8 & 255, found >> 16], axis=1).astype(np.uint8)
    compact = np.searchsorted(found, code).astype(np.int32)
    return _hard(compact, absent, np.arange(len(found)), colors, "colors", None, "colours")


def _from_indices(
    values: NDArray[np.integer],
    palette: Palette | None,
    kind: str,
    void: int,
    options: AnnotationOptions,
) -> Annotation:
    import numpy as np

    unknown = void if options.unknown is None else options.unknown
    if isinstance(unknown, tuple):
        raise UsageError("--unknown must be an index or none for an index picture, got a colour")
    absent = np.zeros(values.shape, dtype=np.bool_)
    if unknown != "none":
        absent |= values == unknown
    if values.dtype.kind == "i":
        absent |= values < 0
    known = values[~absent]
    if known.size and known.max() > 65535:
        raise CommandError(f"has label {known.max()}, at most 65535 can be written")
    counts = np.bincount(known.astype(np.int64), minlength=1)
    found = np.flatnonzero(counts)
    if len(found) > MAX_LABELS:
        raise CommandError(f"has {len(found)} labels, at most {MAX_LABELS} are supported")
    if kind == "grey" and found.tolist() == [0] and absent.any() and options.unknown is None:
        raise CommandError(
            "has only the values 0 and 255, and 255 stands for unknown: "
            "for a black and white mask give --unknown none"
        )
    colors = voc_colors(found)
    if palette is not None:
        stored = np.frombuffer(palette.rgb, dtype=np.uint8).reshape(-1, 3)
        inside = found < len(stored)
        colors[inside] = stored[found[inside]]
    lut = np.zeros(len(counts), dtype=np.int32)
    lut[found] = np.arange(len(found), dtype=np.int32)
    compact = lut[np.where(absent, 0, values)]
    return _hard(compact, absent, found, colors, "indices", palette, f"{kind} indices")


def _hard(
    compact: NDArray[np.int32],
    absent: NDArray[np.bool_],
    ids: NDArray[np.integer],
    colors: NDArray[np.uint8],
    style: Literal["colors", "indices"],
    palette: Palette | None,
    kind: str,
) -> Annotation:
    """Finish an annotation of labels: `compact` holds 0..L-1, `absent` where it is unknown."""
    import numpy as np

    if len(ids) == 0:
        raise CommandError("has no labelled pixel, all are unknown")
    has_unknown = bool(absent.any())
    labels = np.where(absent, 0, compact + 1).astype(np.int32) if has_unknown else compact
    share = f", {100 * absent.mean():.0f} % unknown" if has_unknown else ", none unknown"
    plural = "" if len(ids) == 1 else "s"
    return Annotation(
        labels=labels,
        probabilities=None,
        has_unknown=has_unknown,
        ids=ids.astype(np.int64),
        colors=colors,
        style=style,
        palette=palette,
        description=f"{kind}, {len(ids)} label{plural}{share}",
    )


def _from_array(path: Path, size: tuple[int, int], options: AnnotationOptions) -> Annotation:
    import numpy as np

    height, width = size

    def check(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if len(shape) == 2 and shape == size and dtype.kind in "biu":
            return
        if len(shape) == 3 and size in (shape[1:], shape[:2]) and dtype.kind == "f":
            count = shape[0] if shape[1:] == size else shape[2]
            if not 1 <= count <= MAX_PROBABILITY_LABELS:
                raise CommandError(f"has {count} labels, 1..{MAX_PROBABILITY_LABELS} are supported")
            require_memory(height * width, count)
            return
        raise CommandError(
            f"must hold floating-point probabilities of shape (L, {height}, {width}) or "
            f"({height}, {width}, L), or integer labels of shape ({height}, {width}), "
            f"got {dtype} {shape}"
        )

    values, ids = _arrays.read_array(path, key=options.key, check=check)
    try:
        if values.ndim == 2:
            wide = values.astype(np.int64) if values.dtype != np.uint64 else values
            return _from_indices(wide, None, "array", 255, options)
        if isinstance(options.unknown, (tuple, int)):
            raise UsageError("--unknown does not go with probabilities")
        return _soft(values if values.shape[1:] == size else np.moveaxis(values, 2, 0), ids)
    except CommandError as error:
        raise CommandError(f"{printable(path)}: {error}") from None


def _soft(values: NDArray[np.floating], ids: NDArray[Any] | None) -> Annotation:
    """Make an annotation of probabilities (L, H, W)."""
    import numpy as np

    count = values.shape[0]
    with np.errstate(over="ignore"):
        probabilities = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(probabilities).all():
        raise CommandError("probabilities must be finite, got NaN or infinity")
    low, high = float(probabilities.min()), float(probabilities.max())
    if low < -1e-4 or high > 1 + 1e-3:
        raise CommandError(
            f"probabilities must be in 0..1, got {low:.4g}..{high:.4g} (logits need a softmax)"
        )
    numbers = np.arange(count, dtype=np.int64)
    if ids is not None:
        numbers = ids.astype(np.int64)
        if len(numbers) != count or numbers.min() < 0 or numbers.max() > 65535:
            raise CommandError(f"the array labels must hold {count} numbers in 0..65535")
    plural = "" if count == 1 else "s"
    return Annotation(
        labels=None,
        probabilities=probabilities.clip(0, 1, out=probabilities),
        has_unknown=False,
        ids=numbers,
        colors=voc_colors(numbers),
        style="indices",
        palette=None,
        description=f"probabilities, {count} label{plural}",
    )
