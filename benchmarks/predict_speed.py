# SPDX-License-Identifier: Apache-2.0
"""Frames per second of ``pydense predict`` on a video's frames, with weights made at random.

    python -m benchmarks.predict_speed                  # Light-Weight RefineNet at 1280x720, CPU
    python -m benchmarks.predict_speed --device cuda
    python -m benchmarks.predict_speed --models unet --size 640x480 --frames 20 --threads 1

Speed does not depend on the weights. The line that predict prints has two figures: all of it, with
reading and writing the pictures, and the network alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pydense import checkpoints, models
from pydense.cli import main as pydense

MODELS = ("lw_refinenet_mobilenet_v2", "lw_refinenet50")


def size(text: str) -> tuple[int, int]:
    """Width and height."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def make_frames(folder: Path, width: int, height: int, count: int) -> None:
    """Smooth colours and noise, JPEG."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)
    ground = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    for index in range(count):
        noise = rng.integers(0, 16, ground.shape, dtype=np.uint8)
        Image.fromarray(np.maximum(ground, 16) - noise).save(folder / f"{index:05}.jpg")


def main(arguments: list[str] | None = None) -> int:
    """Label frames with each model, and let predict say how fast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=models.list_models())
    parser.add_argument("--size", type=size, default=(1280, 720), metavar="WxH")
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    width, height = given.size
    print(f"{width}x{height}, {given.frames} frames, batch {given.batch}, {given.device}, ", end="")
    print(f"{given.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames = folder / "frames"
        frames.mkdir()
        make_frames(frames, width, height, given.frames)
        for model in given.models:
            torch.manual_seed(0)
            weights = folder / f"{model}.safetensors"
            about = checkpoints.About(model, preprocessing="imagenet")
            checkpoints.save(models.get_model(model), weights, about=about)
            call = ["predict", str(frames), "--checkpoint", str(weights), "-o", str(folder / model)]
            call += ["--batch", str(given.batch), "--device", given.device]
            code = pydense([*call, "--threads", str(given.threads)])
            weights.unlink()
            if code:
                return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
