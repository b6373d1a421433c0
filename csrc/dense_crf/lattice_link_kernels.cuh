// SPDX-License-Identifier: Apache-2.0
// From sorted corners to a lattice: vertices, who lies next to whom, the chunks of corners that
// splatting sums up, and the factors that normalise the filter.
#pragma once

#include "common/cuda.cuh"
#include "dense_crf/device_lattice.h"
#include "dense_crf/lattice_build_kernels.cuh"

namespace pydense {

template <class T>
struct NumberParams {
  const uint64_t* keys;  // [words, entries] as embedded
  const int32_t* order;  // [entries] sorted
  const int32_t* ranks;  // [entries] how many vertices up to here
  const T* weights;      // [entries] as embedded
  int words;
  int64_t entries;
  int64_t all_points;
  int64_t capacity;
  uint64_t* vertex_keys;  // [words, capacity]
  int32_t* entry_starts;  // [vertices + 1]
  T* to_weights;
  int32_t* ids;
  int32_t* entry_points;
  T* entry_weights;
};

template <class T>
__global__ void __launch_bounds__(kBuildThreads) lattice_number_kernel(const NumberParams<T> p) {
  const int64_t i = int64_t{blockIdx.x} * kBuildThreads + threadIdx.x;
  if (i >= p.entries) {
    return;
  }
  const int32_t entry = p.order[i];
  const int32_t vertex = p.ranks[i] - 1;
  p.to_weights[i] = p.weights[i];
  p.ids[entry] = vertex;
  p.entry_points[i] = static_cast<int32_t>(entry % p.all_points);
  p.entry_weights[i] = p.weights[entry];
  if (i == 0 || p.ranks[i - 1] != vertex + 1) {
    p.entry_starts[vertex] = static_cast<int32_t>(i);
    for (int w = 0; w < p.words; ++w) {
      p.vertex_keys[w * p.capacity + vertex] = p.keys[w * p.entries + entry];
    }
  }
  if (i == p.entries - 1) {
    p.entry_starts[vertex + 1] = static_cast<int32_t>(p.entries);
  }
}

struct LinkParams {
  const DeviceKeys* layout;
  const uint64_t* vertex_keys;  // [words, capacity] in ascending order, the last word first
  const int32_t* entry_starts;
  int words;
  int dims;
  int64_t vertices;
  int64_t capacity;
  int32_t* neighbours;    // [d + 1, capacity, 2]
  int32_t* chunk_counts;  // [capacity]
};

// A word of what a step along an axis adds to a key: 1 to all coordinates, and - (d + 1) to that of
// the axis.
__device__ __forceinline__ uint64_t step_word(const KeyLayout& layout, int dims, int axis, int w) {
  uint64_t step = 0;
  for (int i = 0; i < dims; ++i) {
    if (layout.word[i] == w) {
      const int64_t by = i == axis ? -dims : 1;
      step += static_cast<uint64_t>(by) << layout.shift[i];
    }
  }
  return step;
}

// Where key(vertex) + sign * step is, or -1.
__device__ __forceinline__ int32_t find_neighbour(const LinkParams& p, int64_t vertex, int axis,
                                                  bool ahead) {
  const auto wanted = [&](int w) {
    const uint64_t step = step_word(p.layout->layout, p.dims, axis, w);
    const uint64_t key = p.vertex_keys[w * p.capacity + vertex];
    return ahead ? key + step : key - step;
  };
  const int last = p.words - 1;
  const uint64_t top = wanted(last);
  int64_t low = 0;  // the first that is not below
  int64_t high = p.vertices;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    uint64_t theirs = p.vertex_keys[last * p.capacity + middle];
    uint64_t ours = top;
    for (int w = last - 1; w >= 0 && theirs == ours; --w) {
      theirs = p.vertex_keys[w * p.capacity + middle];
      ours = wanted(w);
    }
    if (theirs < ours) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  bool found = low < p.vertices;
  for (int w = 0; w < p.words && found; ++w) {
    found = p.vertex_keys[w * p.capacity + low] == wanted(w);
  }
  return found ? static_cast<int32_t>(low) : -1;
}

// blockIdx.y is the axis.
__global__ void __launch_bounds__(kBuildThreads) lattice_link_kernel(const LinkParams p) {
  const int64_t vertex = int64_t{blockIdx.x} * kBuildThreads + threadIdx.x;
  const int axis = static_cast<int>(blockIdx.y);
  if (vertex >= p.capacity) {
    return;
  }
  const bool real = vertex < p.vertices;
  Vector<int32_t, 2> both;
  both[0] = real ? find_neighbour(p, vertex, axis, false) : -1;
  both[1] = real ? find_neighbour(p, vertex, axis, true) : -1;
  store_global_vector(p.neighbours + 2 * (axis * p.capacity + vertex), both);
  if (axis == 0) {
    const int32_t length = real ? p.entry_starts[vertex + 1] - p.entry_starts[vertex] : 0;
    p.chunk_counts[vertex] =
        (length + static_cast<int32_t>(kChunkEntries) - 1) / static_cast<int32_t>(kChunkEntries);
  }
}

struct ChunkParams {
  const int32_t* entry_starts;
  const int32_t* chunk_sums;  // [capacity] chunks up to each vertex
  int64_t vertices;
  int64_t capacity;
  int64_t chunk_capacity;
  int64_t entries;
  int64_t* counts;        // vertices, chunks
  int32_t* chunk_starts;  // [capacity + 1]
  int32_t* chunks;        // [chunk_capacity + 1, 2]
};

__global__ void __launch_bounds__(kBuildThreads) lattice_chunk_kernel(const ChunkParams p) {
  const int64_t i = int64_t{blockIdx.x} * kBuildThreads + threadIdx.x;
  if (i <= p.capacity) {
    p.chunk_starts[i] = i == 0 ? 0 : p.chunk_sums[i - 1];
  }
  const int64_t chunks = p.chunk_sums[p.capacity - 1];
  if (i == 0) {
    p.counts[0] = p.vertices;
    p.counts[1] = chunks;
  }
  if (i > chunks) {
    return;
  }
  Vector<int32_t, 2> chunk;
  if (i == chunks) {
    chunk[0] = static_cast<int32_t>(p.entries);
    chunk[1] = 0;
  } else {
    int64_t low = 0;  // the first vertex with more than i chunks up to it
    int64_t high = p.vertices - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.chunk_sums[middle] > i) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int32_t first = low == 0 ? 0 : p.chunk_sums[low - 1];
    const auto vertex = static_cast<int32_t>(low);
    chunk[0] = p.entry_starts[low] + static_cast<int32_t>((i - first) * kChunkEntries);
    chunk[1] = p.chunk_sums[low] - first > 1 ? ~vertex : vertex;
  }
  store_global_vector(p.chunks + 2 * i, chunk);
}

template <class T>
struct NormParams {
  DeviceLattice<T> lattice;
  const T* rows;  // [capacity, width] K 1 at the vertices; null without normalisation
  int64_t width;
  T alpha;
  bool symmetric;
  T* norm;
  T* self;
};

// The diagonal of slice * blur * splat at a point. Blurring takes a value from a corner r of a
// simplex to a corner s along the axes that lie between them, forwards, or along all others,
// backwards, in the order of the axes and through vertices that exist; half of it is left at every
// step.
template <class T>
__device__ __forceinline__ T self_share(const DeviceLattice<T>& lattice, int64_t point) {
  const int n = lattice.shape.dims + 1;
  const int64_t all = lattice.shape.all_points();
  const auto neighbour = [&](int32_t vertex, int axis, bool ahead) {
    return lattice.neighbours[2 * (axis * lattice.capacity + vertex) + (ahead ? 1 : 0)];
  };
  const auto walk = [&](int32_t vertex, uint64_t axes, int steps, bool ahead) {
    for (int j = 0; j < n && vertex >= 0; ++j) {
      if ((axes >> j & 1) != 0) {
        vertex = neighbour(vertex, j, ahead);
      }
    }
    return vertex < 0 ? T{0} : T{1} / static_cast<T>(int64_t{1} << steps);
  };
  const uint64_t every = (uint64_t{1} << n) - 1;
  T sum{};
  for (int r = 0; r < n; ++r) {
    const int32_t from = lattice.ids[r * all + point];
    const T weight = lattice.weights[r * all + point];
    uint64_t forwards = 0;
    int32_t at = from;
    int s = r;
    for (int steps = 0; steps < n; ++steps) {
      T share = walk(from, forwards, steps, true) + walk(from, every & ~forwards, n - steps, false);
      if (steps == 0) {  // also once around, forwards
        share += walk(from, every, n, true);
      }
      sum += lattice.weights[s * all + point] * weight * share;
      s = s + 1 == n ? 0 : s + 1;
      const int32_t to = lattice.ids[s * all + point];
      int axis = 0;
      while (axis < n - 1 && neighbour(at, axis, true) != to) {
        ++axis;
      }
      forwards |= uint64_t{1} << axis;
      at = to;
    }
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kBuildThreads) lattice_norm_kernel(const NormParams<T> p) {
  const int64_t all = p.lattice.shape.all_points();
  const int64_t point = int64_t{blockIdx.x} * kBuildThreads + threadIdx.x;
  if (point >= all) {
    return;
  }
  T* const self = p.self == nullptr ? nullptr : p.self + point;
  if (self != nullptr) {
    *self = self_share(p.lattice, point);
  }
  T norm = p.alpha;
  if (p.rows != nullptr) {
    T mass{};
    for (int r = 0; r <= p.lattice.shape.dims; ++r) {
      mass += p.lattice.weights[r * all + point] * p.rows[p.lattice.ids[r * all + point] * p.width];
    }
    norm = portable::normalizing_factor<T>(mass, self, p.alpha);
    p.norm[point] = p.symmetric ? sqrt(norm) : norm;
  }
  if (self != nullptr) {
    *self *= norm;
  }
}

}  // namespace pydense
