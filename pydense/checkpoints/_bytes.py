# SPDX-License-Identifier: Apache-2.0
"""Reading bytes that may be broken or hostile: every step is checked against the end."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from ._errors import CheckpointError


class Bytes:
    """A part of a file, read from front to back.

    Args:
        data: All bytes.
        begin: First of the part.
        end: Behind its last.
        what: The part's name in messages.
    """

    def __init__(self, data: memoryview, begin: int, end: int, what: str) -> None:
        self.data, self.at, self.end, self.what = data, begin, end, what

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return self.end - self.at

    def skip(self, count: int) -> int:
        """Go on by ``count`` bytes, return where they begin."""
        if count < 0 or count > self.left:
            raise self.error(f"{count} bytes expected, {self.left} are left")
        begin = self.at
        self.at += count
        return begin

    def take(self, count: int) -> memoryview:
        """The next bytes, not copied."""
        begin = self.skip(count)
        return self.data[begin : begin + count]

    def number(self, form: str) -> Any:
        """A number, ``form`` as of the struct module, little-endian."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def part(self, count: int, what: str) -> Bytes:
        """The next bytes as a part of their own."""
        begin = self.skip(count)
        return Bytes(self.data, begin, begin + count, what)

    def error(self, text: str) -> CheckpointError:
        """The error of this place."""
        return CheckpointError(f"broken {self.what} at byte {self.at}: {text}")


def name(raw: memoryview, what: str, limit: int = 1024) -> str:
    """A name in UTF-8."""
    if len(raw) > limit:
        raise CheckpointError(f"broken {what}: a name of {len(raw)} bytes")
    try:
        return bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"broken {what}: a name that is no UTF-8") from None


def size(shape: Sequence[int], what: str) -> int:
    """How many numbers a shape holds; an error for one that no tensor can have."""
    if any(not 0 <= n < 2**40 for n in shape) or math.prod(n or 1 for n in shape) >= 2**60:
        raise CheckpointError(f"broken {what}: shape {tuple(shape)}")
    return math.prod(shape)
