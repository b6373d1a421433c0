# SPDX-License-Identifier: Apache-2.0
"""Writing files whole or not at all, and checking beforehand that they can be written.

`Outputs` writes every file of a run under a temporary name in its own folder and renames them all
at the end: whoever reads an output, even after a crash, finds the old file or the complete new one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from ._errors import CommandError, UsageError, printable, reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ._annotations import Annotation

LABEL_SUFFIXES = (".png", ".npy")
OVERLAY_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROBABILITY_SUFFIXES = (".npy", ".npz")
_FORMAT_OF_SUFFIX = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

Writer = Callable[[IO[bytes]], None]


def check_suffix(path: Path, suffixes: Iterable[str], option: str) -> None:
    """Raise UsageError unless the name ends in one of `suffixes`."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{option} must end in {' or '.join(suffixes)}, got {printable(path.name)}"
        )


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that all outputs can be written, are different files, and spare the inputs.

    Raises:
        CommandError: a folder that is missing or not writable, an output that is a folder or a
            device, that is one of the inputs (by any name), or that is named twice.
    """
    protected = set()
    for path in inputs:
        with contextlib.suppress(OSError, ValueError):  # reading it will say what is wrong
            info = path.stat()
            protected.add((info.st_dev, info.st_ino))
    targets = set()
    for path in outputs:
        name = printable(path)
        try:
            target = os.path.realpath(path)
            folder = os.path.dirname(target)
            if not os.path.isdir(folder):
                raise CommandError(f"cannot write {name}: no such folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise CommandError(f"cannot write {name}: the folder is not writable")
            with contextlib.suppress(FileNotFoundError):  # a new file is the usual case
                old = os.stat(target)
                if (old.st_dev, old.st_ino) in protected:
                    raise CommandError(f"cannot write {name}: it is one of the inputs")
                if not stat.S_ISREG(old.st_mode):
                    raise CommandError(f"cannot write {name}: not a regular file")
        except (OSError, ValueError) as error:
            raise CommandError(f"cannot write {name}: {reason(error)}") from None
        if target in targets:
            raise CommandError(f"cannot write {name}: named for two outputs")
        targets.add(target)


class Outputs:
    """Files that appear together: all when the `with` block ends well, none when it fails."""

    def __init__(self) -> None:
        self._staged: list[tuple[str, str, Path]] = []  # temporary, final, name the user gave

    def __enter__(self) -> Outputs:
        return self

    def write(self, path: Path, writer: Writer) -> None:
        """Let `writer` fill the temporary file that becomes `path`.

        Raises:
            CommandError: the file cannot be made or written (no space, no permission).
        """
        target = os.path.realpath(path)  # a symbolic link stays, what it points to is replaced
        temporary = os.path.join(os.path.dirname(target), f".pydense-{secrets.token_hex(8)}.tmp")
        try:
            # "x" applies the umask like any newly written file, and never follows a planted link.
            with open(temporary, "xb") as stream:
                self._staged.append((temporary, target, path))
                writer(stream)
        except (OSError, ValueError) as error:
            raise CommandError(f"cannot write {printable(path)}: {reason(error)}") from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                while self._staged:
                    temporary, target, path = self._staged[0]
                    try:
                        os.replace(temporary, target)
                    except OSError as failure:
                        raise CommandError(
                            f"cannot write {printable(path)}: {reason(failure)}"
                        ) from None
                    del self._staged[0]
        finally:
            for temporary, _, _ in self._staged:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            self._staged.clear()


def picture_writer(path: Path, pixels: NDArray[np.uint8]) -> Writer:
    """Write uint8 (H, W, 3) in the format of the suffix; JPEG and WebP at high quality."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    kind = _FORMAT_OF_SUFFIX[path.suffix.lower()]
    return lambda stream: picture.save(stream, format=kind, **({} if kind == "PNG" else _LOSSY))


_LOSSY = {"quality": 92}


def label_writer(
    annotation: Annotation, winners: NDArray[np.integer], *, as_colors: bool
) -> Writer:
    """Write a label map as PNG.

    Args:
        annotation: gives ids, colours and the palette.
        winners: (H, W), for every pixel the number of its label in `annotation` (0..L-1).
        as_colors: an RGB picture of the label colours; otherwise the ids as a palette picture
            (16-bit grey when an id is above 255).
    """
    import numpy as np
    from PIL import Image

    if as_colors:
        colored = Image.fromarray(annotation.colors[winners])
        return lambda stream: colored.save(stream, format="PNG")
    ids = annotation.ids[winners]
    if annotation.ids.max() > 255:
        wide = Image.fromarray(ids.astype(np.uint16))
        return lambda stream: wide.save(stream, format="PNG")
    picture = Image.fromarray(ids.astype(np.uint8))
    picture.putpalette(palette_bytes(annotation), "RGB")  # turns grey into a palette picture
    palette = annotation.palette
    extra = (
        {}
        if palette is None or palette.transparency is None
        else {"transparency": palette.transparency}
    )
    return lambda stream: picture.save(stream, format="PNG", **extra)


def palette_bytes(annotation: Annotation) -> bytes:
    """Return the RGB palette of a label map: as it came, else made from the label colours."""
    import numpy as np

    from ._palette import voc_colors

    size = int(annotation.ids.max()) + 1
    if annotation.palette is not None:
        stored = annotation.palette.rgb
        missing = voc_colors(np.arange(len(stored) // 3, max(size, len(stored) // 3)))
        return stored + missing.tobytes()
    if annotation.style == "indices":
        return voc_colors(np.arange(256)).tobytes()
    colors = voc_colors(np.arange(size))
    colors[annotation.ids] = annotation.colors
    return colors.tobytes()


def ids_writer(annotation: Annotation, winners: NDArray[np.integer]) -> Writer:
    """Write a label map as .npy: uint8, or uint16 when an id is above 255."""
    import numpy as np

    kind = np.uint8 if annotation.ids.max() <= 255 else np.uint16
    ids = annotation.ids.astype(kind)[winners]
    return lambda stream: np.lib.format.write_array(stream, ids, allow_pickle=False)


def probability_writer(
    path: Path, annotation: Annotation, probabilities: NDArray[np.float32]
) -> Writer:
    """Write (L, H, W) as .npy, or as .npz with the arrays "probabilities" and "labels" (ids)."""
    import numpy as np

    if path.suffix.lower() == ".npy":
        return lambda stream: np.lib.format.write_array(stream, probabilities, allow_pickle=False)
    return lambda stream: np.savez_compressed(
        stream, probabilities=probabilities, labels=annotation.ids
    )
