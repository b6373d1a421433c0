# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802, N803
# Method and argument names are pydensecrf's and part of the interface (N802, N803).
"""The models: ``DenseCRF`` over arbitrary features, ``DenseCRF2D`` over the pixels of an image."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from pydense import _core
from pydense.densecrf import _features, _validate
from pydense.densecrf._enums import KernelType, NormalizationType
from pydense.densecrf._unary import Unary, logistic_energy

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class DenseCRF:
    """Fully connected CRF over ``nvar`` points with features of any dimension.

    Mean-field inference repeats, for all points at once,
    ``Q <- softmax(-U - sum_k mu_k (K_k Q))`` from ``Q = softmax(-U)``, where ``K_k`` is a Gaussian
    kernel (own point included) on a permutohedral lattice and ``mu_k`` the label compatibility. The
    module's docstring has the table of signs.

    Args:
        nvar: Number of points N, at least 1.
        nlabels: Number of labels L, 1 to 65536.

    Raises:
        ValueError: A number is out of range, or the (L, N) table is beyond the address space.
        TypeError: An argument is no integer.
    """

    _width = 0  # of the picture whose pixels the points are, 0 where they have no order

    def __init__(self, nvar: int, nlabels: int) -> None:
        op = type(self).__name__
        self._nvar = _validate.integer(op, "nvar", nvar, 1)
        self._nlabels = _validate.integer(op, "nlabels", nlabels, 1, _validate.MAX_LABELS)
        if self._nvar * self._nlabels > sys.maxsize // 4:
            raise ValueError(
                f"{op}: nvar * nlabels must be addressable, got {self._nvar} * {self._nlabels}"
            )
        self._field = _core.MeanField(self._nvar, self._nlabels, self._width)

    def setUnary(self, u: Unary) -> None:
        """Set the unary energy from a Unary object; it replaces an earlier one.

        Raises:
            ValueError: Its table is not (L, N), or holds NaN, -inf or a point without a finite
                entry.
            TypeError: ``u`` is not a ``Unary``.
        """
        if not isinstance(u, Unary):
            raise TypeError(f"setUnary: u must be a Unary, got {type(u).__name__}")
        self._set_energy("setUnary", "u", u._energy)

    def setUnaryEnergy(self, u: ArrayLike, f: ArrayLike | None = None) -> None:
        """Set the unary energy, usually -log p; it replaces an earlier one and is copied.

        Without any unary energy all labels start out equal.

        Args:
            u: (L, N) energies, any real dtype and strides. +inf forbids a label at a point. With
                ``f``, the (L, D) weights of a logistic energy instead.
            f: (D, N) features of a logistic energy ``u @ f``.

        Raises:
            ValueError: Wrong shape, NaN, -inf, or a point whose energies are all +inf.
            TypeError: An argument does not hold real numbers.
        """
        energy = u if f is None else logistic_energy("setUnaryEnergy", "u", u, f)
        self._set_energy("setUnaryEnergy", "u" if f is None else "u @ f", energy)

    def addPairwiseEnergy(
        self,
        features: ArrayLike,
        compat: ArrayLike,
        kernel: KernelType | int = KernelType.DIAG_KERNEL,
        normalization: NormalizationType | int = NormalizationType.NORMALIZE_SYMMETRIC,
    ) -> None:
        """Add the kernel ``exp(-|f_i - f_j|^2 / 2)``.

        Args:
            features: (d, N), already divided by their standard deviations; any real dtype and
                strides, d up to 32.
            compat: Label compatibility: number, (L,) or (L, L); see the table in the module.
            kernel: Checked and ignored, see ``KernelType``.
            normalization: See ``NormalizationType``.

        Raises:
            ValueError: Wrong shape, NaN or inf, features too large for the lattice's integer
                coordinates, an unknown enum value.
            TypeError: An argument does not hold real numbers.
        """
        op = "addPairwiseEnergy"
        self._add(op, _validate.features(op, features, self._nvar), compat, kernel, normalization)

    def inference(self, niter: int) -> NDArray[np.float32]:
        """Run exactly ``niter`` updates (no early stop) and return the marginals Q.

        Args:
            niter: Number of updates; 0 gives softmax(-U). Negative numbers, which the original
                takes for 0, are an error.

        Returns:
            (L, N) float32, a new array; every column sums to 1. Labels are the fastest axis in
            memory, as in the original.

        Raises:
            ValueError: ``niter`` is negative or above 2^31 - 1.
            TypeError: ``niter`` is no integer.
        """
        count = _validate.integer("inference", "niter", niter, 0, _validate.MAX_ITERATIONS)
        return self._field.run(count)

    def startInference(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """First marginals for ``stepInference``: softmax(-U), uniform without a unary energy.

        Returns:
            Q (L, N) float32, and two empty arrays that stand for the original's scratch space.
        """
        empty = (0, 0)
        return self._field.start(), np.empty(empty, np.float32), np.empty(empty, np.float32)

    def stepInference(
        self, Q: NDArray[np.float32], tmp1: object = None, tmp2: object = None
    ) -> None:
        """Update ``Q`` in place, once. ``tmp1`` and ``tmp2`` are not needed and not looked at.

        Args:
            Q: (L, N) float32 marginals, writeable, any strides.
            tmp1: Ignored.
            tmp2: Ignored.

        Raises:
            ValueError: Wrong shape, read-only, or not probabilities.
            TypeError: Not a float32 array, which cannot be updated in place.
        """
        op = "stepInference"
        if not isinstance(Q, np.ndarray) or Q.dtype != np.float32:
            got = Q.dtype if isinstance(Q, np.ndarray) else type(Q).__name__
            raise TypeError(f"{op}: Q must be a float32 array, got {got}")
        if not Q.flags.writeable:
            raise ValueError(f"{op}: Q must be writeable, got a read-only array")
        _validate.marginals(op, Q, self._nlabels, self._nvar)
        self._field.step(Q)

    def klDivergence(self, Q: ArrayLike) -> float:
        """The mean-field objective as pydensecrf prints it.

        ``sum Q log Q + sum U Q + sum_k sum Q (mu_k K_k Q)``, without the 1/2 on the pairwise term
        that the energy has, and up to the constant log Z.

        Raises:
            ValueError: Wrong shape or not probabilities.
            TypeError: ``Q`` does not hold real numbers.
        """
        marginals = _validate.marginals("klDivergence", Q, self._nlabels, self._nvar)
        return self._field.kl_divergence(_validate.float32(marginals))

    def _set_energy(self, op: str, name: str, energy: ArrayLike) -> None:
        self._field.set_unary(_validate.unary(op, name, energy, self._nlabels, self._nvar))

    def _add(
        self,
        op: str,
        features: NDArray[np.float32],
        compat: ArrayLike,
        kernel: object,
        normalization: object,
    ) -> None:
        weights = _validate.compatibility(op, compat, self._nlabels)
        _validate.kernel(op, kernel)
        norm = _validate.normalization(op, normalization)
        try:
            lattice = _core.Lattice(features, norm, self._width)
        except ValueError as error:
            # The text starts with the core's own operator; people know what they called.
            raise ValueError(f"{op}: {str(error).partition(': ')[2]}") from None
        # The core's matrices attract where they are positive, pydensecrf's repel.
        self._field.add_pairwise(lattice, weights if weights.ndim == 0 else -weights)


class DenseCRF2D(DenseCRF):
    """``DenseCRF`` over the pixels of a ``w`` x ``h`` image, in row order (pixel = y * w + x).

    Mind the order: **width first**, whereas images are (height, width, channels).

    Args:
        w: Width, at least 1.
        h: Height, at least 1.
        nlabels: Number of labels L, 1 to 65536.

    Raises:
        ValueError: A number is out of range.
        TypeError: An argument is no integer.
    """

    def __init__(self, w: int, h: int, nlabels: int) -> None:
        op = type(self).__name__
        self._w = _validate.integer(op, "w", w, 1)
        self._h = _validate.integer(op, "h", h, 1)
        self._width = self._w
        super().__init__(self._w * self._h, nlabels)

    def addPairwiseGaussian(
        self,
        sxy: ArrayLike,
        compat: ArrayLike,
        kernel: KernelType | int = KernelType.DIAG_KERNEL,
        normalization: NormalizationType | int = NormalizationType.NORMALIZE_SYMMETRIC,
    ) -> None:
        """Add a smoothness kernel on the features (x / sx, y / sy).

        Args:
            sxy: Standard deviation in pixels: a number or (sx, sy).
            compat: Label compatibility: number, (L,) or (L, L); see the table in the module.
            kernel: Checked and ignored, see ``KernelType``.
            normalization: See ``NormalizationType``.

        Raises:
            ValueError: ``sxy`` is not positive and finite or so small that the lattice's integer
                coordinates overflow; wrong shapes, NaN or inf in ``compat``; an unknown enum value.
            TypeError: An argument does not hold real numbers.
        """
        op = "addPairwiseGaussian"
        spatial = _validate.sigmas(op, "sxy", sxy, 2)
        features = np.empty((2, self._nvar), np.float32)
        _features.write_positions(features, (self._h, self._w), (1, 0), spatial)
        self._add(op, features, compat, kernel, normalization)

    def addPairwiseBilateral(
        self,
        sxy: ArrayLike,
        srgb: ArrayLike,
        rgbim: ArrayLike,
        compat: ArrayLike,
        kernel: KernelType | int = KernelType.DIAG_KERNEL,
        normalization: NormalizationType | int = NormalizationType.NORMALIZE_SYMMETRIC,
    ) -> None:
        """Add an appearance kernel on the features (x / sx, y / sy, c_0 / s_0, c_1 / s_1, ...).

        Args:
            sxy: Standard deviation in pixels: a number or (sx, sy).
            srgb: Standard deviation per channel, in the image's own units: a number or one per
                channel.
            rgbim: (h, w), (h, w, 1), (h, w, 3) or any number of channels; integers or floats, any
                strides. pydensecrf takes only contiguous uint8 (h, w, 3).
            compat: Label compatibility: number, (L,) or (L, L); see the table in the module.
            kernel: Checked and ignored, see ``KernelType``.
            normalization: See ``NormalizationType``.

        Raises:
            ValueError: A sigma is not positive and finite or so small that the lattice's integer
                coordinates overflow; wrong shapes; NaN or inf; an unknown enum value.
            TypeError: An argument does not hold real numbers.
        """
        op = "addPairwiseBilateral"
        spatial = _validate.sigmas(op, "sxy", sxy, 2)
        channels: NDArray[Any] = _validate.image(op, "rgbim", rgbim, self._h, self._w)
        colour = _validate.sigmas(op, "srgb", srgb, len(channels))
        features = np.empty((2 + len(channels), self._nvar), np.float32)
        _features.write_positions(features[:2], (self._h, self._w), (1, 0), spatial)
        _features.write_channels(features[2:], channels, colour)
        self._add(op, features, compat, kernel, normalization)
