# SPDX-License-Identifier: Apache-2.0
"""`pydense info`: how this installation was built and whether it works."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "info",
        help="tell how pydense is built and what it uses",
        description="Tell version, compiler, instruction sets, CUDA, torch and threads.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="run small kernels through every door; exit code 1 if one fails",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run `pydense info`."""
    import pydense

    info: Mapping[str, Any] = pydense.build_info()
    checks: list[tuple[str, bool, str]] = []
    if arguments.selftest:
        from pydense import _library

        checks = list(_library.selftest())
    if arguments.json:
        import json

        report = dict(info)
        if arguments.selftest:
            report["selftest"] = [
                {"name": name, "ok": ok, "detail": detail} for name, ok, detail in checks
            ]
        print(json.dumps(report, indent=2))
    else:
        _print_tables(info, checks)
    return 0 if all(ok for _, ok, _ in checks) else 1


def _print_tables(info: Mapping[str, Any], checks: list[tuple[str, bool, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=False, title="pydense")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in info.items():
        table.add_row(key.replace("_", " "), Text(_text(value)))
    console.print(table)
    if checks:
        table = Table(title="selftest")
        table.add_column("check", overflow="fold")
        table.add_column("result", no_wrap=True)
        table.add_column("detail", overflow="fold")
        for name, ok, detail in checks:
            result = Text("ok", style="green") if ok else Text("FAILED", style="bold red")
            table.add_row(Text(name), result, Text(detail))
        console.print(table)


def _text(value: Any) -> str:
    """Return a value of the build information as people write it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None or value == "" else str(value)
