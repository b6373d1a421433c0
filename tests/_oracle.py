# SPDX-License-Identifier: Apache-2.0
"""Test oracles in plain NumPy and float64, written from the papers and independent of the C++ core.

``ExactKernel`` is the Gaussian kernel matrix by brute force; ``PermutohedralLattice`` is the
lattice of Adams, Baek and Davis (2010) with a Python dictionary for vertices. Both have ``filter``
(K v) and ``transposed`` (K^T v), so ``MeanField`` runs on either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ExactKernel:
    """K_ij = exp(-|f_i - f_j|^2 / 2) as a full N x N matrix."""

    def __init__(self, features: NDArray) -> None:
        f = np.asarray(features, np.float64)
        squares = (f * f).sum(axis=0)
        self.matrix = np.exp(-0.5 * np.maximum(squares[:, None] + squares - 2 * f.T @ f, 0))

    def filter(self, values: NDArray) -> Array:
        return np.asarray(values, np.float64) @ self.matrix.T

    def transposed(self, values: NDArray) -> Array:
        return np.asarray(values, np.float64) @ self.matrix


class PermutohedralLattice:
    """Splat, blur along the d + 1 axes, slice.

    The lattice is A*_d scaled by d + 1: integer points of the hyperplane sum(x) = 0 whose
    coordinates are all congruent modulo d + 1. A point is the barycentric combination of the d + 1
    vertices of its simplex. Blurring adds half of the two neighbours along an axis; neighbours that
    no point touched do not exist and count as zero.

    Args:
        features: (d, N).
        geometry: dtype of the embedding. The kernel core embeds in float32; on grids, where many
            points sit on the faces between simplices, the simplex choice is only reproducible in
            the same dtype.
    """

    def __init__(self, features: NDArray, geometry: type = np.float64) -> None:
        d, n = features.shape
        remainder0, rank, offset = self._locate(np.asarray(features, geometry), d)

        # Sorted falling, the offsets within the simplex give the barycentric weights: vertex k of
        # the simplex gets the gap between the (d-k)-th and the (d-k+1)-th largest one.
        falling = np.take_along_axis(offset, np.argsort(rank, axis=0), axis=0).astype(np.float64)
        falling /= d + 1
        self.weights = np.empty((d + 1, n))
        self.weights[0] = 1 - falling[0] + falling[d]
        for k in range(1, d + 1):
            self.weights[k] = falling[d - k] - falling[d - k + 1]

        # Vertex k adds k to every coordinate, and takes d + 1 from the k coordinates of highest
        # rank.
        self.vertices: dict[tuple[int, ...], int] = {}
        self.index = np.empty((d + 1, n), np.int64)
        for k in range(d + 1):
            keys = remainder0 + np.where(rank > d - k, k - (d + 1), k)
            for point, key in enumerate(map(tuple, keys.T.tolist())):
                self.index[k, point] = self.vertices.setdefault(key, len(self.vertices))

        count = len(self.vertices)
        self.neighbours = np.full((d + 1, 2, count), count, np.int64)
        for key, vertex in self.vertices.items():
            for axis in range(d + 1):
                for side, sign in enumerate((-1, 1)):
                    moved = tuple(
                        c - sign * d if i == axis else c + sign for i, c in enumerate(key)
                    )
                    self.neighbours[axis, side, vertex] = self.vertices.get(moved, count)
        self.alpha = 1 / (1 + 2.0**-d)

    @staticmethod
    def _locate(features: NDArray, d: int) -> tuple[NDArray, NDArray, NDArray]:
        """Nearest remainder-0 point, ranks of the coordinates' offsets (0 = largest), offsets."""
        real = features.dtype.type
        # With blur (1/2, 1, 1/2) on d + 1 axes this spacing gives the filter unit variance. In
        # float32 it is rounded where pydensecrf rounds it: far from the origin one bit moves a
        # point.
        i = np.arange(d, dtype=np.float64)
        deviation = np.float64(real(np.sqrt(2 / 3) * (d + 1)))
        spacing = (1 / np.sqrt((i + 2) * (i + 1)) * deviation).astype(features.dtype)
        scaled = features * spacing[:, None]
        elevated = np.empty((d + 1, features.shape[1]), features.dtype)
        total = np.zeros(features.shape[1], features.dtype)
        for j in range(d, 0, -1):
            elevated[j] = total - real(j) * scaled[j - 1]
            total = total + scaled[j - 1]
        elevated[0] = total

        rounded = np.rint(elevated * (real(1) / real(d + 1))).astype(np.int64)
        excess = rounded.sum(axis=0)
        remainder0 = rounded * (d + 1)
        offset = elevated - remainder0.astype(features.dtype)
        order = np.argsort(-offset, axis=0, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(d + 1)[:, None], axis=0)
        # The rounded point may lie off the hyperplane: move the coordinates that were rounded
        # worst.
        rank += excess
        remainder0 += (d + 1) * ((rank < 0).astype(np.int64) - (rank > d))
        rank += (d + 1) * ((rank < 0).astype(np.int64) - (rank > d))
        return remainder0, rank, elevated - remainder0.astype(features.dtype)

    def _apply(self, values: NDArray, axes: range) -> Array:
        v = np.asarray(values, np.float64)
        rows = np.zeros((len(self.vertices) + 1, len(v)))
        for index, weight in zip(self.index, self.weights, strict=True):
            np.add.at(rows, index, (v * weight).T)
        for axis in axes:
            left, right = self.neighbours[axis]
            rows[:-1] += 0.5 * (rows[left] + rows[right])
        result = np.zeros_like(v)
        for index, weight in zip(self.index, self.weights, strict=True):
            result += rows[index].T * weight
        return self.alpha * result

    def filter(self, values: NDArray) -> Array:
        return self._apply(values, range(len(self.neighbours)))

    def transposed(self, values: NDArray) -> Array:
        """K^T from the matrix of ``filter`` itself: no reversal of axes enters the oracle."""
        matrix = self.filter(np.eye(self.weights.shape[1]))  # symmetric input: column j = K e_j
        return np.asarray(values, np.float64) @ matrix.T


class MeanField:
    """Mean-field inference on any kernels with ``filter``.

    Args:
        unary: (L, N).
        kernels: (kernel, compat, normalization) with compat (), (L,) or (L, L) in pydensecrf's
            signs and normalization "none", "before", "after" or "symmetric".
    """

    def __init__(self, unary: NDArray, kernels: list) -> None:
        self.unary = np.asarray(unary, np.float64)
        labels, points = self.unary.shape
        self.terms = []
        for kernel, compat, normalization in kernels:
            mass = kernel.filter(np.ones((1, points)))[0] + 1e-20
            before = {"before": 1 / mass, "symmetric": mass**-0.5}.get(
                normalization, np.ones(points)
            )
            after = {"after": 1 / mass, "symmetric": mass**-0.5}.get(normalization, np.ones(points))
            c = np.asarray(compat, np.float64)
            if c.ndim == 0:
                matrix = -c * np.eye(labels)
            elif c.ndim == 1:
                matrix = np.diag(c)
            else:
                matrix = (c + c.T) / 2
            self.terms.append((kernel, matrix, before, after))

    @staticmethod
    def _softmax(z: Array) -> Array:
        e = np.exp(z - z.max(axis=0))
        return e / e.sum(axis=0)

    def _messages(self, q: Array) -> Array:
        total = np.zeros_like(q)
        for kernel, matrix, before, after in self.terms:
            total += matrix @ (kernel.filter(q * before) * after)
        return total

    def start(self) -> Array:
        return self._softmax(-self.unary)

    def step(self, q: Array) -> Array:
        return self._softmax(-self.unary - self._messages(q))

    def run(self, iterations: int) -> Array:
        q = self.start()
        for _ in range(iterations):
            q = self.step(q)
        return q

    def kl_divergence(self, q: Array) -> float:
        entropy = (q * np.log(np.maximum(q, 1e-20))).sum()
        return float(entropy + (q * self.unary).sum() + (q * self._messages(q)).sum())
