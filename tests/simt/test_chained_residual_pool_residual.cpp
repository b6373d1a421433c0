// SPDX-License-Identifier: Apache-2.0
// Stages of chained residual pooling on a GPU against a plain sum of products in float64; those in
// float and double also bit by bit against the CPU, and what they pool against the pool's kernel.
#include <algorithm>
#include <memory>
#include <numeric>
#include <type_traits>

#include "chained_residual_pool/residual_stage.h"
#include "pool_checks.h"

namespace {

using namespace pool_checks;  // NOLINT(google-build-using-namespace)

template <class T>
constexpr double kEpsilon = sizeof(T) == 8              ? 0x1p-52
                            : sizeof(T) == 4            ? 0x1p-23
                            : std::is_same_v<T, __half> ? 0x1p-10
                                                        : 0x1p-7;

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

template <class T>
void formats() {
  for (const bool last : {false, true}) {
    stage<T>({1, 8, 6, 8, last, 5}, 1);
    stage<T>({2, 5, 3, 7, last, 3}, 2, {.bias = false});  // no vector fits
  }
}
void dtypes() {
  formats<float>();
  formats<double>();
  formats<__nv_bfloat16>();
  formats<__half>();
}

template <class T>
void special(const PoolShape& shape) {
  stage<T>(shape, 1, {.special = true});
}
// Ties, NaN and -inf: in every corner of the picture, and where tiles meet.
void special_values() {
  const int size = simt::config().seed % 2 == 0 ? 3 : 5;  // a schedule each
  for (const bool last : {false, true}) {
    special<float>({1, 4, 11, 20, last, size});
    special<double>({1, 3, 9, 18, last, size});
    special<__nv_bfloat16>({1, 8, 11, 24, last, size});
    special<__half>({1, 3, 9, 33, last, size});
    special<float>({1, 8, 1, 1, last, 5});
  }
}

// Several tiles of channels and of pixels, with a part of one at the ends; several steps in depth.
// With few pixels, blocks have 64 channels.
void several_tiles() {
  const bool last = simt::config().seed % 2 == 0;  // a schedule each
  stage<float>({1, 72, 1, 24, last, 1}, 1);
  stage<float>({1, 68, 5, 18, last, 5}, 1);
  stage<double>({1, 36, 5, 17, last, 5}, 1);
  stage<__nv_bfloat16>({1, 72, 9, 24, last, 5}, 1);
  stage<__half>({1, 67, 1, 5, last, 1}, 0);
}

// Blocks with all channels, which have up to 512 threads, at the corners of a picture: 11 x 12
// tiles of 8 x 16 pixels, of which a part is beyond the borders. A type and a format a schedule.
void many_channels() {
  const uint64_t seed = simt::config().seed;
  const bool last = seed / 4 % 2 == 0;
  switch (seed % 4) {
    case 0:
      return stage<__nv_bfloat16>({1, 200, 83, 192, last, 5}, 1, {.blocks = {131}});
    case 1:
      return stage<__half>({1, 180, 83, 187, last, 5}, 0, {.blocks = {11}});
    case 2:
      return stage<float>({1, 132, 83, 192, !last, 5}, 1, {.blocks = {131}});
    default:
      return stage<double>({1, 100, 44, 200, last, 5}, 1, {.blocks = {12}});
  }
}

// Pooled by a kernel of its own.
void large_windows() {
  for (const bool last : {false, true}) {
    stage<float>({1, 8, 9, 12, last, 7}, 1);
    stage<__nv_bfloat16>({1, 8, 9, 16, last, 13}, 1);
  }
}

void addends_and_alignment() {
  for (const bool last : {false, true}) {
    stage<float>({1, 8, 4, 4, last, 1}, 4, {.skip = 1});
    stage<__nv_bfloat16>({1, 8, 4, 8, last, 5}, 3, {.skip = 4});
    stage<__half>({1, 16, 1, 1, last, 1}, pydense::kMaxResidualStages);
  }
}

void sums() {
  for (const size_t skip : {size_t{0}, size_t{1}}) {
    sum<float>({2, 3, 5, 8, false, 5}, 3, skip);
    sum<double>({1, 3, 7, 9, true, 5}, pydense::kMaxResidualStages + 1, skip);
    sum<__nv_bfloat16>({1, 8, 3, 5, true, 5}, 5, skip);
    sum<__half>({1, 7, 3, 5, false, 5}, 1, skip);
  }
}

void nothing() {
  stage<float>({0, 3, 4, 4, false, 5}, 1);
  sum<float>({0, 3, 4, 4, false, 5}, 2, 0);
}

// Past 2^31 elements: the block of the last pixels alone, on memory that is not there.
void beyond_32_bits() {
  constexpr int64_t kPixels = (int64_t{1} << 31) / 8 + 128;
  simt::SparseMemory x(kPixels * 8 * sizeof(__half));
  simt::SparseMemory out(kPixels * 8 * sizeof(__half));
  simt::Buffer<__half> weight(64, "weight");
  simt::fill(weight, 1);
  for (const bool last : {false, true}) {
    for (const int size : {1, 5}) {
      // Of contiguous pictures, the pixels that a block has are those of a row of 16.
      const int64_t width = last ? 128 : 16;
      const PoolShape shape = {1, 8, kPixels / width, width, last, size};
      const auto at = [&](int64_t c) {
        return last ? (kPixels - 1) * 8 + c : (c + 1) * kPixels - 1;
      };
      x.as<__half>()[at(3)] = rounded<__half>(2);
      const int64_t down = (shape.height + 7) / 8;
      simt::config().only_blocks = {
          static_cast<uint64_t>(size == 1 ? kPixels / 128 - 1 : down * (width / 16) - 1)};
      pydense::residual_stage_cuda(kOp, FloatType::kFloat16,
                                   {shape,
                                    {x.as<__half>(), 0, 1, width * 8},
                                    weight.data(),
                                    nullptr,
                                    nullptr,
                                    0,
                                    out.as<__half>(),
                                    nullptr,
                                    nullptr},
                                   0, nullptr);
      simt::config().only_blocks.clear();
      for (int c = 0; c < 8; ++c) {
        SIMT_EXPECT(value(out.as<__half>()[at(c)]) ==
                    2 * value(weight[static_cast<size_t>(c * 8 + 3)]));
        out.as<__half>()[at(c)] = rounded<__half>(0);
      }
      x.as<__half>()[at(3)] = rounded<__half>(0);
    }
  }
}

// ---- what is asked of memory -------------------------------------------------------------------

enum class Asked { kProduct, kStage, kTraining };

// The first blocks, of 128 pixels each, stand for all of the shape.
template <class T>
void count_stage(const char* kernel, const char* name, bool last, Asked asked, int64_t blocks,
                 double wavefronts = 1.05, const char* reason = "") {
  constexpr int64_t kChannels = 256;
  const auto elements = static_cast<size_t>(kChannels * 128 * 128);
  simt::Buffer<T> x(elements, "x");
  simt::Buffer<T> weight(kChannels * kChannels, "weight");
  simt::Buffer<T> addend(elements, "addend");
  simt::Buffer<T> out(elements, "out");
  simt::Buffer<T> pooled(elements, "pooled");
  simt::Buffer<uint8_t> offsets(elements, "offsets");
  simt::fill(x, 1);
  simt::fill(weight, 2);
  simt::fill(addend, 3);
  const PoolSource source = {addend.data(), 0, 0, 0};
  simt::config().only_blocks.resize(static_cast<size_t>(blocks));
  std::iota(simt::config().only_blocks.begin(), simt::config().only_blocks.end(), uint64_t{0});
  const bool trains = asked == Asked::kTraining;
  const int64_t numbers = kChannels * 128 * blocks;
  const auto size = static_cast<int64_t>(sizeof(T));
  simt::Limits limits{
      .kernel = kernel,
      .minimum_bytes = static_cast<double>((3 * numbers + kChannels * kChannels) * size +
                                           (trains ? numbers * (size + 1) : 0))};
  limits.shape = name;
  limits.scale = 8.0 * 128 / static_cast<double>(blocks);
  limits.wavefronts = wavefronts;
  limits.reason = reason;
  simt::counted(limits, [&] {
    pydense::residual_stage_cuda(kOp, kFloatType<T>,
                                 {{8, kChannels, 128, 128, last, asked == Asked::kProduct ? 1 : 5},
                                  {x.data(), 0, 0, 0},
                                  weight.data(),
                                  nullptr,
                                  &source,
                                  1,
                                  out.data(),
                                  trains ? pooled.data() : nullptr,
                                  trains ? offsets.data() : nullptr},
                                 0, nullptr);
  });
  simt::config().only_blocks.clear();
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  using Bf16 = __nv_bfloat16;
  constexpr const char* kMma = "residual_mma_kernel";
  constexpr const char* kFma = "residual_fma_kernel";
  count_stage<Bf16>(kMma, "8 x 256 x 128 x 128, bfloat16, 1 addend", false, Asked::kProduct, 4);
  count_stage<Bf16>(kMma, "8 x 256 x 128 x 128, bfloat16, 1 addend, channels_last", true,
                    Asked::kProduct, 4);
  count_stage<Bf16>(kMma, "8 x 256 x 128 x 128, bfloat16, 5 x 5, 1 addend", false, Asked::kStage,
                    8);
  count_stage<Bf16>(kMma, "8 x 256 x 128 x 128, bfloat16, 5 x 5, 1 addend, offsets, channels_last",
                    true, Asked::kTraining, 8);
  count_stage<float>(kFma, "8 x 256 x 128 x 128, float32, 1 addend", false, Asked::kProduct, 2);
  count_stage<float>(kFma, "8 x 256 x 128 x 128, float32, 5 x 5, 1 addend", false, Asked::kStage,
                     4);

  constexpr size_t kElements = size_t{1} << 16;
  simt::Buffer<__nv_bfloat16> out(kElements, "out");
  std::vector<std::unique_ptr<simt::Buffer<__nv_bfloat16>>> more;
  std::vector<PoolSource> addends;
  for (int k = 0; k < 5; ++k) {
    more.push_back(std::make_unique<simt::Buffer<__nv_bfloat16>>(kElements, "addend"));
    simt::fill(*more.back(), static_cast<uint64_t>(k));
    addends.push_back({more.back()->data(), 0, 0, 0});
  }
  simt::Limits limits{.kernel = "residual_sum_kernel", .minimum_bytes = 6 * 2.0 * kElements};
  limits.shape = "8 x 256 x 128 x 128, bfloat16, 5 addends";
  limits.scale = 8.0 * 256 * 128 * 128 / kElements;
  simt::counted(limits, [&] {
    pydense::residual_sum_cuda(FloatType::kBFloat16,
                               {{1, 4, 128, 128, false, 5}, addends.data(), 5, out.data()}, 0,
                               nullptr);
  });
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"every dtype", dtypes},
                             {"ties, NaN and -inf", special_values},
                             {"several tiles", several_tiles},
                             {"many channels", many_channels},
                             {"large windows", large_windows},
                             {"addends and alignment", addends_and_alignment},
                             {"sums", sums},
                             {"nothing", nothing},
                             {"2^31 + 1024 elements", beyond_32_bits, simt::kRelease | simt::kAsan},
                             {"counters", counters, simt::kTrace},
                         });
}
