// SPDX-License-Identifier: Apache-2.0
#include "tap_checks.h"

namespace {

using namespace tap_checks;  // NOLINT(google-build-using-namespace)

constexpr const char* kShifted =
    "a tap's pixels begin anywhere between the sectors of memory, and so does a pixel's line";

template <class T>
void count_maps(const char* name, bool last) {
  // DeepLab v2's head, a part of its blocks.
  const Shape shape = of_rates(1, 21, 65, 65, {6, 12, 18, 24});
  const Maps maps = {shape, last, shape.pixels()};
  const Picture picture = {shape, last};
  simt::Buffer<T> map(maps.elements(), "maps");
  simt::Buffer<T> of_out(picture.elements(), "out");
  simt::fill(map, 1);
  simt::fill(of_out, 2);
  int64_t read = 0;  // numbers of a map that some output reads
  for (int64_t t = 0; t < shape.taps(); ++t) {
    read += (shape.height - std::abs(shape.rows[static_cast<size_t>(t)])) *
            (shape.width - std::abs(shape.columns[static_cast<size_t>(t)]));
  }
  const auto out_bytes = static_cast<double>(picture.elements() * sizeof(T));
  simt::Limits add{
      .kernel = "tap_add_kernel",
      .minimum_bytes = static_cast<double>(read * shape.outputs) * sizeof(T) + out_bytes};
  add.shape = name;
  add.sectors = 2.2;
  add.reason = kShifted;
  simt::counted(add, [&] {
    pydense::tap_add_cuda(kOp, kFloatType<T>,
                          {shape.shifts(), map.data(), maps.pitch(), last, 0, nullptr,
                           of_out.data(), picture.strides()},
                          0, nullptr);
  });
  simt::Limits gather{
      .kernel = "tap_gather_kernel",
      .minimum_bytes = static_cast<double>(maps.elements() * sizeof(T)) + out_bytes};
  gather.shape = name;
  gather.sectors = 2.2;
  gather.reason = kShifted;
  simt::counted(gather, [&] {
    pydense::tap_gather_cuda(kOp, kFloatType<T>,
                             {shape.shifts(), of_out.data(), picture.strides(), 0, shape.pixels(),
                              map.data(), maps.pitch(), last},
                             0, nullptr);
  });
}

void count_weights() {
  using T = __nv_bfloat16;
  constexpr int64_t kChannels = 2048;
  constexpr int64_t kCounted = 2;  // of 21 outputs
  constexpr int64_t kTaps = 33;
  std::vector<int64_t> places(36);
  int64_t next = 1;
  for (size_t k = 0; k < places.size(); ++k) {
    places[k] = k % 9 == 4 ? 0 : next++;
  }
  constexpr size_t kSize = kCounted * kChannels * 9;
  std::vector<std::unique_ptr<simt::Buffer<T>>> weights;
  std::vector<const void*> data;
  for (int b = 0; b < 4; ++b) {
    weights.push_back(std::make_unique<simt::Buffer<T>>(kSize, "weight"));
    simt::fill(*weights.back(), static_cast<uint64_t>(b));
    data.push_back(weights.back()->data());
  }
  simt::Buffer<T> stack(static_cast<size_t>(kTaps * kCounted * kChannels), "stack");
  simt::Limits limits{.kernel = "tap_stack_kernel",
                      .minimum_bytes = 2.0 * static_cast<double>(4 * kSize + stack.size())};
  limits.shape = "4 x 21 x 2048 x 3 x 3, bfloat16";
  limits.scale = 21.0 / kCounted;
  simt::counted(limits, [&] {
    pydense::tap_stack_cuda(
        kOp, kFloatType<T>,
        {{kTaps, 4, places.data()}, data.data(), 0, kCounted, kChannels, stack.data()}, 0, nullptr);
  });
  limits.kernel = "tap_unstack_kernel";
  limits.minimum_bytes = 2.0 * 2 * kSize;
  limits.shape = "21 x 2048 x 3 x 3, bfloat16";
  simt::counted(limits, [&] {
    pydense::tap_unstack_cuda(
        kOp, kFloatType<T>,
        {kTaps, places.data(), false, stack.data(), kCounted, kChannels, weights[0]->data()}, 0,
        nullptr);
  });
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  count_maps<__nv_bfloat16>("1 x 21 x 65 x 65, 33 taps, bfloat16", false);
  count_maps<__nv_bfloat16>("1 x 21 x 65 x 65, 33 taps, bfloat16, channels_last", true);
  count_maps<float>("1 x 21 x 65 x 65, 33 taps, float32", false);
  count_weights();
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"every dtype", every_dtype},
                             {"sizes", sizes},
                             {"many branches", many_branches, simt::kRelease},
                             {"random shapes", random_shapes, simt::kRelease},
                             {"nothing", nothing},
                             {"weights", weights},
                             {"2.4 * 10^9 numbers", beyond_32_bits, simt::kRelease | simt::kAsan},
                             {"counters", counters, simt::kTrace},
                         });
}
