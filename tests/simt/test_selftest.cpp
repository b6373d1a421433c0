// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "driver.h"
#include "selftest/selftest.h"

namespace {

using pydense::selftest_cuda;

void doubles_and_adds_one(size_t n) {
  simt::Buffer<float> x(n, "x");
  simt::Buffer<float> y(n, "y");
  simt::fill(x, 7, 1000);
  selftest_cuda({x.data(), y.data(), static_cast<int64_t>(n)}, 0, nullptr);
  for (size_t i = 0; i < n; ++i) {
    SIMT_EXPECT(y[i] == x[i] * 2.0F + 1.0F);
  }
}

// Past 2^31 elements: the last blocks alone, on memory that is not there.
void beyond_32_bits() {
  constexpr int64_t kN = (int64_t{1} << 31) + 1000;
  constexpr int64_t kBlocks = 1 << 20;  // the launcher's largest grid
  constexpr int64_t kLast = (kN - 1) / 256 % kBlocks;
  simt::SparseMemory x(kN * sizeof(float));
  simt::SparseMemory y(kN * sizeof(float));
  x.as<float>()[kN - 1] = 3;
  simt::config().only_blocks = {static_cast<uint64_t>(kLast)};
  selftest_cuda({x.as<float>(), y.as<float>(), kN}, 0, nullptr);
  simt::config().only_blocks.clear();
  SIMT_EXPECT(y.as<float>()[kN - 1] == 7);
  SIMT_EXPECT(y.as<float>()[kN - 2] == 1);
}

void counters() {
  constexpr size_t kN = 1 << 14;
  simt::Buffer<float> x(kN, "x");
  simt::Buffer<float> y(kN, "y");
  simt::fill(x, 7);
  simt::Limits limits{.kernel = "selftest_kernel", .minimum_bytes = 8.0 * kN};
  limits.moved = limits.sectors = 1.0;
  limits.shape = "2^26 floats";
  limits.scale = 0x1p26 / kN;
  simt::counted(limits,
                [&] { selftest_cuda({x.data(), y.data(), static_cast<int64_t>(kN)}, 0, nullptr); });
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"empty", [] { doubles_and_adds_one(0); }},
                             {"one element", [] { doubles_and_adds_one(1); }},
                             {"a part of a block", [] { doubles_and_adds_one(255); }},
                             {"two blocks and a part", [] { doubles_and_adds_one(515); }},
                             {"2^31 + 1000 elements", beyond_32_bits, simt::kRelease | simt::kAsan},
                             {"counters", counters},
                         });
}
