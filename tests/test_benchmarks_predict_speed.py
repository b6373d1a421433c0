# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

from benchmarks.predict_speed import main


def test_frames_per_second_are_printed(capsys):
    given = ["--models", "unet_bilinear", "--size", "48x33", "--frames", "3", "--batch", "2"]
    assert main([*given, "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "48x33, 3 frames, batch 2, cpu, 1 threads" in text
    assert re.search(r"labelled 3 of 3 pictures .* [0-9.]+ frames/s, the network alone", text)
