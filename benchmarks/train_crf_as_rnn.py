# SPDX-License-Identifier: Apache-2.0
"""Does training through a CRF help? A small network on CamVid with and without ``CRFasRNN``.

For each seed a network is trained for ``--steps`` on CamVid at a quarter of its size. From there
it goes on twice for ``--crf-steps``, over the same batches with the same learning rates: alone, and
with the layer behind it, end to end. So both have had the same number of steps, and differ in the
layer alone. Reported is the mean IoU over the 11 classes on the validation pictures: each, their
difference by seed, its mean and its standard deviation over the seeds, and, for comparison, that of
the layer put behind the network that was trained alone, without any training of it.

    python -m benchmarks.train_crf_as_rnn --output result.json

takes some minutes on one core. The data is read from PYDENSE_TEST_DATA/camvid (SegNet's split:
train, trainannot, val, valannot; label 11 is unknown).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import ROOT, _machine
from pydense.nn import CRFasRNN

CLASSES, VOID = 11, 11
WIDTH, HEIGHT = 120, 90
# Of the paper's, for pictures of a quarter of the size; colours as far apart as video noise asks.
CRF = {
    "iterations": 5,
    "spatial_weight": 0.5,
    "bilateral_weight": 0.5,
    "spatial_sxy": 1.5,
    "bilateral_sxy": 15,
    "bilateral_srgb": 13,
}


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, H, W) and labels (N, H, W), both uint8."""
    images, labels = [], []
    for path in sorted((folder / f"{split}annot").iterdir()):
        label = Image.open(path).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
        (picture,) = (folder / split).glob(f"{path.stem}.*")
        image = Image.open(picture).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        images.append(torch.tensor(np.asarray(image)).permute(2, 0, 1))
        labels.append(torch.tensor(np.asarray(label)))
    return torch.stack(images), torch.stack(labels)


class Net(nn.Module):
    """Two strided and three dilated convolutions; logits of a quarter of the size, enlarged."""

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = 3
        for width, stride, dilation in (
            (channels // 2, 2, 1),
            (channels, 2, 1),
            (channels, 1, 1),
            (channels, 1, 2),
            (channels, 1, 4),
        ):
            layers += [
                nn.Conv2d(last, width, 3, stride, dilation, dilation, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            last = width
        self.body = nn.Sequential(*layers, nn.Conv2d(last, CLASSES, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the picture's size."""
        logits = self.body(image.float() / 64 - 2)
        return nn.functional.interpolate(logits, image.shape[2:], mode="bilinear")


class WithCRF(nn.Module):
    """A network with the layer behind it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.crf = CRFasRNN(CLASSES, **CRF)

    def forward(self, image: Tensor) -> Tensor:
        """Refined logits."""
        refined: Tensor = self.crf(self.net(image), image)
        return refined


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], steps: int, batch: int, rate: float, seed: int
) -> float:
    """Adam with a rate that falls to 0 along a cosine; returns seconds per step."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    began = time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        image, label = images[rows], labels[rows].long()
        if torch.rand((), generator=generator) < 0.5:
            image, label = image.flip(3), label.flip(2)
        loss = nn.functional.cross_entropy(model(image), label, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - began) / max(steps, 1)


@torch.no_grad()
def mean_iou(model: nn.Module, data: tuple[Tensor, Tensor], batch: int) -> float:
    """In percent, over the classes that occur."""
    model.eval()
    confusion = torch.zeros(CLASSES * CLASSES, dtype=torch.int64)
    for image, label in zip(*(x.split(batch) for x in data), strict=True):
        known = label != VOID
        pairs = label[known].long() * CLASSES + model(image).argmax(1)[known]
        confusion += torch.bincount(pairs, minlength=CLASSES * CLASSES)
    table = confusion.view(CLASSES, CLASSES).double()
    hits = table.diagonal()
    union = table.sum(0) + table.sum(1) - hits
    return float(100 * (hits[union > 0] / union[union > 0]).mean())


def run_seed(
    seed: int, training: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], options: Any
) -> dict[str, Any]:
    """All figures of one seed."""
    torch.manual_seed(seed)
    common = Net()
    train(common, training, options.steps, options.batch, options.rate, seed)
    figures: dict[str, Any] = {"seed": seed, "miou_start": mean_iou(common, validation, 16)}
    alone, behind = copy.deepcopy(common), WithCRF(copy.deepcopy(common))
    for name, model in (("without", alone), ("with", behind)):
        figures[f"seconds_per_step_{name}"] = train(
            model, training, options.crf_steps, options.batch, options.crf_rate, seed + 1000
        )
        figures[f"miou_{name}"] = mean_iou(model, validation, 16)
    figures["miou_untrained_crf"] = mean_iou(WithCRF(alone), validation, 16)
    figures["change"] = figures["miou_with"] - figures["miou_without"]
    crf = behind.crf
    figures["learned"] = {
        name: {"diagonal": float(p.diagonal().mean()), "mean": float(p.mean())}
        for name, p in ((n, p.detach()) for n, p in crf.named_parameters())
    }
    return figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints a table and writes the figures."""
    root = Path(os.environ.get("PYDENSE_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=root / "camvid", help="CamVid's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="before the two part")
    parser.add_argument("--crf-steps", type=int, default=200, help="after that, each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--crf-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    if not options.data.is_dir():
        sys.exit(f"no pictures in {options.data}: see --data")
    torch.set_num_threads(options.threads)
    training, validation = load(options.data, "train"), load(options.data, "val")
    rows = []
    for seed in options.seeds:
        rows.append(run_seed(seed, training, validation, options))
        row = rows[-1]
        print(
            f"seed {seed}: without {row['miou_without']:.2f}, with {row['miou_with']:.2f}, "
            f"change {row['change']:+.2f}; untrained CRF {row['miou_untrained_crf']:.2f}; "
            f"{row['seconds_per_step_without']:.3f} and {row['seconds_per_step_with']:.3f} s/step",
            flush=True,
        )
    changes = [row["change"] for row in rows]
    result = {
        "title": "CamVid (120 x 90, 11 classes): mean IoU in percent, without and with CRFasRNN",
        "commit": _machine.commit(),
        "machine": _machine.describe(("torch", "numpy")),
        "options": {
            key: value for key, value in vars(options).items() if key not in ("data", "output")
        },
        "crf": CRF,
        "pictures": {"training": len(training[0]), "validation": len(validation[0])},
        "runs": rows,
        "change": {
            "mean": statistics.fmean(changes),
            "standard_deviation": statistics.stdev(changes) if len(changes) > 1 else None,
        },
    }
    spread = result["change"]["standard_deviation"]
    print(
        f"change: {result['change']['mean']:+.2f}"
        + ("" if spread is None else f" +- {spread:.2f} over {len(changes)} seeds")
    )
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
