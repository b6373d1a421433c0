# SPDX-License-Identifier: Apache-2.0
"""Prints the shell command that README.md gives under a marker, so that CI runs what people read.

python tools/ci/readme_command.py demo      # the fenced block after <!-- demo-command -->
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def command(text: str, name: str) -> str:
    """The one fenced block that follows the marker; ValueError where it is not just there."""
    marker = re.escape(f"<!-- {name}-command -->")
    found = re.findall(rf"^{marker}\n+```(?:sh|bash|console)?\n(.+?)^```$", text, re.M | re.S)
    if len(found) != 1:
        raise ValueError(f"README.md must have one '{name}-command', got {len(found)}")
    return str(found[0]).strip()


if __name__ == "__main__":
    print(command(README.read_text(encoding="utf-8"), sys.argv[1]))
