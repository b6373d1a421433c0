# SPDX-License-Identifier: Apache-2.0
r"""Drop-in for ``pydensecrf.densecrf``: dense CRF inference on NumPy arrays, without torch.

Change ``import pydensecrf.densecrf as dcrf`` to ``import pydense.densecrf as dcrf`` and
``from pydensecrf.utils import ...`` to ``from pydense.densecrf.utils import ...``; the names,
argument orders and results are the same.

The model (Krähenbühl and Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials*, NeurIPS 2011) has N points, L labels, unary energies U of shape (L, N) and any number
of pairwise kernels. One mean-field iteration is, for all points at once,

.. math:: Q \leftarrow \mathrm{softmax}\Bigl(-U - \sum_k \mu_k\,(K_k Q)\Bigr)

where :math:`K_k` is a Gaussian kernel between all pairs of points (each point with itself included,
as in the original code though not in the paper), normalised (``NORMALIZE_SYMMETRIC`` by default)
and evaluated on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010).
``inference(n)`` runs exactly n iterations.

**Signs.** What ``compat`` adds to the energy of label l at a point that sees the filtered marginals
:math:`m = K Q`:

================  =====================  ==========================================================
``compat``        added energy           reading
================  =====================  ==========================================================
number ``w``      ``-w * m[l]``          Potts: **positive attracts** equal labels, as usual
``(L,)`` v        ``+v[l] * m[l]``       diagonal: **positive repels**, ``[-w] * L`` equals Potts w
``(L, L)`` M      ``+(M @ m)[l]``        matrix: a cost per pair of labels; ``w * (1 - I)`` equals
                                         Potts w; ``M`` is replaced by ``(M + M.T) / 2``
================  =====================  ==========================================================

**Order of features.** ``DenseCRF2D`` uses (x, y, channels), the functions in
``pydense.densecrf.utils`` use (y, x, channels), as in pydensecrf. The lattice is not symmetric in
its axes, so the two give slightly different results for the same parameters.

**What is different from pydensecrf.**

- Any real dtype and any strides, read-only arrays, grey, float and many-channel images are
  accepted.
- Results are ``numpy.ndarray`` of shape (L, N), not wrappers that need ``numpy.array(Q)``.
- Several threads (``pydense.set_num_threads``); the result does not depend on their number.
- Bad input raises ValueError or TypeError instead of crashing or spreading NaN: sigmas that are not
  positive and finite, a ``compat`` of the wrong size, NaN in unary energies, features beyond the
  range of the lattice's integer coordinates, negative iteration numbers (there taken for 0).
- ``startInference`` without unary energy gives uniform marginals (there: zeros), as ``inference``
  does.
- ``sxy``, ``srgb`` and the like need one value or one per axis or channel, and the constructors
  take no further arguments (there both ignore what is too much).
- ``setUnary`` leaves the Unary object usable (there it is emptied).

What is more: ``fit`` chooses weights and bandwidths on labelled pictures.

Examples:
    Refine a noisy two-label annotation of a picture whose halves differ in colour:

    >>> import numpy as np
    >>> import pydense.densecrf as dcrf
    >>> from pydense.densecrf.utils import unary_from_labels
    >>> rng = np.random.default_rng(0)
    >>> truth = np.repeat([[0] * 20 + [1] * 20], 30, axis=0)
    >>> image = (60 + 120 * truth[..., None] + rng.integers(0, 9, (30, 40, 3))).astype(np.uint8)
    >>> noisy = np.where(rng.random(truth.shape) < 0.3, 1 - truth, truth)
    >>> model = dcrf.DenseCRF2D(40, 30, 2)  # width, height, labels
    >>> model.setUnaryEnergy(unary_from_labels(noisy, 2, gt_prob=0.7, zero_unsure=False))
    >>> model.addPairwiseGaussian(sxy=3, compat=3)
    >>> model.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    >>> refined = np.argmax(model.inference(5), axis=0).reshape(30, 40)
    >>> int((noisy != truth).sum()) > 300, int((refined != truth).sum())
    (True, 0)

    The same, one iteration at a time:

    >>> Q, tmp1, tmp2 = model.startInference()
    >>> for _ in range(5):
    ...     model.stepInference(Q, tmp1, tmp2)
    >>> bool(np.allclose(Q, model.inference(5)))
    True
"""

from pydense.densecrf._crf import DenseCRF, DenseCRF2D
from pydense.densecrf._enums import KernelType, NormalizationType
from pydense.densecrf._fit import DEEPLAB_GRID, FitResult, Trial, fit
from pydense.densecrf._unary import ConstUnary, LogisticUnary, Unary

NO_NORMALIZATION = NormalizationType.NO_NORMALIZATION
NORMALIZE_BEFORE = NormalizationType.NORMALIZE_BEFORE
NORMALIZE_AFTER = NormalizationType.NORMALIZE_AFTER
NORMALIZE_SYMMETRIC = NormalizationType.NORMALIZE_SYMMETRIC
CONST_KERNEL = KernelType.CONST_KERNEL
DIAG_KERNEL = KernelType.DIAG_KERNEL
FULL_KERNEL = KernelType.FULL_KERNEL

__all__ = [
    "CONST_KERNEL",
    "DEEPLAB_GRID",
    "DIAG_KERNEL",
    "FULL_KERNEL",
    "NORMALIZE_AFTER",
    "NORMALIZE_BEFORE",
    "NORMALIZE_SYMMETRIC",
    "NO_NORMALIZATION",
    "ConstUnary",
    "DenseCRF",
    "DenseCRF2D",
    "FitResult",
    "KernelType",
    "LogisticUnary",
    "NormalizationType",
    "Trial",
    "Unary",
    "fit",
]
