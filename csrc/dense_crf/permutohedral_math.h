// SPDX-License-Identifier: Apache-2.0
// Geometry of the permutohedral lattice (Adams, Baek, Davis: "Fast High-Dimensional Filtering Using
// the Permutohedral Lattice", 2010), shared by CPU (F, I = SIMD vectors of T and of its integer,
// one point per lane) and CUDA (F, I = T and its integer). Only adds, multiplies and compares,
// never contracted, so that a point falls into the same simplex with the same weights everywhere.
//
// A point with d features is lifted onto the plane sum(e) = 0 of R^(d+1). The simplex around it has
// one vertex of each remainder 0..d; the vertex of remainder r has the coordinates
//   key_i = base_i + r - (rank_i > d - r ? d + 1 : 0),
// where base is the nearest vertex of remainder 0 and rank_i the position of coordinate i when
// e - base is sorted in descending order.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/hd.h"
#include "common/isa_namespace.h"

namespace pydense::PYDENSE_ISA {

// Features are divided by the standard deviation of the kernel beforehand; this scale makes one
// unit of feature space one standard deviation of the splat-blur-slice filter along every axis.
template <class T>
inline void lattice_scale(int dims, T* scale /* [dims] */) {
  // Rounded to float once, here and below, as pydensecrf does.
  const auto deviation = static_cast<T>(std::sqrt(2.0 / 3.0) * (dims + 1));
  for (int i = 0; i < dims; ++i) {
    scale[i] = static_cast<T>(1.0 / std::sqrt(static_cast<double>((i + 2) * (i + 1))) *
                              static_cast<double>(deviation));
  }
}

// The raw lattice response to a constant is (1 + 2^-d) times too large.
template <class T>
inline T lattice_alpha(int dims) {
  return T{1} / (T{1} + std::ldexp(T{1}, -dims));
}

// From mass = (K 1)_i, and what of it is left when the point's own share is taken out where that is
// to be, to the factor that normalises the filter.
template <class T>
PYDENSE_HD T normalizing_factor(T mass, const T* self, T alpha) {
  // Keeps 1 / norm finite where the lattice lost all mass around a point. Without its own share an
  // isolated point has a mass that is rounding error alone: it counts as a small part of the whole.
  constexpr T kFloor = static_cast<T>(1e-20);
  constexpr T kRest = static_cast<T>(1e-3);
  T rest = mass;
  if (self != nullptr) {
    const T least = kRest * mass;
    rest = mass - *self;
    rest = rest < least ? least : rest;
  }
  return alpha / (alpha * rest + kFloor);
}

template <class T, class F>
PYDENSE_HD void elevate(const F* feature /* [d] */, const T* scale /* [d] */, int dims,
                        F* e /* [d + 1] */) {
  F sum{};
  for (int j = dims; j > 0; --j) {
    const F scaled = feature[j - 1] * scale[j - 1];
    e[j] = sum - scaled * static_cast<T>(j);
    sum = sum + scaled;
  }
  e[0] = sum;
}

// 1.5 * 2^(mantissa bits): adding it rounds to the nearest integer, ties to even, and leaves that
// integer in the low bits.
template <class T>
struct RoundingConstant;
template <>
struct RoundingConstant<float> {
  static constexpr float kValue = 12582912.f;
  static constexpr int32_t kBits = 0x4B400000;
};
template <>
struct RoundingConstant<double> {
  static constexpr double kValue = 6755399441055744.0;
  static constexpr int64_t kBits = 0x4338000000000000;
};

// From elevated coordinates to the enclosing simplex. |e| must be below 2^22.
template <class T, class F, class I>
PYDENSE_HD void enclosing_simplex(const F* e /* [d + 1] */, int dims, I* base /* [d + 1] */,
                                  I* rank /* [d + 1] */, F* weight /* [d + 1], by remainder */,
                                  F* work /* [d + 1] */) {
  using Round = RoundingConstant<T>;
  const auto period = static_cast<T>(dims + 1);
  const T inverse = T{1} / period;
  I sum{};
  for (int i = 0; i <= dims; ++i) {
    const F shifted = e[i] * inverse + Round::kValue;
    const F multiple = shifted - Round::kValue;
    const I whole = bit_cast<I>(shifted) - Round::kBits;
    sum = sum + whole;
    base[i] = whole * (dims + 1);
    work[i] = e[i] - multiple * period;
    rank[i] = I{};
  }
  for (int i = 0; i < dims; ++i) {
    for (int j = i + 1; j <= dims; ++j) {
      const I behind = work[i] < work[j] ? I{} + 1 : I{};
      rank[i] = rank[i] + behind;
      rank[j] = rank[j] + (1 - behind);
    }
  }
  // The rounded point lies off the plane by `sum` periods: move the coordinates with the largest
  // rounding error by one period, which brings it back.
  for (int i = 0; i <= dims; ++i) {
    const I moved = rank[i] + sum;
    const I step = moved < 0 ? I{} + (dims + 1) : (moved > dims ? I{} - (dims + 1) : I{});
    rank[i] = moved + step;
    base[i] = base[i] + step;
    const F shift = moved < 0 ? F{} + period : (moved > dims ? F{} - period : F{});
    work[i] = work[i] - shift;
  }
  // Barycentric weights are differences of neighbours in the sorted order.
  F previous{};
  F first{};
  for (int r = dims; r >= 0; --r) {
    F sorted{};
    for (int i = 0; i <= dims; ++i) {
      sorted = rank[i] == r ? work[i] : sorted;
    }
    sorted = sorted * inverse;
    if (r == dims) {
      first = sorted;
    } else {
      weight[dims - r] = sorted - previous;
    }
    previous = sorted;
  }
  weight[0] = first + (T{1} - previous);
}

}  // namespace pydense::PYDENSE_ISA
