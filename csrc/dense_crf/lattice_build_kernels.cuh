// SPDX-License-Identifier: Apache-2.0
// Building a lattice: the range of the coordinates, how they are packed into keys, the key of every
// corner of every point; then, between sorts and scans, who is whose first corner. The simplices
// and weights have the bits of the CPU.
#pragma once

#include "dense_crf/lattice_embed.cuh"
#include "dense_crf/lattice_keys_math.h"

namespace pydense {

constexpr int kBuildThreads = 128;
constexpr int kMaxKeyWords = kMaxLatticeDims / 2 + 1;  // two coordinates at least, and the image

// Smallest and largest coordinates of a block's points; NaN in low where one is not finite.
template <class T>
__global__ void __launch_bounds__(kEmbedThreads<T>)
    lattice_bounds_kernel(const __grid_constant__ EmbedParams<T> p) {
  PYDENSE_DYNAMIC_SHARED(T, shared);
  const int n = p.dims + 1;
  const int64_t stride = embed_numbers(p.dims);
  T* const mine = shared + threadIdx.x * stride;
  T* const feature = mine;
  T* const e = mine + n;
  T* const low = mine + 2 * n;
  T* const high = mine + 3 * n;
  for (int i = 0; i < n; ++i) {
    low[i] = static_cast<T>(3e38);
    high[i] = static_cast<T>(-3e38);
  }
  T poison{};
  const int64_t step = int64_t{gridDim.x} * kEmbedThreads<T>;
  for (int64_t point = int64_t{blockIdx.x} * kEmbedThreads<T> + threadIdx.x; point < p.all_points;
       point += step) {
    load_elevated(p, point, feature, e);
    for (int i = 0; i < n; ++i) {
      low[i] = low[i] < e[i] ? low[i] : e[i];
      high[i] = high[i] > e[i] ? high[i] : e[i];
      poison = poison + (e[i] - e[i]);  // 0, or NaN once a coordinate is NaN or infinite
    }
  }
  feature[0] = poison;
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) {
    T least = shared[2 * n + i];
    T most = shared[3 * n + i];
    T rest{};
    for (int t = 0; t < kEmbedThreads<T>; ++t) {
      const T* const theirs = shared + t * stride;
      least = theirs[2 * n + i] < least ? theirs[2 * n + i] : least;
      most = theirs[3 * n + i] > most ? theirs[3 * n + i] : most;
      rest = rest + theirs[0];
    }
    double* const to = p.bounds + int64_t{blockIdx.x} * 2 * n;
    to[i] = static_cast<double>(least) + static_cast<double>(rest);
    to[n + i] = static_cast<double>(most);
  }
}

struct PlanParams {
  const double* bounds;  // [blocks, 2, d + 1]
  int blocks;
  int dims;
  int image_bits;
  DeviceKeys* keys;
};

constexpr int kPlanThreads = 64;
static_assert(kPlanThreads >= kCoordinates);

struct GatherKeysParams {
  const uint64_t* keys;  // [entries] one word
  const int32_t* order;
  uint64_t* sorted;
  int64_t entries;
};

// Unpacks the corners of a point into keys and weights. Where the keys do not fit, all are 0.
template <class T>
__global__ void __launch_bounds__(kEmbedThreads<T>)
    lattice_embed_kernel(const __grid_constant__ EmbedParams<T> p) {
  using I = typename IntegerOf<T>::Type;
  PYDENSE_DYNAMIC_SHARED(T, shared);
  const int n = p.dims + 1;
  T* const mine = shared + threadIdx.x * embed_numbers(p.dims);
  T* const e = mine;
  T* const work = mine + n;
  T* const weight = mine + 2 * n;
  I* const base = reinterpret_cast<I*>(mine + 3 * n);
  I* const rank = reinterpret_cast<I*>(mine + 4 * n);
  const int64_t point = int64_t{blockIdx.x} * kEmbedThreads<T> + threadIdx.x;
  if (point >= p.all_points) {
    return;
  }
  const DeviceKeys& to = *p.keys_layout;
  const int64_t all = p.all_points;
  const int64_t entries = all * n;
  const bool fits = to.status == 0 && to.layout.words <= p.words;
  if (!fits) {
    for (int r = 0; r < n; ++r) {
      for (int w = 0; w < p.words; ++w) {
        p.keys[w * entries + r * all + point] = 0;
      }
      p.entries[r * all + point] = static_cast<int32_t>(r * all + point);
      p.weights[r * all + point] = T{};
    }
    return;
  }
  load_elevated(p, point, work, e);
  portable::enclosing_simplex<T>(e, p.dims, base, rank, weight, work);
  const auto image = static_cast<uint64_t>(point / p.points);
  for (int r = 0; r < n; ++r) {
    const int64_t entry = r * all + point;
    p.entries[entry] = static_cast<int32_t>(entry);
    p.weights[entry] = weight[r];
    int i = 0;
    for (int w = 0; w < p.words; ++w) {
      uint64_t key = w == to.image_word ? image << to.image_shift : 0;
      for (; i < p.dims && to.layout.word[i] == w; ++i) {
        const I place = base[i] + r - (rank[i] > p.dims - r ? n : 0) - to.layout.minimum[i];
        key += static_cast<uint64_t>(place) << to.layout.shift[i];
      }
      p.keys[w * entries + entry] = key;
    }
  }
}

// A word of the keys in the order so far.
__global__ void __launch_bounds__(kBuildThreads)
    lattice_gather_keys_kernel(const GatherKeysParams p) {
  const int64_t i = int64_t{blockIdx.x} * kBuildThreads + threadIdx.x;
  if (i < p.entries) {
    p.sorted[i] = p.keys[p.order[i]];
  }
}

struct HeadParams {
  const uint64_t* keys;  // [words, entries] as embedded
  const int32_t* order;  // [entries] sorted
  int words;
  int64_t entries;
  int32_t* heads;  // [entries] 1 where a vertex has its first corner
};

__global__ void __launch_bounds__(kBuildThreads) lattice_heads_kernel(const HeadParams p) {
  const int64_t i = int64_t{blockIdx.x} * kBuildThreads + threadIdx.x;
  if (i >= p.entries) {
    return;
  }
  bool head = i == 0;
  for (int w = 0; w < p.words && !head; ++w) {
    const uint64_t* const word = p.keys + w * p.entries;
    head = word[p.order[i]] != word[p.order[i - 1]];
  }
  p.heads[i] = head ? 1 : 0;
}

// One block: a thread for each coordinate, then one packs them.
__global__ void __launch_bounds__(kPlanThreads) lattice_plan_kernel(const PlanParams p) {
  __shared__ double low[kPlanThreads];
  __shared__ double high[kPlanThreads];
  const int n = p.dims + 1;
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) {
    double least = p.bounds[i];
    double most = p.bounds[n + i];
    for (int b = 0; b < p.blocks; ++b) {
      const double l = p.bounds[int64_t{b} * 2 * n + i];
      const double h = p.bounds[int64_t{b} * 2 * n + n + i];
      least = least == least && !(l >= least) ? l : least;  // a NaN stays
      most = most == most && !(h <= most) ? h : most;
    }
    low[i] = least;
    high[i] = most;
  }
  __syncthreads();
  if (i != 0) {
    return;
  }
  DeviceKeys& keys = *p.keys;
  keys.status = 0;
  keys.coordinate = 0;
  int word = 0;
  int used = 0;
  for (int j = 0; j < n && keys.status == 0; ++j) {
    if (!coordinates_fit(low[j], high[j])) {
      keys.status = 1;
      keys.coordinate = high[j] <= kMaxLatticeCoordinate ? low[j] : high[j];
    } else if (j < p.dims) {  // the last coordinate follows from the others
      const CoordinateRange range = coordinate_range(low[j], high[j], p.dims);
      if (used + range.bits > 64) {
        ++word;
        used = 0;
      }
      keys.layout.minimum[j] = range.minimum;
      keys.layout.word[j] = word;
      keys.layout.shift[j] = used;
      used += range.bits;
    }
  }
  if (used + p.image_bits > 64) {
    ++word;
    used = 0;
  }
  keys.image_word = word;
  keys.image_shift = used < 64 ? used : 0;  // without images to tell apart, 0 << 0
  keys.layout.words = word + 1;
}

}  // namespace pydense
