# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of pydense against what its users would pick otherwise; see benchmarks/README.md.

``python -m benchmarks.<name>`` puts the source tree first on ``sys.path``; a tree without a
compiled core would then hide an installed pydense. The ``pytest`` command does not put it there at
all, and a pydense built in place would not be found. So the tree goes to the end of the path in
both cases.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_entries = [entry for entry in sys.path if Path(entry).resolve() == ROOT]
if not _entries or not any((ROOT / "pydense").glob("_core*.so")):
    sys.path[:] = [entry for entry in sys.path if entry not in _entries] + [str(ROOT)]
