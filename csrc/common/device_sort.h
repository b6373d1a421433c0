// SPDX-License-Identifier: Apache-2.0
// Sorting and scanning on a GPU: the only place where a library (CUB) stands in a kernel path.
// Under the shim (tests/simt) the standard library does the same on the CPU. Arrays lie on the
// device; nothing here allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace pydense {

// Workspace, aligned to 256 bytes, that each of the functions below needs for n elements.
size_t device_sort_bytes(int64_t n);

// Sorts by key in ascending order; equal keys keep their order. Inputs and outputs must not
// overlap. 0 <= n < 2^31.
struct SortPairs {
  const uint64_t* keys;
  uint64_t* sorted_keys;
  const int32_t* values;
  int32_t* sorted_values;
  int64_t n;
  int bits = 64;  // of a key that may be other than 0, the lowest ones
};
void sort_pairs_cuda(const SortPairs& args, void* workspace, size_t bytes, int device,
                     void* stream);

// sums[i] = values[0] + ... + values[i]. The sum of all must be below 2^31.
struct InclusiveSum {
  const int32_t* values;
  int32_t* sums;
  int64_t n;
};
void inclusive_sum_cuda(const InclusiveSum& args, void* workspace, size_t bytes, int device,
                        void* stream);

// Copies to the host what earlier work on the stream has written, and waits for it.
struct ReadBack {
  void* to;
  const void* from;
  size_t bytes;
};
void read_back_cuda(std::initializer_list<ReadBack> ranges, int device, void* stream);

}  // namespace pydense
