// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "atrous_conv/tap_stack_kernels.cuh"
#include "common/parallel.h"
#include "common/picture_launch.cuh"

namespace pydense {
namespace {

constexpr int64_t kSharedBytes = 32 << 10;
constexpr int kMostChunkBits = 7;

template <class T>
void launch_stack(const char* op, const TapStackArgs& args, int device, void* stream) {
  const TapMembers& members = args.members;
  TapStackParams<T> p{};
  p.first = args.first;
  p.count = args.count;
  p.channels = args.channels;
  p.stack = static_cast<T*>(args.stack);
  p.taps = static_cast<int32_t>(members.taps);
  p.branches = members.branches;
  int16_t found = 0;
  for (int64_t t = 0; t < members.taps; ++t) {
    p.starts[t] = found;
    for (int m = 0; m < members.branches * kBranchTaps; ++m) {
      if (members.places[m] == t) {
        p.members[found++] = static_cast<int16_t>(m);
      }
    }
  }
  p.starts[members.taps] = found;
  for (int b = 0; b < members.branches; ++b) {
    p.weights[b] = static_cast<const T*>(args.weights[b]);
  }
  const auto row = static_cast<int64_t>(sizeof(Accumulate<T>)) * members.branches * kBranchTaps;
  p.chunk_bits = kMostChunkBits;
  while (p.chunk_bits > 0 && row << p.chunk_bits > kSharedBytes) {
    --p.chunk_bits;
  }
  const int64_t chunks = ceil_div(args.channels, int64_t{1} << p.chunk_bits);
  p.chunks = static_cast<uint32_t>(chunks);
  PYDENSE_CHECK(chunks <= INT32_MAX / args.count, op,
                ": weights must have less than 2^31 tiles, got ", args.count, " x ", chunks);
  const LaunchConfig config = {dim3(static_cast<unsigned>(args.count * chunks)),
                               dim3(kStackThreads), static_cast<size_t>(row << p.chunk_bits),
                               device, stream};
  PYDENSE_LAUNCH((tap_stack_kernel<T>), config, p);
}

template <class T, class S>
void launch_unstack(const char* op, const TapUnstackArgs& args, int device, void* stream) {
  TapUnstackParams<T, S> p{};
  p.stack = static_cast<const S*>(args.stack);
  p.weight = static_cast<T*>(args.weight);
  p.outputs = args.outputs;
  p.channels = args.channels;
  for (int k = 0; k < kBranchTaps; ++k) {
    p.places[k] = static_cast<int32_t>(args.places[k]);
  }
  const int64_t chunks = ceil_div(args.channels, int64_t{kUnstackChannels});
  p.chunks = static_cast<uint32_t>(chunks);
  PYDENSE_CHECK(chunks <= INT32_MAX / args.outputs, op,
                ": weight must have less than 2^31 tiles, got ", args.outputs, " x ", chunks);
  const LaunchConfig config = {dim3(static_cast<unsigned>(args.outputs * chunks)),
                               dim3(kStackThreads), 0, device, stream};
  PYDENSE_LAUNCH((tap_unstack_kernel<T, S>), config, p);
}

void check_places(const char* op, int64_t taps, const int64_t* places, int64_t count) {
  PYDENSE_CHECK(taps >= 0 && taps <= kMaxTaps, op, ": taps must be at most ", kMaxTaps, ", got ",
                taps);
  for (int64_t k = 0; k < count; ++k) {
    PYDENSE_CHECK(places[k] >= -1 && places[k] < taps, op, ": places must be in [-1, ", taps,
                  "), got ", places[k]);
  }
}

}  // namespace

void tap_stack_cuda(const char* op, FloatType dtype, const TapStackArgs& args, int device,
                    void* stream) {
  const TapMembers& members = args.members;
  PYDENSE_CHECK(members.branches >= 1 && members.branches <= kMaxTapBranches, op,
                ": weights must be 1 to ", kMaxTapBranches, ", got ", members.branches);
  check_places(op, members.taps, members.places, int64_t{members.branches} * kBranchTaps);
  if (members.taps == 0 || args.count == 0 || args.channels == 0) {
    return;
  }
  with_picture_type(dtype, false,
                    [&]<class T>(T, auto) { launch_stack<T>(op, args, device, stream); });
}

void tap_unstack_cuda(const char* op, FloatType dtype, const TapUnstackArgs& args, int device,
                      void* stream) {
  check_places(op, args.taps, args.places, kBranchTaps);
  if (args.outputs == 0 || args.channels == 0) {
    return;
  }
  with_picture_type(dtype, false, [&]<class T>(T, auto) {
    if constexpr (sizeof(T) == 2) {
      if (args.wide) {
        return launch_unstack<T, float>(op, args, device, stream);
      }
    }
    launch_unstack<T, T>(op, args, device, stream);
  });
}

}  // namespace pydense
