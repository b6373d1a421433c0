// SPDX-License-Identifier: Apache-2.0
#include "common/device_sort.h"
#include "common/launch.cuh"

#ifdef PYDENSE_SIMT

#include <algorithm>
#include <numeric>
#include <vector>

namespace pydense {

size_t device_sort_bytes(int64_t /*n*/) { return 256; }

void sort_pairs_cuda(const SortPairs& args, void* /*workspace*/, size_t /*bytes*/, int /*device*/,
                     void* /*stream*/) {
  std::vector<int64_t> order(static_cast<size_t>(args.n));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return args.keys[a] < args.keys[b]; });
  for (int64_t i = 0; i < args.n; ++i) {
    args.sorted_keys[i] = args.keys[order[static_cast<size_t>(i)]];
    args.sorted_values[i] = args.values[order[static_cast<size_t>(i)]];
  }
}

void inclusive_sum_cuda(const InclusiveSum& args, void* /*workspace*/, size_t /*bytes*/,
                        int /*device*/, void* /*stream*/) {
  std::inclusive_scan(args.values, args.values + args.n, args.sums);
}

void read_back_cuda(std::initializer_list<ReadBack> ranges, int /*device*/, void* /*stream*/) {
  for (const ReadBack& range : ranges) {
    std::memcpy(range.to, range.from, range.bytes);
  }
}

}  // namespace pydense

#else

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

namespace pydense {
namespace {

cudaError_t sort_pairs(void* workspace, size_t* bytes, const SortPairs& args, void* stream) {
  return cub::DeviceRadixSort::SortPairs(
      workspace, *bytes, args.keys, args.sorted_keys, args.values, args.sorted_values,
      static_cast<int32_t>(args.n), 0, args.bits, static_cast<cudaStream_t>(stream));
}

cudaError_t inclusive_sum(void* workspace, size_t* bytes, const InclusiveSum& args, void* stream) {
  return cub::DeviceScan::InclusiveSum(workspace, *bytes, args.values, args.sums,
                                       static_cast<int32_t>(args.n),
                                       static_cast<cudaStream_t>(stream));
}

}  // namespace

size_t device_sort_bytes(int64_t n) {
  size_t sort = 0;
  size_t sum = 0;
  check_cuda(sort_pairs(nullptr, &sort, {nullptr, nullptr, nullptr, nullptr, n}, nullptr),
             "workspace of sorting");
  check_cuda(inclusive_sum(nullptr, &sum, {nullptr, nullptr, n}, nullptr), "workspace of scanning");
  return std::max({sort, sum, size_t{256}});
}

void sort_pairs_cuda(const SortPairs& args, void* workspace, size_t bytes, int device,
                     void* stream) {
  const CudaDeviceScope scope(device);
  check_cuda(sort_pairs(workspace, &bytes, args, stream), "sorting");
}

void inclusive_sum_cuda(const InclusiveSum& args, void* workspace, size_t bytes, int device,
                        void* stream) {
  const CudaDeviceScope scope(device);
  check_cuda(inclusive_sum(workspace, &bytes, args, stream), "scanning");
}

void read_back_cuda(std::initializer_list<ReadBack> ranges, int device, void* stream) {
  const CudaDeviceScope scope(device);
  for (const ReadBack& range : ranges) {
    check_cuda(cudaMemcpyAsync(range.to, range.from, range.bytes, cudaMemcpyDeviceToHost,
                               static_cast<cudaStream_t>(stream)),
               "copying to the host");
  }
  check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "waiting for the stream");
}

}  // namespace pydense

#endif
