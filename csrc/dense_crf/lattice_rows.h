// SPDX-License-Identifier: Apache-2.0
// A row holds the channels of one point or vertex. Row<Width> keeps it in registers.
#pragma once

#include "common/simd.h"
#include "dense_crf/permutohedral.h"

namespace pydense::PYDENSE_ISA {

template <int Width>
struct Row {
  static constexpr int kLanes = Width < 8 ? Width : 8;
  static constexpr int kVecs = Width / kLanes;
  static_assert(kLanes * kVecs == Width);
  using Vec = FloatVec<kLanes>;
  Vec v[kVecs];

  static PYDENSE_HD Row zero() {
    Row row;
    for (Vec& vec : row.v) {
      vec = Vec{};
    }
    return row;
  }
  static PYDENSE_HD Row load_from(const float* from) {
    Row row;
    for (int i = 0; i < kVecs; ++i) {
      row.v[i] = load<Vec>(from + i * kLanes);
    }
    return row;
  }
  PYDENSE_HD void store_to(float* to) const {
    for (int i = 0; i < kVecs; ++i) {
      store(to + i * kLanes, v[i]);
    }
  }
  PYDENSE_HD Row operator*(float factor) const {
    Row row;
    for (int i = 0; i < kVecs; ++i) {
      row.v[i] = v[i] * factor;
    }
    return row;
  }
  PYDENSE_HD Row operator*(const Row& other) const {
    Row row;
    for (int i = 0; i < kVecs; ++i) {
      row.v[i] = v[i] * other.v[i];
    }
    return row;
  }
  PYDENSE_HD Row operator+(const Row& other) const {
    Row row;
    for (int i = 0; i < kVecs; ++i) {
      row.v[i] = v[i] + other.v[i];
    }
    return row;
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

// Adds value (one piece of a point's row) to the rows of the point's entries.
template <int Piece>
PYDENSE_HD void splat_point(const Row<Piece>& value, const float* weights, const int32_t* entries,
                            int corners, int width, float* band_rows) {
  for (int r = 0; r < corners; ++r) {
    float* row = band_rows + int64_t{entries[r]} * width;
    (Row<Piece>::load_from(row) + value * weights[r]).store_to(row);
  }
}

// Interpolates one piece of a point's row from the blurred vertices.
template <int Piece>
PYDENSE_HD Row<Piece> slice_point(const float* weights, const int32_t* entries,
                                  const int32_t* entry_vertex, int corners, int width,
                                  const float* vertex_rows) {
  Row<Piece> sum =
      Row<Piece>::load_from(vertex_rows + int64_t{entry_vertex[entries[0]]} * width) * weights[0];
  for (int r = 1; r < corners; ++r) {
    const float* row = vertex_rows + int64_t{entry_vertex[entries[r]]} * width;
    sum = sum + Row<Piece>::load_from(row) * weights[r];
  }
  return sum;
}

}  // namespace pydense::PYDENSE_ISA
