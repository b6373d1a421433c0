# SPDX-License-Identifier: Apache-2.0
"""The `pydense` command.

`pydense refine` sharpens annotations against their photos, `pydense predict` labels pictures with a
network, `pydense demo` shows the former on a photo, `pydense info` tells how this installation is
built. Exit codes: 0 success, 1 failure, 2 usage.

This module and the option lists import nothing heavy (no NumPy, Pillow, rich or torch), so that
`pydense --help` is instant; the work is imported when a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from . import _demo, _info, _predict, _refine
from ._errors import CommandError, UsageError, printable, reason

_COMMANDS = (_refine, _predict, _demo, _info)


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports errors as `pydense: error: ...`, whatever the command."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"pydense: error: {printable(message)}\n")


class _Version(argparse.Action):
    """Print the version; it is only looked up when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from pydense import __version__

        print(f"pydense {__version__}")
        parser.exit(0)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="pydense",
        description="Dense per-pixel prediction: label pictures, refine labels with a dense CRF.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; those of the process unless given.

    Returns:
        0 success, 1 failure, 2 wrong usage, 130 interrupted. Never raises, so that no traceback
        reaches the user; PYDENSE_TRACEBACK=1 in the environment shows them, for bug reports.
    """
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, version or error
        return stop.code if isinstance(stop.code, int) else 0
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away (`pydense info | head -1`); keep Python's exit from complaining.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("pydense: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        return _report(str(error), 2)
    except (CommandError, MemoryError, ImportError) as error:
        if os.environ.get("PYDENSE_TRACEBACK"):
            raise
        return _report(str(error) if isinstance(error, CommandError) else reason(error), 1)
    except Exception as error:
        if os.environ.get("PYDENSE_TRACEBACK"):
            raise
        return _report(
            f"internal error: {type(error).__name__}: {reason(error)} "
            "(PYDENSE_TRACEBACK=1 shows where; please report it)",
            1,
        )


def _report(message: str, code: int) -> int:
    print(f"pydense: error: {message}", file=sys.stderr)
    return code
