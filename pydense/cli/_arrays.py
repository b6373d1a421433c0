# SPDX-License-Identifier: Apache-2.0
"""Reading .npy and .npz files that may be broken or hostile.

The header is judged before any memory is asked for, and nothing is ever unpickled.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ._errors import CommandError, printable, reason
from ._pictures import require_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIXES = frozenset({".npy", ".npz"})
ShapeCheck = Callable[[tuple[int, ...], "np.dtype[Any]"], None]

# The array taken from an archive of several when no key is given: the name `pydense refine` writes.
_DEFAULT_KEY = "probabilities"


def read_array(
    path: Path, *, key: str | None, check: ShapeCheck
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read one array from a .npy or .npz file.

    Args:
        path: the file.
        key: name of the array inside a .npz; None takes the only one, or "probabilities".
        check: called with shape and dtype from the header; raises CommandError to refuse.

    Returns:
        The array, and the array "labels" that `pydense refine --probabilities` puts beside it in
        a .npz (None when there is none).

    Raises:
        CommandError: missing or broken file, object arrays, refused shape, ambiguous key.
    """
    require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix.lower() == ".npz":
                return _read_archive(path, key, check)
            if key is not None:
                raise CommandError("--key is for .npz files")
            with path.open("rb") as stream:
                return _read_stream(stream, path.stat().st_size, check), None
    except CommandError as error:
        raise CommandError(f"cannot read {printable(path)}: {error}") from None
    except OSError as error:
        raise CommandError(f"cannot read {printable(path)}: {reason(error)}") from None
    except MemoryError:
        raise
    except Exception as error:  # zipfile and the header parser raise many types on broken bytes
        raise CommandError(
            f"cannot read {printable(path)}: broken array file: {reason(error)}"
        ) from None


def _read_archive(
    path: Path, key: str | None, check: ShapeCheck
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    with zipfile.ZipFile(path) as archive:
        members = {
            info.filename[: -len(".npy")]: info
            for info in archive.infolist()
            if info.filename.endswith(".npy")
        }
        names = ", ".join(printable(name) for name in sorted(members)[:20]) or "none"
        if key is None:
            key = _DEFAULT_KEY if _DEFAULT_KEY in members else next(iter(members), "")
            if len(members) != 1 and key != _DEFAULT_KEY:
                raise CommandError(f"holds several arrays or none, name one with --key ({names})")
        if key not in members:
            raise CommandError(f"has no array {printable(key)} ({names})")
        with archive.open(members[key]) as stream:
            array = _read_stream(stream, members[key].file_size, check)
        ids = None
        if key == _DEFAULT_KEY and "labels" in members:
            with archive.open(members["labels"]) as stream:
                ids = _read_stream(stream, members["labels"].file_size, _check_ids)
        return array, ids


def _check_ids(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 1 or dtype.kind not in "iu":
        raise CommandError("the array labels must be a list of integers")


def _read_stream(stream: IO[bytes], size: int, check: ShapeCheck) -> NDArray[Any]:
    """Read one .npy stream of `size` bytes, checking its header first."""
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(stream)
    else:  # version 3 is for structured arrays only
        raise CommandError(f"unsupported .npy version {version[0]}.{version[1]}")
    if dtype.hasobject:
        raise CommandError("object arrays (pickles) are never read")
    if any(n < 0 for n in shape):
        raise CommandError("broken array file: negative shape")
    check(shape, dtype)
    # A small file can claim any shape: compare with its size before allocating for it.
    expected = math.prod(shape) * dtype.itemsize
    if expected > size:
        raise CommandError("broken array file: shorter than its shape says")
    return _read_values(stream, shape, fortran, dtype, expected)


def _read_values(
    stream: IO[bytes],
    shape: tuple[int, ...],
    fortran: bool,
    dtype: np.dtype[Any],
    expected: int,
) -> NDArray[Any]:
    import numpy as np

    values = np.empty(math.prod(shape), dtype=dtype)
    target = values.view(np.uint8)
    done = 0
    while done < expected:
        chunk = stream.read(min(1 << 24, expected - done))
        if not chunk:
            raise CommandError("broken array file: shorter than its shape says")
        target[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
    return values.reshape(shape, order="F" if fortran else "C")
