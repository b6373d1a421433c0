// SPDX-License-Identifier: Apache-2.0
// A row holds the channels of one point or vertex. Row<T, Width> keeps it in registers.
#pragma once

#include <cstring>

#include "common/simd.h"
#include "dense_crf/permutohedral.h"
#include "dense_crf/permutohedral_cpu.h"

namespace pydense::PYDENSE_ISA {

// The channels of one point or vertex, in vectors of the native width and, for widths such as 24,
// one of half of it.
template <class T, int Width>
struct Row {
  static constexpr int kNative = kNativeLanesOf<T>;
  static constexpr int kWideLanes = Width >= kNative ? kNative : (Width < 8 ? Width : 8);
  static constexpr int64_t kWide = Width / kWideLanes;
  static constexpr bool kHasTail = Width % kWideLanes != 0;
  static constexpr int kTailLanes = kHasTail ? Width % kWideLanes : 1;
  using Wide = Vec<T, kWideLanes>;
  using Tail = Vec<T, kTailLanes>;
  Wide wide[kWide];
  Tail tail;

  template <class Fn>
  static PYDENSE_HD Row from(const Fn& fn) {
    Row row;
#pragma GCC unroll 16  // GCC stops at two by itself
    for (int64_t i = 0; i < kWide; ++i) {
      row.wide[i] = fn([i](const Row& r) -> const Wide& { return r.wide[i]; });
    }
    if constexpr (kHasTail) {
      row.tail = fn([](const Row& r) -> const Tail& { return r.tail; });
    } else {
      row.tail = Tail{};
    }
    return row;
  }
  static PYDENSE_HD Row zero() {
    Row row;
    for (Wide& vec : row.wide) {
      vec = Wide{};
    }
    row.tail = Tail{};
    return row;
  }
  // All values x: one load for vectors of both widths.
  static PYDENSE_HD Row all(T x) {
    Row row;
    const Wide wide = broadcast<Wide>(x);
    for (Wide& vec : row.wide) {
      vec = wide;
    }
    if constexpr (kHasTail) {
      row.tail = some_lanes<Tail>(wide);
    } else {
      row.tail = Tail{};
    }
    return row;
  }
  static PYDENSE_HD Row load_from(const T* from) {
    Row row;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWide; ++i) {
      row.wide[i] = load<Wide>(from + i * kWideLanes);
    }
    if constexpr (kHasTail) {
      row.tail = load<Tail>(from + kWide * kWideLanes);
    } else {
      row.tail = Tail{};
    }
    return row;
  }
  PYDENSE_HD void store_to(T* to) const {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWide; ++i) {
      store(to + i * kWideLanes, wide[i]);
    }
    if constexpr (kHasTail) {
      store(to + kWide * kWideLanes, tail);
    }
  }
  PYDENSE_HD Row operator*(T factor) const { return *this * all(factor); }
  PYDENSE_HD Row operator*(const Row& other) const {
    return from([&](auto part) { return part(*this) * part(other); });
  }
  PYDENSE_HD Row operator+(const Row& other) const {
    return from([&](auto part) { return part(*this) + part(other); });
  }
  PYDENSE_HD Row operator-(const Row& other) const {
    return from([&](auto part) { return part(*this) - part(other); });
  }
};

// a * b + sum, rounded once where the instruction set can.
template <class T, int Width>
PYDENSE_HD Row<T, Width> multiply_add(const Row<T, Width>& a, const Row<T, Width>& b,
                                      const Row<T, Width>& sum) {
  return Row<T, Width>::from([&](auto part) { return fma(part(a), part(b), part(sum)); });
}
template <class T, int Width>
PYDENSE_HD Row<T, Width> multiply_add(const Row<T, Width>& a, T factor, const Row<T, Width>& sum) {
  return multiply_add(a, Row<T, Width>::all(factor), sum);
}

// Asks for the lines of a row, or a piece of one, that is going to be read (Write = 0) or changed.
template <int Write, class T>
PYDENSE_HD void prefetch_row(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < width; c += kLine) {
    __builtin_prefetch(row + c, Write);
  }
  if (width > 1) {
    __builtin_prefetch(row + width - 1, Write);  // it need not start where a line does
  }
}

// A row's values are summed in chunks of eight, which are kept in parts where the native vectors
// are narrower.
template <class T, int Piece>
struct RowParts {
  static constexpr int kChunk = Piece < 8 ? Piece : 8;
  static constexpr int kLanes = kChunk > kNativeLanesOf<T> ? kNativeLanesOf<T> : kChunk;
  static constexpr int kParts = kChunk / kLanes;
  using Part = Vec<T, kLanes>;
};

// The sum of a row: chunks of eight in order, then halves of the chunk.
template <class T, int Piece>
PYDENSE_HD T row_sum(const T* row, int64_t width) {
  using Parts = RowParts<T, Piece>;
  using Part = typename Parts::Part;
  constexpr int kLanes = Parts::kLanes;
  Part sums[Parts::kParts];
  for (int part = 0; part < Parts::kParts; ++part) {
    sums[part] = load<Part>(row + part * kLanes);
  }
  for (int64_t c = Parts::kChunk; c < width; c += Parts::kChunk) {
    for (int part = 0; part < Parts::kParts; ++part) {
      sums[part] = sums[part] + load<Part>(row + c + part * kLanes);
    }
  }
  for (int half = Parts::kParts / 2; half > 0; half /= 2) {
    for (int part = 0; part < half; ++part) {
      sums[part] = sums[part] + sums[part + half];
    }
  }
  return lane_sum<kLanes>(sums[0]);
}

// Calls fn(IntConstant<piece>{}) for the pieces a row of `width` >= Least values is walked in: the
// whole row up to 32 floats, 16 of a wider one; 8 doubles.
template <class T, int Least, class Fn>
void with_piece(int width, const Fn& fn) {
  if constexpr (sizeof(T) == sizeof(float)) {
    switch (width) {
      case 16:
        return fn(IntConstant<16>{});
      case 24:
        return fn(IntConstant<24>{});
      case 32:
        return fn(IntConstant<32>{});
      default:
        break;
    }
  }
  switch (width) {
    case 1:
      return fn(IntConstant<Least>{});
    case 2:
      return fn(IntConstant<2>{});
    case 4:
      return fn(IntConstant<4>{});
    default:
      return fn(IntConstant<(sizeof(T) == sizeof(float)) ? 16 : 8>{});
    case 8:
      return fn(IntConstant<8>{});
  }
}

// The corners of points: d + 1 for the dimensions that have code of their own and short ids, 0 for
// all others.
template <int Corners>
struct CornerIds {
  using Type = uint16_t;
};
template <>
struct CornerIds<0> {
  using Type = int32_t;
};

// Calls fn(IntConstant<corners>{}) for the usual kernels: position (2-D, 3-D), position + RGB; with
// 0 for others.
template <class Fn>
PYDENSE_HD void with_corners(int dims, const Fn& fn) {
  switch (dims) {
    case 2:
      return fn(IntConstant<3>{});
    case 3:
      return fn(IntConstant<4>{});
    case 5:
      return fn(IntConstant<6>{});
    default:
      return fn(IntConstant<0>{});
  }
}

// The corners of a band's points, and the band's rows.
template <class T, int Corners>
struct BandCorners {
  using Id = typename CornerIds<Corners>::Type;
  const T* weights;
  const Id* ids;
  int count;

  PYDENSE_HD explicit BandCorners(const LatticeView<T>& lattice)
      : weights(lattice.weights),
        ids(static_cast<const Id*>(lattice.ids)),
        count(Corners > 0 ? Corners : lattice.dims + 1) {}
  PYDENSE_HD int corners() const { return Corners > 0 ? Corners : count; }

  // Asks for the rows of a point's corners.
  PYDENSE_HD void prefetch(int64_t p, int64_t width, const T* rows) const {
    const Id* id = ids + p * corners();
    for (int r = 0; r < corners(); ++r) {
      prefetch_row<0>(rows + id[r] * width, width);
    }
  }

  // Adds value (one piece of a point's row) to the rows of the point's corners.
  template <int Piece>
  PYDENSE_HD void splat(int64_t p, const Row<T, Piece>& value, int64_t width, T* rows) const {
    const T* w = weights + p * corners();
    const Id* id = ids + p * corners();
    for (int r = 0; r < corners(); ++r) {
      T* row = rows + id[r] * width;
      multiply_add(value, w[r], Row<T, Piece>::load_from(row)).store_to(row);
    }
  }

  // Interpolates one piece of a point's row from the blurred vertices.
  template <int Piece>
  PYDENSE_HD Row<T, Piece> slice(int64_t p, int64_t width, const T* rows) const {
    const T* w = weights + p * corners();
    const Id* id = ids + p * corners();
    Row<T, Piece> sum = Row<T, Piece>::load_from(rows + id[0] * width) * w[0];
    for (int r = 1; r < corners(); ++r) {
      sum = multiply_add(Row<T, Piece>::load_from(rows + id[r] * width), w[r], sum);
    }
    return sum;
  }
};

// Whether a band's rows are too many for the second-level cache, beside all else.
template <class T>
PYDENSE_HD bool are_far(const LatticeView<T>& lattice, int64_t band, int64_t width) {
  constexpr int64_t kNear = int64_t{640} << 10;
  const int64_t rows = lattice.band_rows[band + 1] - lattice.band_rows[band];
  return rows * width * int64_t{sizeof(T)} > kNear;
}

// Clears the rows a band splats into.
template <class T>
void clear_band(const LatticeRows<T>& rows, int64_t band) {
  const int64_t* starts = rows.lattice.band_rows + band;
  std::memset(rows.rows + starts[0] * rows.width, 0,
              static_cast<size_t>((starts[1] - starts[0]) * rows.width) * sizeof(T));
}

}  // namespace pydense::PYDENSE_ISA
