// SPDX-License-Identifier: Apache-2.0
// A row holds the channels of one point or vertex. Row<Width> keeps it in registers.
#pragma once

#include <cstring>

#include "common/simd.h"
#include "dense_crf/permutohedral.h"

namespace pydense::PYDENSE_ISA {

// The channels of one point or vertex, in vectors of the native width and, for widths such as 24,
// one of half of it. Sums over channels go by chunks of eight lanes, whatever the native width is,
// so they have one order.
template <int Width>
struct Row {
  static constexpr int kWideLanes = Width >= kNativeLanes ? kNativeLanes : (Width < 8 ? Width : 8);
  static constexpr int64_t kWide = Width / kWideLanes;
  static constexpr bool kHasTail = Width % kWideLanes != 0;
  static constexpr int kTailLanes = kHasTail ? Width % kWideLanes : 1;
  static constexpr int kChunkLanes = Width < 8 ? Width : 8;
  using Wide = FloatVec<kWideLanes>;
  using Tail = FloatVec<kTailLanes>;
  Wide wide[kWide];
  Tail tail;

  template <class Fn>
  static PYDENSE_HD Row from(const Fn& fn) {
    Row row;
#pragma GCC unroll 8  // GCC stops at two by itself
    for (int64_t i = 0; i < kWide; ++i) {
      row.wide[i] = fn([i](const Row& r) -> const Wide& { return r.wide[i]; });
    }
    if constexpr (kHasTail) {
      row.tail = fn([](const Row& r) -> const Tail& { return r.tail; });
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
  static PYDENSE_HD Row load_from(const float* from) {
    Row row;
#pragma GCC unroll 8  // GCC stops at two by itself
    for (int64_t i = 0; i < kWide; ++i) {
      row.wide[i] = load<Wide>(from + i * kWideLanes);
    }
    if constexpr (kHasTail) {
      row.tail = load<Tail>(from + kWide * kWideLanes);
    }
    return row;
  }
  PYDENSE_HD void store_to(float* to) const {
#pragma GCC unroll 8  // GCC stops at two by itself
    for (int64_t i = 0; i < kWide; ++i) {
      store(to + i * kWideLanes, wide[i]);
    }
    if constexpr (kHasTail) {
      store(to + kWide * kWideLanes, tail);
    }
  }
  PYDENSE_HD Row operator*(float factor) const {
    return from([&](auto part) { return part(*this) * factor; });
  }
  PYDENSE_HD Row operator*(const Row& other) const {
    return from([&](auto part) { return part(*this) * part(other); });
  }
  PYDENSE_HD Row operator+(const Row& other) const {
    return from([&](auto part) { return part(*this) + part(other); });
  }
};

template <int Value>
struct IntConstant {
  static constexpr int value = Value;
};

// Rows wider than 32 are walked in pieces of 16.
constexpr int piece_width(int width) { return width <= 32 ? width : 16; }

// Calls fn(IntConstant<piece>{}) for the piece of a row width of at least Least.
template <int Least, class Fn>
void with_piece(int width, const Fn& fn) {
  switch (piece_width(width)) {
    case 1:
      return fn(IntConstant<Least>{});
    case 2:
      return fn(IntConstant<2>{});
    case 4:
      return fn(IntConstant<4>{});
    case 8:
      return fn(IntConstant<8>{});
    case 16:
      return fn(IntConstant<16>{});
    case 24:
      return fn(IntConstant<24>{});
    default:
      return fn(IntConstant<32>{});
  }
}

// Clears the rows a band splats into.
inline void clear_band(const LatticeRows& rows, int64_t band) {
  const LatticeView& lattice = rows.lattice;
  const auto clear = [&](int64_t first, int64_t last) {
    std::memset(rows.rows + first * rows.width, 0,
                static_cast<size_t>((last - first) * rows.width) * sizeof(float));
  };
  clear(lattice.band_vertices[band], lattice.band_vertices[band + 1]);
  clear(lattice.band_extra_row(band), lattice.band_extra_row(band + 1));
}

// Adds value (one piece of a point's row) to the rows of the point's entries.
template <int Piece>
PYDENSE_HD void splat_point(const Row<Piece>& value, const float* weights,
                            const int32_t* point_entries, const LatticeEntry* entries, int corners,
                            int64_t width, float* rows) {
  for (int r = 0; r < corners; ++r) {
    float* row = rows + entries[point_entries[r]].row * width;
    (Row<Piece>::load_from(row) + value * weights[r]).store_to(row);
  }
}

// Interpolates one piece of a point's row from the blurred vertices.
template <int Piece>
PYDENSE_HD Row<Piece> slice_point(const float* weights, const int32_t* point_entries,
                                  const LatticeEntry* entries, int corners, int64_t width,
                                  const float* rows) {
  const auto row = [&](int r) {
    return Row<Piece>::load_from(rows + entries[point_entries[r]].vertex * width);
  };
  Row<Piece> sum = row(0) * weights[0];
  for (int r = 1; r < corners; ++r) {
    sum = sum + row(r) * weights[r];
  }
  return sum;
}

}  // namespace pydense::PYDENSE_ISA
