# SPDX-License-Identifier: Apache-2.0
"""Pictures, unaries and parameter sets of the dense-CRF benchmark, and what its traffic amounts to.

The photos are those that ship inside the scikit-image wheel, so nothing is downloaded, and, where
the test data is there, some of Pascal VOC 2012, which are read in place and not passed on. The
label scores are synthetic: smooth random fields and noise from a fixed seed, ambiguous on purpose,
so that inference has something to decide. Timing does not depend on them; the label comparison
does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import ROOT

ITERATIONS = 10

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Parameters:
    """Standard deviations (pixels, grey levels) and Potts weights of the two kernels."""

    gaussian_sxy: float
    gaussian_weight: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_weight: float

    def __str__(self) -> str:
        return (
            f"{self.gaussian_sxy:g}/w{self.gaussian_weight:g} + "
            f"{self.bilateral_sxy:g},{self.bilateral_srgb:g}/w{self.bilateral_weight:g}"
        )


PARAMETERS: Mapping[str, Parameters] = {
    "default": Parameters(3, 3, 80, 13, 10),  # the example of pydensecrf's README
    "deeplab": Parameters(1, 3, 67, 3, 4),  # DeepLab on Pascal VOC
    "crfrnn": Parameters(3, 3, 160, 3, 5),  # CRF as RNN
}


@dataclass(frozen=True)
class Problem:
    """One picture with one parameter set."""

    picture: str
    height: int
    width: int
    parameters: str
    labels: int
    plain_torch: bool = False
    """Whether the plain-torch reference runs too."""

    @property
    def name(self) -> str:
        """``picture-HxW/parameters/L labels`` without blanks."""
        return f"{self.picture}-{self.height}x{self.width}/{self.parameters}/{self.labels}-labels"


PROBLEMS: tuple[Problem, ...] = (
    Problem("coffee", 321, 481, "default", 21, plain_torch=True),
    Problem("coffee", 321, 481, "deeplab", 21, plain_torch=True),
    Problem("coffee", 321, 481, "crfrnn", 21),
    Problem("coffee", 321, 481, "default", 2),
    Problem("chelsea", 300, 451, "deeplab", 21),  # fur: a large lattice
    Problem("astronaut", 512, 512, "default", 21),
    Problem("voc-2007_000346", 375, 500, "default", 21),
    Problem("voc-2007_000346", 375, 500, "deeplab", 21),
    Problem("voc-2007_000129", 500, 334, "default", 21),
    Problem("voc-2007_000129", 500, 334, "deeplab", 21),
    Problem("voc-2007_001284", 375, 500, "default", 21, plain_torch=True),  # textured
    Problem("voc-2007_001284", 375, 500, "deeplab", 21, plain_torch=True),
)
QUICK: tuple[Problem, ...] = (
    Problem("coffee", 60, 90, "default", 21, plain_torch=True),
    Problem("coffee", 60, 90, "deeplab", 2),
)
TINY = Problem("noise", 16, 16, "default", 21)


def voc_file(picture: str) -> Path:
    """The file of ``voc-<number>``; the folder is that of the tests."""
    default = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("PYDENSE_TEST_DATA", default)) / "crf" / "convcrf_voc"
    return folder / f"{picture.removeprefix('voc-')}_0img.png"


def available(problems: Sequence[Problem]) -> list[Problem]:
    """The problems whose pictures are on this machine."""
    return [p for p in problems if not p.picture.startswith("voc-") or voc_file(p.picture).exists()]


def resize(image: Array, height: int, width: int) -> Array:
    """Bilinear resampling of an (H, W, C) array with pixel centres at half-integers."""

    def taps(size: int, out: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Array]:
        at = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
        low = np.minimum(at.astype(np.intp), max(size - 2, 0))
        return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)

    top, bottom, wy = taps(image.shape[0], height)
    left, right, wx = taps(image.shape[1], width)
    rows = image[top] * (1 - wy)[:, None, None] + image[bottom] * wy[:, None, None]
    mixed = rows[:, left] * (1 - wx)[:, None] + rows[:, right] * wx[:, None]
    return np.asarray(mixed, np.float32)


def load_picture(name: str, height: int, width: int) -> NDArray[np.uint8]:
    """A photo as (height, width, 3) uint8, C-contiguous and writeable: pydensecrf needs that.

    ``voc-...`` is read from the test data, ``noise`` is made, everything else is scikit-image's.
    """
    if name == "noise":
        return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    if name.startswith("voc-"):
        from PIL import Image

        with Image.open(voc_file(name)) as file:
            photo = np.array(file.convert("RGB"))
    else:
        from skimage import data

        photo = np.ascontiguousarray(getattr(data, name)()[..., :3])
    if photo.shape[:2] == (height, width):
        return photo.astype(np.uint8, copy=False)
    smaller = np.rint(resize(photo.astype(np.float32), height, width)).astype(np.uint8)
    return np.ascontiguousarray(smaller)


def make_unary(height: int, width: int, labels: int, seed: int = 0) -> Array:
    """Negative log-probabilities (labels, height * width) of smooth random scores with noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((height // 24 + 2, width // 24 + 2, labels), dtype=np.float32)
    noise = rng.standard_normal((height, width, labels), dtype=np.float32)
    scores = 3.0 * resize(coarse, height, width) + 0.5 * noise
    scores -= scores.max(axis=-1, keepdims=True)
    energy = np.log(np.exp(scores).sum(axis=-1, keepdims=True)) - scores
    return np.ascontiguousarray(energy.reshape(-1, labels).T.astype(np.float32))


def features(image: NDArray[np.uint8], p: Parameters) -> tuple[Array, Array]:
    """Features (d, N) of the kernels: (x, y) / sxy, and (x, y) / sxy with the colours / srgb."""
    height, width = image.shape[:2]
    y, x = (axis.reshape(-1).astype(np.float32) for axis in np.mgrid[:height, :width])
    place = np.stack([x, y])
    colour = image.reshape(-1, 3).T.astype(np.float32)
    both = np.concatenate([place / p.bilateral_sxy, colour / p.bilateral_srgb])
    return np.ascontiguousarray(place / p.gaussian_sxy), np.ascontiguousarray(both)


def moved_bytes(points: int, labels: int, lattices: Mapping[int, int]) -> dict[str, float]:
    """Bytes that inference by lattices has to move if no cache outlives a pass.

    With N points, L labels, float32 values, and for each kernel of d dimensions M lattice vertices:

    * build: each kernel writes a vertex number (4 B) and a weight (4 B) for each of the d + 1
      corners of each point's simplex, and two neighbours (8 B) per vertex and axis; its
      normalisation is one filter pass with one channel, counted like an iteration with L = 1.
    * an iteration, with slicing, softmax and the next splat fused so that Q itself is never
      stored: it reads the unary energies (4 N L) and, per kernel, numbers and weights (8 N (d +
      1)); each of the d + 1 blurs reads and writes all values (8 M L) and reads the neighbours (8
      M); splatting writes and slicing reads them once more (8 M L).
    * the end writes Q once (4 N L).

    A lattice that fits the last-level cache is blurred there and can beat this figure; a lattice
    that does not, cannot.

    Args:
        points: N.
        labels: L.
        lattices: Number of vertices by dimension d.
    """

    def kernel(d: int, vertices: int, channels: int) -> float:
        corners = 8.0 * points * (d + 1)
        blur = (d + 1) * (8.0 * vertices * channels + 8.0 * vertices)
        return corners + blur + 8.0 * vertices * channels

    build = sum(
        8.0 * (d + 1) * (points + m) + kernel(d, m, 1) + 4.0 * points for d, m in lattices.items()
    )
    iteration = 4.0 * points * labels + sum(kernel(d, m, labels) for d, m in lattices.items())
    return {"build": build, "inference": ITERATIONS * iteration + 4.0 * points * labels}


def operations(points: int, labels: int, lattices: Mapping[int, int]) -> dict[str, float]:
    """Floating-point operations of inference: the other limit, never the nearer one on a CPU.

    Per iteration, value and corner: a multiply-add in the splat and one in the slice; per value
    and axis three operations of blur; per point and label about 20 for the exponential and the
    division.
    """
    each = sum(labels * (d + 1) * (4.0 * points + 3.0 * m) for d, m in lattices.items())
    return {"inference": ITERATIONS * (each + 20.0 * points * labels)}
