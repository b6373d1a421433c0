# SPDX-License-Identifier: Apache-2.0
"""Choosing kernel weights and bandwidths on labelled pictures: grid search, then L-BFGS.

The grid runs on NumPy alone; torch is imported by the refinement, which needs gradients.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pydense.densecrf import _validate
from pydense.densecrf._crf import DenseCRF2D
from pydense.densecrf._enums import NormalizationType

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_OP = "fit"
PARAMETERS = (
    "gaussian_sxy", "gaussian_compat", "bilateral_sxy", "bilateral_srgb", "bilateral_compat",
)  # fmt: skip
_START = dict(zip(PARAMETERS, (3.0, 3.0, 80.0, 13.0, 10.0), strict=True))
# The coarse ranges of DeepLab's cross-validation, its fixed Gaussian kernel included.
DEEPLAB_GRID: Mapping[str, Sequence[float]] = {
    "gaussian_sxy": (3,),
    "gaussian_compat": (3,),
    "bilateral_sxy": (30, 40, 50, 60, 70, 80, 90, 100),
    "bilateral_srgb": (3, 4, 5, 6),
    "bilateral_compat": (3, 4, 5, 6),
}
_METHODS = ("grid", "lbfgs", "grid+lbfgs")
_METRICS = ("miou", "accuracy", "nll")
_SMALLEST = 1e-30  # probability, for its logarithm

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Trial:
    """One set of parameters that was tried."""

    stage: str
    """"start", "grid" or "lbfgs"."""
    parameters: Mapping[str, float]
    score: float
    """Higher is better: mean IoU, accuracy, or minus the mean negative log likelihood."""


@dataclass(frozen=True)
class FitResult:
    """The best parameters and everything that was tried."""

    parameters: Mapping[str, float]
    score: float
    trials: Sequence[Trial] = field(repr=False)
    normalization: NormalizationType = NormalizationType.NORMALIZE_SYMMETRIC
    """With which the parameters were found, and are best."""

    @property
    def gaussian(self) -> dict[str, float]:
        """For ``pydense.nn.DenseCRF(gaussian=...)``, with the same normalization."""
        p = self.parameters
        return {"sxy": p["gaussian_sxy"], "compat": p["gaussian_compat"]}

    @property
    def bilateral(self) -> dict[str, float]:
        """For ``pydense.nn.DenseCRF(bilateral=...)``, with the same normalization."""
        p = self.parameters
        return {
            "sxy": p["bilateral_sxy"], "srgb": p["bilateral_srgb"], "compat": p["bilateral_compat"],
        }  # fmt: skip

    def apply(self, crf: DenseCRF2D, image: ArrayLike) -> None:
        """Add the two kernels to a ``DenseCRF2D`` that has its unary energies."""
        p = self.parameters
        crf.addPairwiseGaussian(
            sxy=p["gaussian_sxy"], compat=p["gaussian_compat"], normalization=self.normalization
        )
        crf.addPairwiseBilateral(
            sxy=p["bilateral_sxy"],
            srgb=p["bilateral_srgb"],
            rgbim=np.asarray(image),
            compat=p["bilateral_compat"],
            normalization=self.normalization,
        )


def fit(
    unaries: Iterable[ArrayLike],
    images: Iterable[ArrayLike],
    labels: Iterable[ArrayLike],
    *,
    method: str = "grid+lbfgs",
    grid: Mapping[str, Sequence[float]] | None = None,
    start: Mapping[str, float] | None = None,
    bandwidths: bool = True,
    iterations: int = 5,
    lbfgs_steps: int = 10,
    metric: str = "miou",
    normalization: NormalizationType = NormalizationType.NORMALIZE_SYMMETRIC,
    ignore_label: int = 255,
    progress: bool | Progress = False,
) -> FitResult:
    """Search kernel weights and bandwidths of a Gaussian and a bilateral kernel.

    ``"grid"`` tries all combinations of ``grid``, as DeepLab's cross-validation does. ``"lbfgs"``
    follows the gradient of the mean negative log likelihood of the right labels, through all
    iterations, in the logarithms of the parameters, so that they stay positive. ``"grid+lbfgs"``
    refines the best point of the grid. The start counts as a trial: the result is never worse than
    it on these pictures.

    Args:
        unaries: One (L, H, W) array of energies (-log p) per picture, as ``setUnaryEnergy`` takes
            them, but with the picture's axes.
        images: One (H, W, 3) or (H, W) array per picture, usually uint8.
        labels: One (H, W) integer array per picture; ``ignore_label`` does not count.
        method: ``"grid"``, ``"lbfgs"`` or ``"grid+lbfgs"``.
        grid: Values by name: ``gaussian_sxy``, ``gaussian_compat`` (weight, positive attracts),
            ``bilateral_sxy``, ``bilateral_srgb``, ``bilateral_compat``. What is not named keeps its
            value in ``start``. None: DeepLab's 128 combinations.
        start: Values that replace 3, 3, 80, 13, 10.
        bandwidths: Whether L-BFGS moves the bandwidths too, beside the weights. The gradient of a
            bandwidth is that of the Gaussian kernel, not of its lattice (see
            ``pydense.ops.dense_crf``), and takes many times as long as that of a weight.
        iterations: Mean-field iterations.
        lbfgs_steps: L-BFGS iterations; each takes one or more forward and backward passes over all
            pictures.
        metric: What the result has to be best in: ``"miou"`` (mean over the labels that occur),
            ``"accuracy"`` or ``"nll"``.
        normalization: Of the kernels.
        ignore_label: The label of unknown pixels.
        progress: True prints a line per trial to stderr; or a function that gets the lines.

    Returns:
        The best parameters, their score on these pictures, and all trials in their order.

    Raises:
        ValueError: No picture, shapes that do not fit, no pixel that counts, labels beyond L, an
            unknown name, parameters that are not positive.
        TypeError: An argument of the wrong type.
        ImportError: L-BFGS without torch.

    Memory: that of one picture's inference, and for L-BFGS what ``pydense.ops.dense_crf`` saves for
    backward, of one picture at a time.

    Example:
        >>> import numpy as np
        >>> from pydense.densecrf import fit
        >>> rng = np.random.default_rng(0)
        >>> truth = np.repeat([[0] * 20 + [1] * 20], 30, axis=0)
        >>> image = (60 + 120 * truth[..., None] + rng.integers(0, 9, (30, 40, 3))).astype("uint8")
        >>> noisy = np.where(rng.random(truth.shape) < 0.3, 1 - truth, truth)
        >>> unary = np.where(noisy == np.arange(2)[:, None, None], 0.5, 1.0)
        >>> grid = {"bilateral_sxy": [5, 20], "bilateral_compat": [0.1, 5]}
        >>> found = fit([unary], [image], [truth], method="grid", grid=grid)
        >>> found.score > 0.99, len(found.trials)
        (True, 5)
    """
    if method not in _METHODS:
        raise ValueError(f"{_OP}: method must be one of {', '.join(_METHODS)}, got {method!r}")
    if metric not in _METRICS:
        raise ValueError(f"{_OP}: metric must be one of {', '.join(_METRICS)}, got {metric!r}")
    normalization = NormalizationType(normalization)
    _validate.integer(_OP, "iterations", iterations, 0)
    _validate.integer(_OP, "lbfgs_steps", lbfgs_steps, 1)
    pictures = _pictures(unaries, images, labels, ignore_label)
    first = {**_START, **_named("start", start or {}, one=True)}
    axes = _named("grid", DEEPLAB_GRID if grid is None else grid, one=False)
    say = _speaker(progress)
    trials: list[Trial] = []

    def attempt(stage: str, parameters: Mapping[str, float]) -> None:
        score = _score(pictures, parameters, iterations, metric, normalization)
        trials.append(Trial(stage, dict(parameters), score))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in parameters.items())
        say(f"{_OP}: {stage}: {metric} {score:.5f} with {shown}")

    def best() -> Trial:
        return max(trials, key=lambda trial: trial.score)  # the first of equals

    attempt("start", first)
    if "grid" in method:
        for values in itertools.product(*axes.values()):
            attempt("grid", {**first, **dict(zip(axes, values, strict=True))})
    if "lbfgs" in method:
        steps = _lbfgs(
            pictures, best().parameters, iterations, lbfgs_steps, bandwidths, normalization, say
        )
        for parameters in steps:
            attempt("lbfgs", parameters)
    found = best()
    return FitResult(found.parameters, found.score, trials, normalization)


@dataclass(frozen=True)
class _Picture:
    unary: NDArray[np.float32]  # (L, H, W)
    image: NDArray[Any]  # (H, W, channels)
    labels: NDArray[np.int64]  # (H, W)
    counts: NDArray[np.bool_]  # (H, W)


def _pictures(
    unaries: Iterable[ArrayLike],
    images: Iterable[ArrayLike],
    labels: Iterable[ArrayLike],
    ignore_label: int,
) -> list[_Picture]:
    rows = [list(unaries), list(images), list(labels)]
    if not rows[0] or len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"{_OP}: unaries, images and labels must be as many, at least 1, got "
            f"{', '.join(str(len(row)) for row in rows)}"
        )
    pictures: list[_Picture] = []
    for index, (u, i, t) in enumerate(zip(*rows, strict=True)):
        unary, image, truth = np.asarray(u, np.float32), np.asarray(i), np.asarray(t)
        if unary.ndim != 3 or (pictures and len(unary) != len(pictures[0].unary)):
            raise ValueError(
                f"{_OP}: unaries[{index}] must have shape (L, H, W) with one L, got {unary.shape}"
            )
        size = unary.shape[1:]
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[:2] != size:
            raise ValueError(
                f"{_OP}: images[{index}] must have shape {size} or ({size[0]}, {size[1]}, "
                f"channels), got {np.shape(i)}"
            )
        if truth.shape != size or truth.dtype.kind not in "iu":
            raise ValueError(
                f"{_OP}: labels[{index}] must be integers of shape {size}, got {truth.dtype} of "
                f"shape {truth.shape}"
            )
        truth = truth.astype(np.int64)
        counts = truth != ignore_label
        wrong = truth[counts & ((truth < 0) | (truth >= len(unary)))]
        if wrong.size:
            raise ValueError(
                f"{_OP}: labels[{index}] must be in [0, {len(unary) - 1}] or {ignore_label}, got "
                f"{wrong[0]}"
            )
        pictures.append(_Picture(unary, image, truth, counts))
    if not any(p.counts.any() for p in pictures):
        raise ValueError(f"{_OP}: labels must have a pixel that is not {ignore_label}, got none")
    return pictures


def _named(name: str, values: Mapping[str, Any], one: bool) -> dict[str, Any]:
    """Positive numbers, or rows of them, by the names of parameters."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{_OP}: {name} must be a mapping, got {type(values).__name__}")
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key not in PARAMETERS:
            raise ValueError(f"{_OP}: {name} must name {', '.join(PARAMETERS)}, got {key!r}")
        row = [float(v) for v in ([value] if one else value)]
        if not row or not all(0 < v < math.inf for v in row):
            raise ValueError(f"{_OP}: {name}[{key!r}] must be positive and finite, got {value!r}")
        result[key] = row[0] if one else row
    return result


def _speaker(progress: bool | Progress) -> Progress:
    if callable(progress):
        return progress
    return (lambda line: print(line, file=sys.stderr)) if progress else (lambda line: None)


def _score(
    pictures: Sequence[_Picture],
    parameters: Mapping[str, float],
    iterations: int,
    metric: str,
    normalization: NormalizationType,
) -> float:
    count = len(pictures[0].unary)
    confusion = np.zeros((count, count), np.int64)
    total = 0.0
    for picture in pictures:
        height, width = picture.labels.shape
        crf = DenseCRF2D(width, height, count)
        crf.setUnaryEnergy(picture.unary.reshape(count, -1))
        p = parameters
        crf.addPairwiseGaussian(
            sxy=p["gaussian_sxy"], compat=p["gaussian_compat"], normalization=normalization
        )
        crf.addPairwiseBilateral(
            sxy=p["bilateral_sxy"],
            srgb=p["bilateral_srgb"],
            rgbim=picture.image,
            compat=p["bilateral_compat"],
            normalization=normalization,
        )
        q = crf.inference(iterations).reshape(count, -1)[:, picture.counts.reshape(-1)]
        truth = picture.labels[picture.counts]
        if metric == "nll":
            right = q[truth, np.arange(len(truth))]
            total += float(np.log(np.maximum(right, _SMALLEST), dtype=np.float64).sum())
        else:
            pairs = truth * count + q.argmax(0)
            confusion += np.bincount(pairs, minlength=count**2).reshape(count, count)
    if metric == "nll":
        return total / sum(int(p.counts.sum()) for p in pictures)
    hits = np.diag(confusion)
    if metric == "accuracy":
        return float(hits.sum() / confusion.sum())
    union = confusion.sum(0) + confusion.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean())


def _lbfgs(
    pictures: Sequence[_Picture],
    parameters: Mapping[str, float],
    iterations: int,
    steps: int,
    bandwidths: bool,
    normalization: NormalizationType,
    say: Progress,
) -> list[dict[str, float]]:
    """The parameters after every step."""
    import torch

    from pydense.ops import dense_crf

    word = (None, "before", "after", "symmetric")[normalization]
    logs = {
        name: torch.tensor(math.log(parameters[name]), dtype=torch.float64) for name in PARAMETERS
    }
    moved = [name for name in PARAMETERS if bandwidths or name.endswith("compat")]
    for name in moved:
        logs[name].requires_grad_()
    points = sum(int(p.counts.sum()) for p in pictures)

    def value(name: str) -> Any:
        # Plain numbers where nothing is learned: their lattices are cached.
        return logs[name].exp().float() if name in moved else parameters[name]

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for picture in pictures:
            colours = picture.image
            if colours.dtype != np.uint8:
                colours = colours.astype(np.float32)
            logits = dense_crf(
                torch.tensor(picture.unary)[None],
                torch.tensor(colours).permute(2, 0, 1)[None],
                gaussian={"sxy": value("gaussian_sxy"), "compat": value("gaussian_compat")},
                bilateral={
                    "sxy": value("bilateral_sxy"),
                    "srgb": value("bilateral_srgb"),
                    "compat": value("bilateral_compat"),
                },
                iterations=iterations,
                normalization=word,
                unary_type="energy",
                output="logits",
            )
            truth = torch.tensor(np.where(picture.counts, picture.labels, -100))[None]
            loss = torch.nn.functional.cross_entropy(logits, truth, reduction="sum") / points
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    optimizer = torch.optim.LBFGS(
        [logs[name] for name in moved], max_iter=1, max_eval=8, line_search_fn="strong_wolfe"
    )
    found: list[dict[str, float]] = []
    for step in range(steps):
        loss = float(optimizer.step(closure))  # type: ignore[no-untyped-call]
        now = {name: float(log.detach().exp()) for name, log in logs.items()}
        if not all(0 < v < math.inf for v in now.values()) or (found and now == found[-1]):
            break
        say(f"{_OP}: lbfgs step {step + 1} of {steps}: nll {loss:.5f}")
        found.append(now)
    return found
