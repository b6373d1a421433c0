# SPDX-License-Identifier: Apache-2.0
"""Work that cannot fit in memory is refused before it starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _cli import rough_labels, run_error, run_ok, save, scene

from pydense.cli import _memory

ROUGH = rough_labels()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return save(tmp_path / "image.png", scene())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.png"


def test_work_beyond_the_memory_is_refused(
    image: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memory, "available_bytes", lambda: 90_000)
    annotation = save(tmp_path / "a.png", ROUGH)
    assert "of memory" in run_error("refine", image, annotation, "-o", output)
    np.save(tmp_path / "a.npy", np.full((3, *ROUGH.shape), 1 / 3, np.float32))
    assert "of memory" in run_error("refine", image, tmp_path / "a.npy", "-o", output)
    monkeypatch.setattr(_memory, "available_bytes", lambda: None)
    run_ok("refine", image, annotation, "-o", output)


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(_memory, "_CGROUP_LIMIT", limit)
    total = _memory.available_bytes()
    assert total is not None
    assert total > 1e8
    limit.write_text("max\n")
    assert _memory.available_bytes() == total
    limit.write_text("1000000\n")
    assert _memory.available_bytes() == 1_000_000
