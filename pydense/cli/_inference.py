# SPDX-License-Identifier: Apache-2.0
"""The refinement itself: annotation -> unary energies -> dense CRF -> probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._errors import CommandError, reason

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

    from ._annotations import Annotation

NORMALIZATIONS = {
    "symmetric": "NORMALIZE_SYMMETRIC",
    "before": "NORMALIZE_BEFORE",
    "after": "NORMALIZE_AFTER",
    "none": "NO_NORMALIZATION",
}


@dataclass(frozen=True)
class Parameters:
    """Parameters of the CRF; the defaults are those of pydensecrf's example.

    Attributes:
        gaussian_sxy: standard deviation of the smoothness kernel in pixels.
        gaussian_compat: Potts weight of the smoothness kernel; 0 leaves the kernel out.
        bilateral_sxy: standard deviation of the appearance kernel in pixels.
        bilateral_srgb: standard deviation of the appearance kernel in 8-bit colour steps.
        bilateral_compat: Potts weight of the appearance kernel; 0 leaves the kernel out.
        iterations: mean-field updates.
        normalization: a key of `NORMALIZATIONS`.
        gt_prob: how far an annotated label is trusted, in (0, 1); labels only.
    """

    gaussian_sxy: float = 3.0
    gaussian_compat: float = 3.0
    bilateral_sxy: float = 80.0
    bilateral_srgb: float = 13.0
    bilateral_compat: float = 10.0
    iterations: int = 5
    normalization: str = "symmetric"
    gt_prob: float = 0.7


def unary_energy(annotation: Annotation, gt_prob: float) -> NDArray[np.float32]:
    """Return -log of how likely each label is before the photo is looked at, (L, H*W).

    A labelled pixel has its label with probability `gt_prob`, the other labels share the rest
    equally; an unknown pixel has all labels equally. Probabilities are clipped to 1e-5.
    """
    from pydense.densecrf import utils

    if annotation.probabilities is not None:
        return utils.unary_from_softmax(annotation.probabilities)
    assert annotation.labels is not None
    return utils.unary_from_labels(
        annotation.labels, len(annotation.ids), gt_prob, zero_unsure=annotation.has_unknown
    )


def infer(
    image: NDArray[np.uint8],
    unary: NDArray[np.float32],
    parameters: Parameters,
    package: tuple[ModuleType, ModuleType] | None = None,
) -> NDArray[np.float32]:
    """Run the mean field and return the marginal probabilities Q.

    The features are those of pydensecrf's example, in the same order: (row, column) / sxy for
    the smoothness kernel, (row, column) / sxy and (r, g, b) / srgb for the appearance kernel. The
    lattice is not symmetric in its axes, so another order would give slightly other labels.

    Args:
        image: uint8 (H, W, 3).
        unary: float32 (L, H*W) energies.
        parameters: see `Parameters`.
        package: the modules densecrf and utils; pydense's unless given (pydensecrf's fit too).

    Returns:
        float32 (L, H, W), sums to 1 over the labels.

    Raises:
        CommandError: parameters the lattice cannot represent.
    """
    import numpy as np

    if package is None:
        import pydense.densecrf
        import pydense.densecrf.utils

        package = (pydense.densecrf, pydense.densecrf.utils)
    crf, utils = package
    height, width = image.shape[:2]
    count = unary.shape[0]
    how: dict[str, Any] = {
        "kernel": crf.DIAG_KERNEL,
        "normalization": getattr(crf, NORMALIZATIONS[parameters.normalization]),
    }
    try:
        field = crf.DenseCRF(height * width, count)
        field.setUnaryEnergy(unary)
        if parameters.gaussian_compat:
            spread = (parameters.gaussian_sxy,) * 2
            features = utils.create_pairwise_gaussian(sdims=spread, shape=(height, width))
            field.addPairwiseEnergy(features, compat=parameters.gaussian_compat, **how)
        if parameters.bilateral_compat:
            features = utils.create_pairwise_bilateral(
                sdims=(parameters.bilateral_sxy,) * 2,
                schan=(parameters.bilateral_srgb,) * 3,
                img=image,
                chdim=2,
            )
            field.addPairwiseEnergy(features, compat=parameters.bilateral_compat, **how)
        marginals = np.asarray(field.inference(parameters.iterations), dtype=np.float32)
    except (ValueError, OverflowError) as error:
        raise CommandError(reason(error)) from None
    return marginals.reshape(count, height, width)


def refine(
    image: NDArray[np.uint8], annotation: Annotation, parameters: Parameters
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Refine an annotation against its photo.

    Returns:
        For every pixel (H, W) the number of the most probable label in `annotation`, and the
        probabilities (L, H, W).
    """
    marginals = infer(image, unary_energy(annotation, parameters.gt_prob), parameters)
    return marginals.argmax(axis=0), marginals
