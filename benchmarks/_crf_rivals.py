# SPDX-License-Identifier: Apache-2.0
"""The packages that the dense-CRF benchmark compares, each called as its users call it.

* ``pydense``: the layer ``pydense.nn.DenseCRF`` on torch tensors, with an empty lattice cache.
* ``pydense warm``: the same; the lattice of the Gaussian kernel, which depends on nothing but the
  size of the picture, is still there from the call before.
* ``pydense.densecrf``: the drop-in for pydensecrf, on NumPy arrays.
* ``pydensecrf``: always one thread, with SSE2. Not measured where it is not installed.
* ``plain torch``: ``pydense.reference.dense_crf``, the same mean field from torch's own operators.

Building lattices and normalising are part of every call, but for what the cache holds.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._crf_cases import (
    ITERATIONS,
    PARAMETERS,
    TINY,
    Parameters,
    Problem,
    load_picture,
    make_unary,
)
from benchmarks._harness import Rival, stages_of, time_call

COLD, WARM, DROP_IN = "pydense", "pydense warm", "pydense.densecrf"
PYDENSECRF, PLAIN_TORCH = "pydensecrf", "plain torch"
VARIANTS = (WARM, DROP_IN)
CLEAR_GAP = 1e-3  # labels count as decided where the two best probabilities differ by more


@cache
def pydensecrf() -> ModuleType | None:
    """The package, if it is there; otherwise says so once."""
    try:
        return importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        print(f"pydensecrf is not importable ({error}): not measured", file=sys.stderr)
        return None


def clear_cache() -> None:
    """Makes the next call of the torch path a cold one."""
    from pydense.ops import clear_lattice_cache

    clear_lattice_cache()


def build(
    module: ModuleType,
    image: NDArray[np.uint8],
    unary: NDArray[np.float32],
    p: Parameters,
    _: object = None,
) -> Any:
    """Everything that precedes inference, in the calls that both NumPy packages share."""
    height, width = image.shape[:2]
    crf = module.DenseCRF2D(width, height, unary.shape[0])
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=p.gaussian_sxy, compat=p.gaussian_weight)
    crf.addPairwiseBilateral(
        sxy=p.bilateral_sxy, srgb=p.bilateral_srgb, rgbim=image, compat=p.bilateral_weight
    )
    return crf


def infer(crf: Any) -> NDArray[np.float32]:
    """Ten iterations; (L, N) probabilities."""
    return np.asarray(crf.inference(ITERATIONS))


def kernels(p: Parameters) -> dict[str, dict[str, float]]:
    """The keyword arguments of the torch functions."""
    return {
        "gaussian": {"sxy": p.gaussian_sxy, "compat": p.gaussian_weight},
        "bilateral": {
            "sxy": p.bilateral_sxy,
            "srgb": p.bilateral_srgb,
            "compat": p.bilateral_weight,
        },
    }


def torch_layer(
    logits: torch.Tensor, image: torch.Tensor, p: Parameters
) -> Callable[[], torch.Tensor]:
    """``pydense.nn.DenseCRF``: (N, L, H, W) logits and a uint8 image to probabilities."""
    from pydense.nn import DenseCRF

    layer = DenseCRF(**kernels(p), iterations=ITERATIONS)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = layer(logits, image)
            return result

    return call


def plain_torch(
    logits: torch.Tensor, image: torch.Tensor, p: Parameters
) -> Callable[[], torch.Tensor]:
    """``pydense.reference.dense_crf`` on the same tensors."""
    from pydense.reference import dense_crf

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return dense_crf(logits, image, **kernels(p), iterations=ITERATIONS)

    return call


def rivals_of(problem: Problem) -> Mapping[str, Rival]:
    """All rivals of a problem by label, on inputs in the layout that each likes best."""
    p = PARAMETERS[problem.parameters]
    height, width = problem.height, problem.width
    image = load_picture(problem.picture, height, width)
    unary = make_unary(height, width, problem.labels)
    logits = torch.from_numpy(-unary).view(1, problem.labels, height, width)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    layer = torch_layer(logits, pixels, p)
    drop_in = importlib.import_module("pydense.densecrf")
    found: dict[str, Rival] = {
        COLD: layer,
        WARM: layer,
        DROP_IN: {"build": partial(build, drop_in, image, unary, p), "inference": infer},
    }
    module = pydensecrf()
    if module is not None:
        found[PYDENSECRF] = {"build": partial(build, module, image, unary, p), "inference": infer}
    if problem.plain_torch:
        found[PLAIN_TORCH] = plain_torch(logits, pixels, p)
    return found


def prime(label: str) -> None:
    """One call of a rival on a tiny problem."""
    tiny = Problem(TINY.picture, TINY.height, TINY.width, TINY.parameters, TINY.labels, True)
    time_call(stages_of(rivals_of(tiny)[label]))
    clear_cache()


def compare(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Differences of each rival's probabilities from pydense's.

    Returns:
        By rival ``max_abs_dq``; ``labels_differ``, the number of pixels whose best label is
        another; and ``decided_labels_differ``, those among them where, in either result, the two
        best probabilities are more than ``CLEAR_GAP`` apart.
    """
    own = _by_pixel(results[COLD])
    figures: dict[str, dict[str, float]] = {}
    for label, result in results.items():
        if label == COLD:
            continue
        q = _by_pixel(result)
        differ = own.argmax(axis=0) != q.argmax(axis=0)
        gap = np.maximum(_gap(own[:, differ]), _gap(q[:, differ]))
        figures[label] = {
            "max_abs_dq": float(np.abs(own - q).max()),
            "labels_differ": int(differ.sum()),
            "decided_labels_differ": int((gap > CLEAR_GAP).sum()),
        }
    return figures


def _by_pixel(q: Any) -> NDArray[np.float32]:
    """(L, N) from (L, N) or (1, L, H, W)."""
    array = np.asarray(q)
    return array.reshape(array.shape[1], -1) if array.ndim == 4 else array


def _gap(q: NDArray[np.float32]) -> NDArray[np.float32]:
    """The best probability less the second best, by pixel."""
    if len(q) < 2:
        return np.ones(q.shape[1], np.float32)
    best = np.partition(q, -2, axis=0)[-2:]
    return np.asarray(best[1] - best[0])
