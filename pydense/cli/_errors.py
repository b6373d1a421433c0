# SPDX-License-Identifier: Apache-2.0
"""The one exception the commands raise on purpose, and safe text for messages."""

from __future__ import annotations

import os


class CommandError(Exception):
    """A failure to report as one line (`pydense: error: ...`) with exit code 1."""


class UsageError(Exception):
    """A wrong combination of options that argparse cannot see: exit code 2."""


def printable(text: str | os.PathLike[str]) -> str:
    r"""Return `text` on one line, with everything a terminal might act on escaped.

    File names and decoder messages come from outside: an escape sequence or an undecodable byte
    in them must neither drive the terminal nor make printing fail.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in os.fspath(text)
    )


def reason(error: BaseException) -> str:
    """Return a short printable text for any exception: its strerror, its message or its type."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = printable(" ".join(str(error).split()))
    return text[:200] if text else type(error).__name__
