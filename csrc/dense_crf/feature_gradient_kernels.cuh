// SPDX-License-Identifier: Apache-2.0
// Around the filters of the feature gradient: rows of a few channels with their products with the
// features, and what is put together of them at every point afterwards.
#pragma once

#include "dense_crf/feature_gradient_math.h"
#include "dense_crf/lattice_embed.cuh"
#include "dense_crf/mean_field_kernels.cuh"

namespace pydense {

constexpr int kFeatureThreads = 128;
constexpr int kFeatureTile = 32;                      // points of a block
constexpr int kFeatureTileStride = kFeatureTile + 1;  // in shared memory

// [images, dims, points] by strides; one image serves all where there is one.
template <class T>
struct FeaturePoints {
  const T* data;
  int64_t strides[3];
  int64_t images;
  int64_t points;  // of an image
  int dims;
};

template <class T>
struct FeatureLoadParams {
  FeaturePoints<T> features;
  int per_channel;  // 1, or with the products d + 1
  const T* values;  // [batch, channels, points] by strides
  int64_t strides[3];
  const T* compat;  // factors of the channels, or null for 1
  int compat_stride;
  int channels;
  int64_t point_tiles;
  int64_t width;
  T* rows;  // [batch, points, width]
};

inline size_t feature_load_numbers(int channels, int dims) {
  return static_cast<size_t>(channels + dims) * kFeatureTileStride;
}

// rows = values, each followed by its products with the features.
template <class T>
__global__ void __launch_bounds__(kFeatureThreads)
    feature_load_kernel(const FeatureLoadParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(T, shared);  // [channels + dims][points]
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t image = blockIdx.x / p.point_tiles;
  const int64_t first = blockIdx.x % p.point_tiles * kFeatureTile;
  const FeaturePoints<T>& f = p.features;
  const auto count =
      static_cast<int>(f.points - first < kFeatureTile ? f.points - first : int64_t{kFeatureTile});
  const bool along = p.strides[1] == 1 && p.strides[2] != 1;  // channels lie side by side
  for (int i = thread; i < p.channels * kFeatureTile; i += kFeatureThreads) {
    const int channel = along ? i % p.channels : i / kFeatureTile;
    const int point = along ? i / p.channels : i % kFeatureTile;
    if (point < count) {
      const T factor = p.compat == nullptr ? T{1} : p.compat[channel * p.compat_stride];
      shared[channel * kFeatureTileStride + point] =
          factor *
          p.values[image * p.strides[0] + channel * p.strides[1] + (first + point) * p.strides[2]];
    }
  }
  if (p.per_channel > 1) {
    const int64_t from = (f.images == 1 ? 0 : image) * f.strides[0] + first * f.strides[2];
    for (int i = thread; i < f.dims * kFeatureTile; i += kFeatureThreads) {
      const int point = i % kFeatureTile;
      if (point < count) {
        shared[(p.channels + i / kFeatureTile) * kFeatureTileStride + point] =
            f.data[from + i / kFeatureTile * f.strides[1] + point * f.strides[2]];
      }
    }
  }
  __syncthreads();
  const auto width = static_cast<int>(p.width);
  T* const to = p.rows + (image * f.points + first) * p.width;
  for (int i = thread; i < count * width; i += kFeatureThreads) {
    const int point = i / width;
    const int channel = i % width / p.per_channel;
    const int product = i % width % p.per_channel;
    T value{};
    if (channel < p.channels) {
      value = shared[channel * kFeatureTileStride + point];
      if (product > 0) {
        value *= shared[(p.channels + product - 1) * kFeatureTileStride + point];
      }
    }
    to[i] = value;
  }
}

// What came back of both filters: K b in `ahead`, K^T a in `back`, whose norms are in the terms.
template <class T>
struct FeatureSumParams {
  FieldTerm<T> ahead;
  FieldTerm<T> back;
  const T* self;  // [all points], or null
  FeaturePoints<T> features;
  const T* a;  // [points, width] as loaded
  const T* b;
  int channels;
  int vectors;
  int lanes;
  int64_t points;  // of the batch
  bool first;      // nothing is in the sums yet
  T* sums;         // [points, d], or by the weights [points, d + 1]
  T* norms;        // [2, points] sums of a (K b) and of b (K^T a), or null
};

// What goes to the norms at a point, of a channel.
template <class T>
__device__ __forceinline__ void add_to_norms(const FeatureSumParams<T>& p, int64_t point, T ahead,
                                             T back) {
  if (p.first) {
    p.norms[point] = ahead;
    p.norms[p.points + point] = back;
  } else {
    p.norms[point] += ahead;
    p.norms[p.points + point] += back;
  }
}

// sums += a (K (b f) - f K b) + b (K^T (a f) - f K^T a). Rows have at most 32 vectors.
template <class T>
__global__ void __launch_bounds__(kFeatureThreads, 8)
    feature_difference_kernel(const __grid_constant__ FeatureSumParams<T> p) {
  constexpr int kVector = kRowVector<T>;
  __shared__ __align__(16) T sliced[2 * kFeatureThreads * kVector];  // of both, [points, width]
  const int thread = static_cast<int>(threadIdx.x);
  const int per_block = kFeatureThreads / p.lanes;
  const int64_t first = int64_t{blockIdx.x} * per_block;
  const int width = p.vectors * kVector;
  const int lane = thread % p.lanes;
  const int row = thread / p.lanes;
  if (lane < p.vectors && first + row < p.points) {
    const int at = lane * kVector;
    const int to = row * width + at;
    const T* const none = nullptr;
    store_vector(sliced + to,
                 slice_vector(p.ahead, place_in(p.ahead, first + row, width), none, width, at));
    store_vector(sliced + kFeatureThreads * kVector + to,
                 slice_vector(p.back, place_in(p.back, first + row, width), none, width, at));
  }
  __syncthreads();
  const int dims = p.features.dims;
  const int results = p.norms == nullptr ? dims : dims + 1;  // of a point, the norms last
  for (int i = thread; i < per_block * results; i += kFeatureThreads) {
    const int64_t point = first + i / results;
    const int m = i % results;
    if (point >= p.points) {
      break;
    }
    const T* const ahead = sliced + i / results * width;
    const T* const back = ahead + kFeatureThreads * kVector;
    const int64_t row_begin = point * width;
    const T* const a = p.a + row_begin;
    const T* const b = p.b + row_begin;
    if (m == dims) {
      const T self = p.self == nullptr ? T{} : p.self[point % p.ahead.all_points];
      T one{};
      T other{};
      for (int at = 0; at < p.channels * (dims + 1); at += dims + 1) {
        one = fma(a[at], ahead[at] - self * b[at], one);
        other = fma(b[at], back[at] - self * a[at], other);
      }
      add_to_norms(p, point, one, other);
      continue;
    }
    const FeaturePoints<T>& f = p.features;
    const int64_t image = f.images == 1 ? 0 : point / f.points;
    const T feature =
        f.data[image * f.strides[0] + m * f.strides[1] + point % f.points * f.strides[2]];
    T sum{};
    for (int at = 0; at < p.channels * (dims + 1); at += dims + 1) {
      sum = fma(a[at], ahead[at + m + 1] - feature * ahead[at], sum);
      sum = fma(b[at], back[at + m + 1] - feature * back[at], sum);
    }
    T& to = p.sums[point * dims + m];
    to = p.first ? sum : to + sum;
  }
}

// sums += the derivative by the weights of a point's corners. For checks: a thread has a point.
template <class T>
__global__ void __launch_bounds__(kFeatureThreads)
    feature_corner_kernel(const __grid_constant__ FeatureSumParams<T> p) {
  const int64_t point = int64_t{blockIdx.x} * kFeatureThreads + threadIdx.x;
  if (point >= p.points) {
    return;
  }
  const int64_t width = int64_t{p.vectors} * kRowVector<T>;
  const FieldPlace<T> ahead = place_in(p.ahead, point, width);
  const FieldPlace<T> back = place_in(p.back, point, width);
  T one{};
  T other{};
  for (int r = 0; r < p.ahead.corners; ++r) {
    const int64_t corner = r * p.ahead.all_points + ahead.point;
    const int64_t row = p.ahead.ids[corner] * width;
    T by_a{};
    T by_b{};
    for (int c = 0; c < p.channels; ++c) {
      by_a = fma(p.a[point * width + c], ahead.factor * ahead.rows[row + c], by_a);
      by_b = fma(p.b[point * width + c], back.factor * back.rows[row + c], by_b);
    }
    one = fma(p.ahead.weights[corner], by_a, one);
    other = fma(p.ahead.weights[corner], by_b, other);
    T& to = p.sums[point * p.ahead.corners + r];
    to = p.first ? by_a + by_b : to + (by_a + by_b);
  }
  if (p.norms != nullptr) {
    add_to_norms(p, point, one, other);
  }
}

template <class T>
struct FeatureNormParams {
  const T* splat_norm;  // [all points], or null
  const T* slice_norm;
  int64_t all_points;
  int64_t points;  // of the batch
  T* norms;        // [2, points], in and out
};

// dL/dn as a bilinear form of the same normalised kernel: a' and b' with a'^T K b' = dL/dn^T n.
template <class T>
__global__ void __launch_bounds__(kFeatureThreads)
    feature_norm_kernel(const FeatureNormParams<T> p) {
  const int64_t i = int64_t{blockIdx.x} * kFeatureThreads + threadIdx.x;
  if (i >= p.points) {
    return;
  }
  const int64_t at = i % p.all_points;
  const T ahead = p.norms[i];
  const T back = p.norms[p.points + i];
  T a{};
  T b = T{1};
  if (p.slice_norm == nullptr) {  // K n^-1
    a = -back * p.splat_norm[at];
    b = T{1} / p.splat_norm[at];
  } else if (p.splat_norm == nullptr) {  // n^-1 K
    a = -ahead;
  } else {
    a = static_cast<T>(-0.5) * p.slice_norm[at] * (ahead + back);
    b = T{1} / p.splat_norm[at];
  }
  p.norms[i] = a;
  p.norms[p.points + i] = b;
}

template <class T>
struct FeatureStoreParams {
  const T* sums;  // [copies, all points, d]
  int64_t all_points;
  int64_t points;  // of an image
  int dims;
  int copies;
  T* out;  // [images, dims, points]
};

// Adds up the copies of the lattice's images.
template <class T>
__global__ void __launch_bounds__(kFeatureThreads)
    feature_store_kernel(const FeatureStoreParams<T> p) {
  const int64_t i = int64_t{blockIdx.x} * kFeatureThreads + threadIdx.x;
  if (i >= p.all_points) {
    return;
  }
  T* const to = p.out + i / p.points * p.dims * p.points + i % p.points;
  for (int m = 0; m < p.dims; ++m) {
    T sum{};
    for (int copy = 0; copy < p.copies; ++copy) {
      sum += p.sums[(copy * p.all_points + i) * p.dims + m];
    }
    to[m * p.points] = sum;
  }
}

template <class T>
struct FeatureSimplexParams {
  EmbedParams<T> embed;
  const T* sums;  // [copies, all points, d + 1] by the weights
  int copies;
  T* out;  // [images, dims, points]
};

// From the weights to the features.
template <class T>
__global__ void __launch_bounds__(kEmbedThreads<T>)
    feature_simplex_kernel(const __grid_constant__ FeatureSimplexParams<T> p) {
  using I = typename IntegerOf<T>::Type;
  PYDENSE_DYNAMIC_SHARED(T, shared);
  const EmbedParams<T>& from = p.embed;
  const int n = from.dims + 1;
  T* const mine = shared + threadIdx.x * embed_numbers(from.dims);
  T* const e = mine;
  T* const work = mine + n;
  T* const weight = mine + 2 * n;
  I* const base = reinterpret_cast<I*>(mine + 3 * n);
  I* const rank = reinterpret_cast<I*>(mine + 4 * n);
  const int64_t point = int64_t{blockIdx.x} * kEmbedThreads<T> + threadIdx.x;
  if (point >= from.all_points) {
    return;
  }
  load_elevated(from, point, work, e);
  portable::enclosing_simplex<T>(e, from.dims, base, rank, weight, work);
  for (int r = 0; r < n; ++r) {
    T sum{};
    for (int copy = 0; copy < p.copies; ++copy) {
      sum += p.sums[(copy * from.all_points + point) * n + r];
    }
    weight[r] = sum;
  }
  weights_to_features<T>(weight, rank, from.scale, from.dims, e, work);
  T* const to = p.out + point / from.points * from.dims * from.points + point % from.points;
  for (int m = 0; m < from.dims; ++m) {
    to[m * from.points] = work[m];
  }
}

}  // namespace pydense
