// SPDX-License-Identifier: Apache-2.0
// Where a point lies in the lattice, as a kernel finds it: with the bits of the CPU.
#pragma once

#include "common/cuda.cuh"
#include "dense_crf/device_lattice.h"
#include "dense_crf/lattice_keys.h"

namespace pydense {

// The same bits as another type: what permutohedral_math.h calls has to be known before it.
template <class To, class From>
PYDENSE_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace pydense

#include "dense_crf/permutohedral_math.h"

namespace pydense {

// Of kernels with numbers of their own in shared memory, see below.
template <class T>
constexpr int kEmbedThreads = 512 / static_cast<int>(sizeof(T));
constexpr int kCoordinates = kMaxLatticeDims + 1;

// What packing decides, once for all points.
struct DeviceKeys {
  KeyLayout layout;  // words: with the image's
  int image_word;
  int image_shift;
  int status;         // 0, or 1 where a coordinate does not fit
  double coordinate;  // that one
};

// The integer of T's size.
template <class T>
struct IntegerOf {
  using Type = int32_t;
};
template <>
struct IntegerOf<double> {
  using Type = int64_t;
};

template <class T>
struct EmbedParams {
  const T* data;
  int64_t strides[3];
  int64_t points;  // of an image
  int64_t all_points;
  int dims;
  int words;
  T scale[kMaxLatticeDims];
  double* bounds;  // [blocks, 2, d + 1]
  const DeviceKeys* keys_layout;
  uint64_t* keys;    // [words, entries]
  int32_t* entries;  // [entries] 0, 1, 2, ...
  T* weights;        // [d + 1, all points]
};

// A thread's numbers in shared memory: runtime sizes would put them into local memory. An odd
// number of them, so that threads side by side meet no bank conflicts.
PYDENSE_HD constexpr int64_t embed_numbers(int dims) { return int64_t{5} * (dims + 1) | 1; }
// Of a block; within the 99 KB that a block may have on every card since compute capability 8.0.
template <class T>
constexpr size_t embed_bytes(int dims) {
  return static_cast<size_t>(embed_numbers(dims)) * kEmbedThreads<T> * sizeof(T);
}
static_assert(embed_bytes<float>(kMaxLatticeDims) <= 99 * 1024 &&
              embed_bytes<double>(kMaxLatticeDims) <= 99 * 1024);
static_assert(kEmbedThreads<double> >= kCoordinates);  // one for each, to find the bounds

template <class T>
__device__ __forceinline__ void load_elevated(const EmbedParams<T>& p, int64_t point, T* feature,
                                              T* e) {
  const T* from = p.data + point / p.points * p.strides[0] + point % p.points * p.strides[2];
  for (int i = 0; i < p.dims; ++i) {
    feature[i] = from[i * p.strides[1]];
  }
  portable::elevate(feature, p.scale, p.dims, e);
}

}  // namespace pydense
