# SPDX-License-Identifier: Apache-2.0
"""The permutohedral lattice of Adams, Baek and Davis (2010): splat, blur, slice.

The lattice A*_d, scaled by d + 1, has the integer points of the plane sum(x) = 0 in R^(d+1) whose
coordinates all leave the same remainder modulo d + 1. Features are lifted onto that plane; a point
lies in a simplex with one vertex of each remainder 0..d, and its barycentric coordinates there are
its weights. With

* base, the multiple of d + 1 nearest to the point that lies on the plane, and
* rank_i, the position of coordinate i when point - base is sorted in falling order,

the vertex of remainder k has the coordinates base_i + k - (d + 1 where rank_i > d - k). A filter
*splats* each point's values on its vertices, *blurs* along the axes 0..d, one after the other, with
the stencil (1/2, 1, 1/2), and *slices*: reads back with the same weights, times
alpha = 1 / (1 + 2^-d). Only vertices that a point touches exist; what is blurred onto others is
lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pydense.reference._kernel import Kernel, filter_values, scales

_MAX_COORDINATE = 1 << 20  # beyond it float32 is too coarse to tell the vertices apart
_MIN_SHARE = 1e-3  # of the row sum that is left without the point itself; less is cancellation


def _elevate(features: Tensor) -> Tensor:
    """Lifts (d, n) features onto the plane in R^(d+1), one standard deviation being 1 unit.

    The blurs together have the standard deviation sqrt(2/3) (d + 1); the orthogonal basis vector i
    of the plane, (1, .., 1, -(i + 1), 0, ..), has the length sqrt((i + 1) (i + 2)).
    """
    dims = len(features)
    # Rounded where pydensecrf rounds: on a grid many points lie between two simplices, and the
    # last bit decides.
    deviation = features.new_tensor(math.sqrt(2 / 3) * (dims + 1)).item()
    lengths = [math.sqrt((i + 1) * (i + 2)) for i in range(dims)]
    scaled = (
        features * features.new_tensor([deviation * (1 / length) for length in lengths])[:, None]
    )
    rows = []
    total = torch.zeros_like(features[0])
    for j in range(dims, 0, -1):
        rows.append(total - scaled[j - 1] * j)
        total = total + scaled[j - 1]
    return torch.stack([total, *reversed(rows)])


def _enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Base / (d + 1), ranks, and weights by remainder; each (d + 1, n), the first two int64."""
    period = len(elevated)
    nearest = torch.round(elevated * (1 / period))
    offset = elevated - nearest * period
    quotient = nearest.long()
    rank = torch.zeros_like(quotient)
    for i in range(period):
        for j in range(i + 1, period):
            behind = offset[i] < offset[j]
            rank[i] += behind
            rank[j] += ~behind
    # Rounding may leave the plane: the coordinates with the largest errors go back by one period.
    rank = rank + quotient.sum(dim=0)
    step = (rank < 0).long() - (rank >= period).long()
    rank = rank + period * step
    quotient = quotient + step
    offset = offset - (step * period).to(offset.dtype)
    falling = torch.zeros_like(offset).scatter(0, rank, offset) * (1 / period)
    gaps = (falling[:-1] - falling[1:]).flip(0)
    return quotient, rank, torch.cat([falling[-1:] + (1 - falling[:1]), gaps])


def _distinct(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted distinct codes, the number of each entry's code, sorting order, starts of the runs."""
    ordered, order = codes.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    number = torch.empty_like(order)
    number[order] = first.cumsum(0) - 1
    return ordered[first], number, order, first.nonzero()[:, 0]


class _VertexTable:
    """Numbers the distinct vertices and finds them again.

    A vertex is a tuple of integers, given as one tensor per component. They are packed into 63 bits
    where they fit. Where they do not, the number that the first components have among themselves
    replaces these, and packing goes on.

    Args:
        columns: The components of all entries.
        sizes: Component i is within 0..sizes[i] - 1, here and in :meth:`find`.
    """

    def __init__(self, columns: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._groups: list[list[int]] = [[]]
        self._tables: list[Tensor] = []
        span = 1
        for column, size in enumerate(sizes):
            if span * size >= 1 << 63:
                self._groups.append([])
                span = columns[0].numel() + 1
            self._groups[-1].append(column)
            span *= size
        self.number: Tensor | None = None
        for group in self._groups:
            codes = self._pack(columns, group, self.number)
            table, self.number, self.order, self.starts = _distinct(codes)
            self._tables.append(table)

    def __len__(self) -> int:
        return len(self.starts)

    def _pack(self, columns: Sequence[Tensor], group: list[int], number: Tensor | None) -> Tensor:
        codes = torch.zeros_like(columns[0]) if number is None else number
        for column in group:
            codes = codes * self._sizes[column] + columns[column]
        return codes

    def find(self, columns: Sequence[Tensor]) -> Tensor:
        """The number of each vertex; the table's length for those that do not exist."""
        number = None
        for group, table in zip(self._groups, self._tables, strict=True):
            codes = self._pack(columns, group, number)
            at = torch.searchsorted(table, codes).clamp_(max=len(table) - 1)
            number = torch.where(table[at] == codes, at, len(table))
        assert number is not None
        return number


class PermutohedralLattice(Kernel):
    """The filter of one batch of features.

    Args:
        features: (B, d, P), divided by the standard deviations.
        normalization: See :class:`Kernel`.
        self_term: False takes the filter's own diagonal out.

    Attributes:
        num_vertices: Number of vertices of all images together.

    Raises:
        ValueError: A feature is not finite or too far from the origin.
    """

    def __init__(self, features: Tensor, normalization: str | None, self_term: bool) -> None:
        self.images, dims, points = features.shape
        elevated = _elevate(features.transpose(0, 1).reshape(dims, -1))
        if not bool((elevated.detach().abs() <= _MAX_COORDINATE).all()):
            raise ValueError(
                "permutohedral_filter: features must be finite and within about "
                f"{_MAX_COORDINATE // (dims + 1)} standard deviations of the origin"
            )
        quotient, rank, weights = _enclosing_simplex(elevated)
        self._alpha = 1 / (1 + 2.0**-dims)
        self._connect(quotient, rank, points)
        # From here on by point: row p has the d + 1 corners of point p.
        weights = weights.T.contiguous()
        diagonal = None if self_term else self._diagonal_of(rank, weights)
        one = weights.new_ones(())
        self._fold(weights, one, one, diagonal)
        if normalization is not None:
            # With the diagonal, if any, still in: what remains of it may be cancellation.
            ones = weights.new_ones(self.images, points, 1)
            mass = self._filter_all(ones, False).reshape(-1, 1)
            if diagonal is not None:
                mass = torch.maximum(mass - diagonal, _MIN_SHARE * mass)
            self._fold(weights, *scales(mass, normalization), diagonal)

    def _fold(
        self, weights: Tensor, before: Tensor, after: Tensor, diagonal: Tensor | None
    ) -> None:
        """Puts the normalisation, and alpha, into the weights and the diagonal to be removed."""
        self._splat_weights = weights * before
        self._slice_weights = weights * (after * self._alpha)
        self._by_vertex = self._splat_weights.reshape(-1)[self._order]
        self._diagonal = (
            None if diagonal is None else (before * diagonal * after).view(self.images, -1, 1)
        )

    def _connect(self, quotient: Tensor, rank: Tensor, points: int) -> None:
        """Numbers the vertices; finds the points around each and its neighbours on each axis."""
        dims, total = len(rank) - 1, rank.shape[1]
        device = rank.device
        # Components of a vertex: quotients of its coordinates 0..d-1 by d + 1 (the last follows
        # from the sum), the remainder, and the image, so that images never share a vertex.
        low = (quotient.amin(dim=1) - 2).tolist()  # 1 for the corner, 1 for its neighbours
        high = (quotient.amax(dim=1) + 1).tolist()
        sizes = [b - a + 1 for a, b in zip(low[:dims], high, strict=False)]
        remainder = torch.arange(dims + 1, device=device)
        image = torch.arange(total, device=device)[:, None] // points
        columns = [  # each of them by point and corner
            *(
                quotient[i][:, None] - low[i] - (rank[i][:, None] > dims - remainder).long()
                for i in range(dims)
            ),
            remainder.expand(total, dims + 1),
            image.expand(total, dims + 1),
        ]
        columns = [column.reshape(-1) for column in columns]
        table = _VertexTable(columns, [*sizes, dims + 1, self.images])
        assert table.number is not None
        self.num_vertices = missing = len(table)

        # Row `missing` of every lattice stands for the vertices that do not exist, and stays 0.
        index = torch.int32 if len(table.order) < 1 << 31 else torch.int64  # half the traffic
        self._corners = table.number.view(total, dims + 1).to(index)
        self._order = table.order
        self._visitors = (table.order // (dims + 1)).to(index)
        end = table.starts.new_tensor([len(table.order)])
        self._starts = torch.cat([table.starts, end]).to(index)
        vertex = [column[table.order[table.starts]] for column in columns]
        wraps = (vertex[dims] == dims).long()
        own = torch.arange(missing + 1, device=device)
        self._stencils = []  # by axis: (vertices + 1, 3), the neighbours below and above outside
        for axis in range(dims + 1):
            # Up: 1 more in every coordinate, d + 1 less in this one.
            moved = [vertex[i] + wraps - (1 if i == axis else 0) for i in range(dims)]
            moved += [(vertex[dims] + 1) % (dims + 1), vertex[dims + 1]]
            above = torch.cat([table.find(moved), own[-1:]])
            below = torch.full_like(above, missing)
            exists = above < missing
            below[above[exists]] = own[exists]
            self._stencils.append(torch.stack([below, own, above], dim=1).to(index))

    def _apply(self, values: Tensor, reverse: bool) -> Tensor:
        result = self._filter_all(values, reverse)
        return result if self._diagonal is None else result - self._diagonal * values

    def _filter_all(self, values: Tensor, reverse: bool) -> Tensor:
        """Splat, blur and slice, the point's own value included."""
        splat, slices, stencils = self._by_vertex, self._slice_weights, self._stencils
        if reverse:
            splat, slices = slices.reshape(-1)[self._order], self._splat_weights
            stencils = stencils[::-1]
        flat = values.reshape(-1, values.shape[-1])
        rows = embedding_bag(
            self._visitors, flat, self._starts, mode="sum", per_sample_weights=splat
        )
        taps = rows.new_tensor([0.5, 1.0, 0.5]).expand(len(rows), 3).contiguous()
        for stencil in stencils:
            rows = embedding_bag(stencil, rows, mode="sum", per_sample_weights=taps)
        result = embedding_bag(self._corners, rows, mode="sum", per_sample_weights=slices)
        return result.view(values.shape)

    def _diagonal_of(self, rank: Tensor, weights: Tensor) -> Tensor:
        """K_ii of every point, (n, 1): what comes back of a 1 that only this point splats.

        A corner r of the point's simplex reaches a corner s by steps up along the axes that their
        difference names, or by steps down along all others, since one step up each axis leads back
        to the start. Axes are blurred in order and each step costs 1/2, and the value is lost where
        the path leaves the existing vertices. From r to r there are three paths: no step at all,
        and all axes up, or down.
        """
        period = len(rank)
        stencils = [stencil.long() for stencil in self._stencils]
        corners = self._corners.long()
        everything = torch.ones_like(rank, dtype=torch.bool)
        total = (weights * weights).sum(dim=1)
        for r in range(period):
            for s in range(period):
                lower, upper = sorted((period - 1 - s, period - 1 - r))
                up = (rank > lower) & (rank <= upper)
                up = up if s > r else ~up  # from r to r: all of them
                down = everything if s == r else ~up
                steps = (s - r) % period or period
                ways = ((2, up, steps), (0, down, period if s == r else period - steps))
                for column, axes, count in ways:
                    at = corners[:, r]
                    for axis, stencil in enumerate(stencils):
                        at = torch.where(axes[axis], stencil[at, column], at)
                    arrives = (at < self.num_vertices).to(weights.dtype)
                    total = total + weights[:, r] * weights[:, s] * arrives * 0.5**count
        return self._alpha * total[:, None]


def permutohedral_filter(
    values: Tensor,
    features: Tensor,
    *,
    normalization: str | None = None,
    self_term: bool = True,
    reverse: bool = False,
) -> Tensor:
    """Filter ``values`` with the lattice's approximation of exp(-|f_i - f_j|^2 / 2).

    Args:
        values: (N, C, *spatial). float64 is computed in float64, everything else in float32.
        features: (N or 1, d, *spatial), divided by the standard deviations. One set of features
            serves the whole batch; otherwise each image has a lattice of its own.
        normalization: None, "before", "after" or "symmetric".
        self_term: False takes the filter's own diagonal out of it and of the normaliser, which then
            keeps at least 1e-3 of itself.
        reverse: The transposed filter: blurs in reverse order, normalisation sides swapped.

    Returns:
        Same shape and dtype as ``values``. Its gradient with respect to ``features`` is that of the
        weights within each simplex: exact where it exists, but no good estimate of the gradient of
        the Gaussian.

    Raises:
        ValueError: A shape or ``normalization`` is wrong, or features are not finite or so large
            that float32 cannot tell the vertices apart.
        TypeError: ``values`` is not of floating-point type.
    """
    return filter_values(
        "permutohedral_filter",
        values,
        features,
        normalization,
        lambda f: PermutohedralLattice(f, normalization, self_term),
        reverse,
    )
