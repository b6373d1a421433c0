// SPDX-License-Identifier: Apache-2.0
// A fragment is what one thread computes: up to 4 x 2 outputs (1 x 2 in double) between the same
// four logits. For a few classes at a time the horizontal part of the interpolation is done once
// per column, and what the outputs add to the gradient is summed to the four corners in registers.
//
// Everything is in powers of 2: the weights of the rows are multiplied with log2(e).
#pragma once

#include <limits>

#include "common/exp2.cuh"
#include "segmentation_head/cross_entropy_cuda.h"
#include "upsample/upsample_math.h"

namespace pydense {

template <class T>
constexpr int kFragmentRows = sizeof(T) == sizeof(float) ? 4 : 1;  // what registers hold
constexpr int kFragmentColumns = 2;
template <class T>
constexpr int kFragmentPixels = kFragmentRows<T> * kFragmentColumns;
constexpr int kClassGroup = 4;  // classes computed at a time

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
  static constexpr int kPixels = kFragmentPixels<T>;
  T left[kFragmentColumns];  // weights; 0 for outputs that are not there
  T right[kFragmentColumns];
  T upper[kRows];  // weights times log2(e)
  T lower[kRows];
  int label[kPixels];

  T largest[kPixels];  // logit so far,
  T sum[kPixels];      // and of the powers relative to it
  T rest[kPixels];     // sum of weights times logits relative to it
  T target[kPixels];   // logit
  int first_bad;       // bits of pixels: the target is the first class that is NaN or infinite

  static __device__ __forceinline__ bool is_bad(T value) { return !(value < kInfinity<T>); }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      largest[p] = kLowest<T>;
      sum[p] = rest[p] = target[p] = 0;
    }
    first_bad = 0;
  }

  // One logit of one output. Wherever it is computed, it has these bits.
  __device__ __forceinline__ T value(T top, T bottom, int row) const {
    return fma(lower[row], bottom, upper[row] * top);
  }

  struct Lines {
    T top[kClassGroup];
    T bottom[kClassGroup];
  };
  __device__ __forceinline__ Lines lines(const Quad<T> (&quads)[4], int column) const {
    Lines lines;
#pragma unroll
    for (int g = 0; g < kClassGroup; ++g) {
      lines.top[g] = fma(right[column], quads[1].v[g], left[column] * quads[0].v[g]);
      lines.bottom[g] = fma(right[column], quads[3].v[g], left[column] * quads[2].v[g]);
    }
    return lines;
  }

  // Adds classes k and following to the sums, of which `first` is the first; `live` of them where
  // kTail. `weights` are
  // those of the classes, for `rest`, and `before` their sum up to here.
  template <bool kTail>
  __device__ __forceinline__ void add(const Corners<T>& corners, int k, int first, int live,
                                      bool smooth, const Quad<T>& weights, T before) {
    Quad<T> quads[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      quads[q] = load_quad(corners.at[q] + k);
    }
#pragma unroll
    for (int column = 0; column < kFragmentColumns; ++column) {
      const Lines line = lines(quads, column);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int p = row * kFragmentColumns + column;
        T values[kClassGroup];
        T most = largest[p];
#pragma unroll
        for (int g = 0; g < kClassGroup; ++g) {
          values[g] = value(line.top[g], line.bottom[g], row);
          if (kTail && g >= live) {
            values[g] = -kInfinity<T>;
          }
          most = fmax(most, values[g]);  // what is not NaN
        }
        const int at = label[p] - first;
        if (at >= 0 && at < kClassGroup) {
          bool before = sum[p] != sum[p];
#pragma unroll
          for (int g = 0; g < kClassGroup; ++g) {
            target[p] = g == at ? values[g] : target[p];
            before = before || (g < at && is_bad(values[g]));
          }
          first_bad |= is_bad(target[p]) && !before ? 1 << p : 0;
        }
        sum[p] *= fast_exp2(largest[p] - most);
#pragma unroll
        for (int g = 0; g < kClassGroup; ++g) {
          values[g] -= most;
          sum[p] += fast_exp2(values[g]);
        }
        if (smooth) {
          rest[p] = before == 0 ? rest[p] : fma(before, largest[p] - most, rest[p]);
#pragma unroll
          for (int g = 0; g < kClassGroup; ++g) {
            rest[p] = kTail && g >= live ? rest[p] : fma(weights.v[g], values[g], rest[p]);
          }
        }
        largest[p] = most;
      }
    }
  }

  // The gradient of classes k and following at the corners, but for what belongs to the targets:
  // the powers times to_upper and to_lower, less the class weights times miss.
  __device__ __forceinline__ void fall(const Corners<T>& corners, int k,
                                       const T (&to_upper)[kPixels], const T (&to_lower)[kPixels],
                                       bool smooth, const Quad<T>& weights, const T (&miss)[4],
                                       Quad<T> (&sums)[4]) const {
    Quad<T> quads[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      quads[q] = load_quad(corners.at[q] + k);
#pragma unroll
      for (int g = 0; g < kClassGroup; ++g) {
        sums[q].v[g] = smooth ? -weights.v[g] * miss[q] : T{};
      }
    }
#pragma unroll
    for (int column = 0; column < kFragmentColumns; ++column) {
      const Lines line = lines(quads, column);
#pragma unroll
      for (int g = 0; g < kClassGroup; ++g) {
        T above = 0;
        T below = 0;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const int p = row * kFragmentColumns + column;
          // Without fmin a pixel that takes no part would add 0 * NaN where a logit is not finite.
          // One that does has a factor of NaN there.
          const T power =
              fast_exp2(fmin(value(line.top[g], line.bottom[g], row) - largest[p], T{}));
          above = fma(to_upper[p], power, above);
          below = fma(to_lower[p], power, below);
        }
        sums[0].v[g] = fma(left[column], above, sums[0].v[g]);
        sums[1].v[g] = fma(right[column], above, sums[1].v[g]);
        sums[2].v[g] = fma(left[column], below, sums[2].v[g]);
        sums[3].v[g] = fma(right[column], below, sums[3].v[g]);
      }
    }
  }
};

}  // namespace pydense
