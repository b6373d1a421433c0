# SPDX-License-Identifier: Apache-2.0
"""Reading pictures that may be broken or hostile.

Everything a decoder can throw becomes one `CommandError` line. The size is checked on the header,
before a pixel is decoded, and only the formats below are tried. Of the others some start programs
(PostScript), and libtiff writes to stderr and goes on where a file is broken.
"""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import CommandError, printable, reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".webp"})
_ORIENTATION_TAG = 0x0112


def require_file(path: Path) -> None:
    """Raise CommandError unless `path` is a readable regular file (a pipe would block)."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {printable(path)}: {reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise CommandError(f"cannot read {printable(path)}: not a regular file")


def open_picture(path: Path, *, max_pixels: int, orient: bool) -> Image.Image:
    """Open and decode a picture (the first frame of one that has several).

    Args:
        path: the file.
        max_pixels: largest width times height accepted; Pillow's own limit against
            decompression bombs stays in force as well, as an error.
        orient: turn the picture upright as its EXIF orientation says.

    Raises:
        CommandError: missing, broken, truncated, too large, or not one of `FORMATS`.
    """
    from PIL import Image, UnidentifiedImageError

    require_file(path)
    name = printable(path)
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(stream, formats=FORMATS)
            width, height = picture.size
            if width * height > max_pixels:
                raise CommandError(
                    f"{name} has {width}x{height} pixels, more than the limit of {max_pixels} "
                    "(raise it with --max-pixels)"
                )
            if width * height == 0:
                raise CommandError(f"{name} has no pixels ({width}x{height})")
            depth = _grey_bit_depth(path) if picture.format == "PNG" else 8
            picture.load()
            if picture.mode == "L" and depth < 8:
                # Pillow stretches 2- and 4-bit greys to 0..255; the stored numbers are labels.
                step = 255 // ((1 << depth) - 1)
                picture.info["grey_step"] = step
            return _upright(picture) if orient else picture
    except (CommandError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise CommandError(
            f"{name} is larger than Pillow's safety limit of {Image.MAX_IMAGE_PIXELS} pixels"
        ) from None
    except UnidentifiedImageError:
        raise CommandError(
            f"{name} is not a picture that can be read ({', '.join(FORMATS)})"
        ) from None
    except OSError as error:
        broken = "" if error.errno else "broken picture: "
        raise CommandError(f"cannot read {name}: {broken}{reason(error)}") from None
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise CommandError(f"cannot read {name}: broken picture: {reason(error)}") from None


def _grey_bit_depth(path: Path) -> int:
    """Return the bits per pixel of a grey PNG, 8 for any other PNG."""
    with path.open("rb") as stream:
        header = stream.read(26)  # signature 8, length 4, "IHDR" 4, width 4, height 4, depth, type
    is_grey = len(header) == 26 and header[25] == 0
    return header[24] if is_grey else 8


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a broken EXIF block counts as none."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the pixels are fine, only the block of remarks is not
        return picture
    # A hostile tag can hold any type, unhashable ones too.
    if not isinstance(orientation, int) or orientation not in turns:
        return picture
    turned = picture.transpose(turns[orientation])
    turned.info = dict(picture.info)
    return turned


def has_alpha(picture: Image.Image) -> bool:
    """Tell whether any pixel can be transparent (an alpha band, or a transparent colour)."""
    return picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info


def grey16(picture: Image.Image) -> NDArray[np.uint16] | None:
    """Return the pixels of a 16-bit grey picture (H, W), None for every other mode."""
    import numpy as np

    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return None
    values = np.asarray(picture)
    if picture.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise CommandError("32-bit grey pictures are not supported")
    return values.astype(np.uint16)


def read_image(path: Path, *, max_pixels: int, orient: bool = True) -> NDArray[np.uint8]:
    """Read a photo as 8-bit RGB.

    Grey becomes three equal channels, CMYK and palettes are converted, 16-bit values keep their
    upper 8 bits, and transparent pixels are laid over white. EXIF orientation is applied unless
    `orient` is False.

    Returns:
        uint8 (H, W, 3).
    """
    import numpy as np
    from PIL import Image

    picture = open_picture(path, max_pixels=max_pixels, orient=orient)
    try:
        wide = grey16(picture)
        if wide is not None:
            return np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if picture.mode == "F":
            raise CommandError("floating-point pictures are not supported")
        if has_alpha(picture):
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(ground, picture)
        return np.array(picture.convert("RGB"), dtype=np.uint8)
    except CommandError as error:
        raise CommandError(f"cannot read {printable(path)}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # conversion of a picture with contradicting metadata
        raise CommandError(
            f"cannot read {printable(path)}: broken picture: {reason(error)}"
        ) from None
