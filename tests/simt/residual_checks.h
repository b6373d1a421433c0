// SPDX-License-Identifier: Apache-2.0
// Stages of chained residual pooling on a GPU against a plain sum of products in float64; those in
// float and double also bit by bit against the CPU, and what they pool against the pool's kernel:
// one problem at a time.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "chained_residual_pool/residual_stage.h"
#include "pool_checks.h"

namespace residual_checks {

using namespace pool_checks;  // NOLINT(google-build-using-namespace)

template <class T>
struct Problem {
  Layout layout;
  simt::Buffer<T> x;
  simt::Buffer<T> weight;
  simt::Buffer<T> bias;
  std::vector<std::unique_ptr<simt::Buffer<T>>> more;
  std::vector<PoolSource> addends;

  // `skip` elements before the first one: memory that no vector is aligned to. special: whole
  // numbers, of which few differ, with NaN and -inf among them.
  Problem(const PoolShape& shape, int num_addends, size_t skip, bool special = false)
      : layout{shape},
        x(layout.elements() + skip, "x"),
        weight(static_cast<size_t>(shape.channels * shape.channels), "weight"),
        bias(static_cast<size_t>(shape.channels), "bias") {
    simt::fill(x, 1);
    simt::fill(weight, 2);
    simt::fill(bias, 3);
    if (special) {
      fill_whole(x, 1, true);
      fill_whole(weight, 2);
      fill_whole(bias, 3);
    }
    for (int k = 0; k < num_addends; ++k) {
      more.push_back(std::make_unique<simt::Buffer<T>>(layout.elements() + skip, "addend"));
      simt::fill(*more.back(), static_cast<uint64_t>(4 + k));
      if (special) {
        fill_whole(*more.back(), static_cast<uint64_t>(4 + k));
      }
      addends.push_back(layout.source(more.back()->data() + skip));
    }
  }
};

struct Options {
  bool bias = true;
  size_t skip = 0;
  bool special = false;
  std::vector<uint64_t> blocks = {};  // unless empty: the only ones, each with all channels
};

template <class T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
void stage(const PoolShape& shape, int num_addends, const Options& options = {}) {
  const size_t skip = options.skip;
  Problem<T> p(shape, num_addends, skip, options.special);
  const size_t elements = p.layout.elements();
  simt::Buffer<T> out(elements + skip, "out");
  simt::Buffer<T> alone(elements + skip, "out, and nothing else");
  simt::Buffer<T> cpu(elements + skip, "out of the CPU");
  simt::Buffer<T> pooled(elements + skip, "pooled");
  simt::Buffer<uint8_t> offsets(elements + skip, "offsets");
  simt::Buffer<T> maxima(elements, "pooled by the pool's kernel");
  simt::Buffer<uint8_t> places(elements, "offsets of the pool's kernel");
  const auto args = [&](simt::Buffer<T>& to, T* pool, uint8_t* codes) {
    return pydense::ResidualStageArgs{shape,
                                      p.layout.source(p.x.data() + skip),
                                      p.weight.data(),
                                      options.bias ? p.bias.data() : nullptr,
                                      p.addends.data(),
                                      num_addends,
                                      to.data() + skip,
                                      pool,
                                      codes};
  };
  const bool pools = shape.size > 1;
  const bool fuses = pydense::residual_stage_cuda_fuses(shape);
  SIMT_EXPECT(fuses == (shape.size <= 5));
  simt::config().only_blocks = options.blocks;
  pydense::residual_stage_cuda(
      kOp, kFloatType<T>,
      args(out, pools ? pooled.data() + skip : nullptr, pools ? offsets.data() + skip : nullptr), 0,
      nullptr);
  // Without what training keeps, or with its offsets alone.
  const bool again = fuses && options.blocks.empty();
  const bool codes = again && pools && simt::config().seed % 2 == 0;
  simt::Buffer<uint8_t> other(elements, "offsets alone");
  if (again) {
    pydense::residual_stage_cuda(kOp, kFloatType<T>,
                                 args(alone, nullptr, codes ? other.data() : nullptr), 0, nullptr);
  }
  simt::config().only_blocks.clear();
  if (pools) {
    pydense::max_pool_forward_cuda(
        kOp, kFloatType<T>,
        {shape, p.layout.source(p.x.data() + skip), maxima.data(), places.data()}, 0, nullptr);
  }
  const bool exact = sizeof(T) >= 4 && !options.special &&
                     pydense::current_cpu_isa() != pydense::CpuIsa::kBaseline;
  if (exact) {
    pydense::residual_stage(kOp, kFloatType<T>, args(cpu, nullptr, nullptr), pydense::serial_for);
  }
  // The pixels of a block, and its place.
  const int64_t rows = sizeof(T) == 8 ? 4 : 8;
  const int64_t across = (shape.width + 15) / 16;
  const auto runs = [&](int64_t n, int64_t y, int64_t x) {
    const int64_t block = (n * ((shape.height + rows - 1) / rows) + y / rows) * across + x / 16;
    return options.blocks.empty() ||
           std::find(options.blocks.begin(), options.blocks.end(), block) != options.blocks.end();
  };
  const double terms = static_cast<double>(shape.channels + num_addends + 1);
  for_each_element(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    if (!runs(n, y, x)) {
      return;
    }
    const size_t at = p.layout.at(n, c, y, x);
    if (pools) {
      SIMT_EXPECT(same_bits(pooled[at + skip], maxima[at]));
      SIMT_EXPECT(offsets[at + skip] == places[at] && (!codes || other[at] == places[at]));
    }
    if (again) {
      SIMT_EXPECT(same_bits(alone[at + skip], out[at + skip]));
    }
    if (exact) {
      SIMT_EXPECT(same_bits(cpu[at + skip], out[at + skip]));
    }
    double sum = options.bias ? value(p.bias[static_cast<size_t>(c)]) : 0;
    for (const auto& addend : p.more) {
      sum += value((*addend)[at + skip]);
    }
    for (int64_t k = 0; k < shape.channels; ++k) {
      const size_t from = p.layout.at(n, k, y, x);
      sum += value(p.weight[static_cast<size_t>(c * shape.channels + k)]) *
             value(pools ? maxima[from] : p.x[from + skip]);
    }
    const double got = value(out[at + skip]);
    if (!std::isfinite(sum)) {
      SIMT_EXPECT(std::isnan(sum) ? std::isnan(got) : got == sum);
      return;
    }
    simt::expect_close_at(__FILE__, __LINE__, got, sum, kEpsilon<T>,
                          terms * (sizeof(T) == 8 ? 0x1p-52 : 0x1p-23), at);
  });
}

template <class T>
void sum(const PoolShape& shape, int num_addends, size_t skip) {
  Problem<T> p(shape, num_addends, skip);
  const size_t elements = p.layout.elements();
  simt::Buffer<T> out(elements + skip, "out");
  simt::Buffer<T> cpu(elements, "out of the CPU");
  pydense::ResidualSumArgs args = {shape, p.addends.data(), num_addends, out.data() + skip};
  pydense::residual_sum_cuda(kFloatType<T>, args, 0, nullptr);
  args.out = cpu.data();
  pydense::residual_sum(kFloatType<T>, args, pydense::serial_for);
  SIMT_EXPECT(std::memcmp(out.data() + skip, cpu.data(), elements * sizeof(T)) == 0);
  for (size_t i = 0; i < elements; ++i) {
    double expected = 0;
    for (const auto& addend : p.more) {
      expected += value((*addend)[i + skip]);
    }
    simt::expect_close_at(__FILE__, __LINE__, value(out[i + skip]), expected, kEpsilon<T>,
                          num_addends * (sizeof(T) == 8 ? 0x1p-52 : 0x1p-22), i);
  }
}

}  // namespace residual_checks
