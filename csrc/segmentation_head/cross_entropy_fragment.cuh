// SPDX-License-Identifier: Apache-2.0
// A fragment is what one thread computes: up to 4 outputs (2 in double), one below the other,
// between the same four logits. For a few classes at a time the horizontal part of the
// interpolation is done once, and what the outputs add to the gradient is summed to the four
// corners in registers.
//
// Everything is in powers of 2: the weights of the rows are multiplied with log2(e).
#pragma once

#include <limits>

#include "common/exp2.cuh"
#include "segmentation_head/cross_entropy_cuda.h"
#include "upsample/upsample_math.h"

namespace pydense {

template <class T>
constexpr int kFragmentRows = 16 / static_cast<int>(sizeof(T));  // what registers hold
constexpr int kClassGroup = 4;                                   // classes computed at a time

// Instead of a label.
constexpr int kIgnored = -1;
constexpr int kNoClass = -2;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
// Where the largest of some numbers begins: minus infinity less itself would be NaN.
template <class T>
constexpr T kLowest = std::numeric_limits<T>::lowest();

template <class T>
struct Quad {
  T v[kClassGroup];
};

template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* from) {
  constexpr int kPart = 16 / sizeof(T);
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < kClassGroup; i += kPart) {
    const Vector<T, kPart> part = load_vector<kPart>(from + i);
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      quad.v[i + k] = part[k];
    }
  }
  return quad;
}

template <class T>
__device__ __forceinline__ void store_quad(T* to, const Quad<T>& quad) {
  constexpr int kPart = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kClassGroup; i += kPart) {
    Vector<T, kPart> part;
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      part[k] = quad.v[i + k];
    }
    store_vector(to + i, part);
  }
}

// The logits at a fragment's corners in shared memory, classes side by side: upper left, upper
// right, lower left, lower right.
template <class T>
struct Corners {
  const T* at[4];
};

template <class T>
struct Fragment {
  static constexpr int kRows = kFragmentRows<T>;
  T left;  // weights; 0 for outputs that are not there
  T right;
  T upper[kRows];  // weights times log2(e)
  T lower[kRows];
  int label[kRows];

  T largest[kRows];  // logit so far,
  T sum[kRows];      // and of the powers relative to it
  T rest[kRows];     // sum of weights times logits relative to it
  T target[kRows];   // logit
  int first_bad;     // bits of rows: the target is the first class that is NaN or infinite

  static __device__ __forceinline__ bool is_bad(T value) { return !(value < kInfinity<T>); }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = kLowest<T>;
      sum[r] = rest[r] = target[r] = 0;
    }
    first_bad = 0;
  }

  // One logit of one output. Both passes give it the same bits.
  __device__ __forceinline__ T value(T top, T bottom, int row) const {
    return fma(lower[row], bottom, upper[row] * top);
  }

  // Logits of classes k and following in this column, in the two rows.
  __device__ __forceinline__ void interpolate(const Corners<T>& corners, int k, Quad<T>& top,
                                              Quad<T>& bottom) const {
    const Quad<T> above = load_quad(corners.at[1] + k);
    const Quad<T> below = load_quad(corners.at[3] + k);
    top = load_quad(corners.at[0] + k);
    bottom = load_quad(corners.at[2] + k);
#pragma unroll
    for (int g = 0; g < kClassGroup; ++g) {
      top.v[g] = fma(right, above.v[g], left * top.v[g]);
      bottom.v[g] = fma(right, below.v[g], left * bottom.v[g]);
    }
  }

  // Adds classes to the sums: `first` and following, k and following in shared memory; `live` of
  // them where kTail. `weights` are those of the classes, for `rest`, and `before` their sum so
  // far.
  template <bool kTail>
  __device__ __forceinline__ void add(const Corners<T>& corners, int k, int first, int live,
                                      bool smooth, const Quad<T>& weights, T before) {
    Quad<T> top;
    Quad<T> bottom;
    interpolate(corners, k, top, bottom);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      T values[kClassGroup];
      T most = largest[r];
#pragma unroll
      for (int g = 0; g < kClassGroup; ++g) {
        values[g] = value(top.v[g], bottom.v[g], r);
        if (kTail && g >= live) {
          values[g] = -kInfinity<T>;
        }
        most = fmax(most, values[g]);  // what is not NaN
      }
      const int at = label[r] - first;
      if (at >= 0 && at < kClassGroup) {
        bool before_it = sum[r] != sum[r];
#pragma unroll
        for (int g = 0; g < kClassGroup; ++g) {
          target[r] = g == at ? values[g] : target[r];
          before_it = before_it || (g < at && is_bad(values[g]));
        }
        first_bad |= is_bad(target[r]) && !before_it ? 1 << r : 0;
      }
      sum[r] *= fast_exp2(largest[r] - most);
#pragma unroll
      for (int g = 0; g < kClassGroup; ++g) {
        values[g] -= most;
        sum[r] += fast_exp2(values[g]);
      }
      if (smooth) {
        rest[r] = before == 0 ? rest[r] : fma(before, largest[r] - most, rest[r]);
#pragma unroll
        for (int g = 0; g < kClassGroup; ++g) {
          rest[r] = kTail && g >= live ? rest[r] : fma(weights.v[g], values[g], rest[r]);
        }
      }
      largest[r] = most;
    }
  }

  // The gradient of classes k and following at the corners, but for what belongs to the targets:
  // the powers times to_upper and to_lower, less the class weights times miss.
  __device__ __forceinline__ void fall(const Corners<T>& corners, int k, const T (&to_upper)[kRows],
                                       const T (&to_lower)[kRows], bool smooth,
                                       const Quad<T>& weights, const T (&miss)[2],
                                       Quad<T> (&sums)[4]) const {
    Quad<T> top;
    Quad<T> bottom;
    interpolate(corners, k, top, bottom);
#pragma unroll
    for (int g = 0; g < kClassGroup; ++g) {
      T above = smooth ? -weights.v[g] * miss[0] : T{};
      T below = smooth ? -weights.v[g] * miss[1] : T{};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Without fmin a pixel that takes no part would add 0 * NaN where a logit is not finite.
        // One that does has a factor of NaN there.
        const T power = fast_exp2(fmin(value(top.v[g], bottom.v[g], r) - largest[r], T{}));
        above = fma(to_upper[r], power, above);
        below = fma(to_lower[r], power, below);
      }
      sums[0].v[g] = left * above;
      sums[1].v[g] = right * above;
      sums[2].v[g] = left * below;
      sums[3].v[g] = right * below;
    }
  }
};

}  // namespace pydense
