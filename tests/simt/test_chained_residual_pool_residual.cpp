// SPDX-License-Identifier: Apache-2.0
// Stages of chained residual pooling on a GPU against a plain sum of products in float64; those in
// float and double also bit by bit against the CPU.
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

  // `skip` elements before the first one: memory that no vector is aligned to.
  Problem(const PoolShape& shape, int num_addends, size_t skip)
      : layout{shape},
        x(layout.elements() + skip, "x"),
        weight(static_cast<size_t>(shape.channels * shape.channels), "weight"),
        bias(static_cast<size_t>(shape.channels), "bias") {
    simt::fill(x, 1);
    simt::fill(weight, 2);
    simt::fill(bias, 3);
    for (int k = 0; k < num_addends; ++k) {
      more.push_back(std::make_unique<simt::Buffer<T>>(layout.elements() + skip, "addend"));
      simt::fill(*more.back(), static_cast<uint64_t>(4 + k));
      addends.push_back(layout.source(more.back()->data() + skip));
    }
  }
};

template <class T>
void stage(const PoolShape& shape, int num_addends, bool with_bias = true, size_t skip = 0) {
  Problem<T> p(shape, num_addends, skip);
  const size_t elements = p.layout.elements();
  simt::Buffer<T> out(elements + skip, "out");
  simt::Buffer<T> pooled(elements + skip, "pooled");
  simt::Buffer<uint8_t> offsets(elements, "offsets");
  const auto args = [&](simt::Buffer<T>& to, T* pool, uint8_t* codes) {
    return pydense::ResidualStageArgs{shape,
                                      p.layout.source(p.x.data() + skip),
                                      p.weight.data(),
                                      with_bias ? p.bias.data() : nullptr,
                                      p.addends.data(),
                                      num_addends,
                                      to.data() + skip,
                                      pool,
                                      codes};
  };
  const bool pools = shape.size > 1;
  pydense::residual_stage_cuda(
      kOp, kFloatType<T>,
      args(out, pools ? pooled.data() + skip : nullptr, pools ? offsets.data() : nullptr), 0,
      nullptr);
  const T* const operand = (pools ? pooled : p.x).data() + skip;
  double terms = static_cast<double>(shape.channels + num_addends + 1);
  for_each_element(shape, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
    const size_t at = p.layout.at(n, c, y, x);
    if (pools) {
      const Maximum best = maximum_at(p.x, p.layout, n, c, y, x, skip);
      SIMT_EXPECT(value(pooled[at + skip]) == value(p.x[p.layout.at(n, c, best.y, best.x) + skip]));
    }
    double sum = with_bias ? value(p.bias[static_cast<size_t>(c)]) : 0;
    for (const auto& addend : p.more) {
      sum += value((*addend)[at + skip]);
    }
    for (int64_t k = 0; k < shape.channels; ++k) {
      sum += value(p.weight[static_cast<size_t>(c * shape.channels + k)]) *
             value(operand[p.layout.at(n, k, y, x)]);
    }
    simt::expect_close_at(__FILE__, __LINE__, value(out[at + skip]), sum, kEpsilon<T>,
                          terms * (sizeof(T) == 8 ? 0x1p-52 : 0x1p-23), at);
  });
  if constexpr (sizeof(T) >= 4) {
    if (pydense::current_cpu_isa() != pydense::CpuIsa::kBaseline) {
      simt::Buffer<T> cpu(elements + skip, "out of the CPU");
      pydense::residual_stage(kOp, kFloatType<T>, args(cpu, nullptr, nullptr), pydense::serial_for);
      SIMT_EXPECT(std::memcmp(out.data() + skip, cpu.data() + skip, elements * sizeof(T)) == 0);
    }
  }
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
    stage<T>({2, 5, 3, 7, last, 3}, 2, false);  // no vector fits
  }
}
void dtypes() {
  formats<float>();
  formats<double>();
  formats<__nv_bfloat16>();
  formats<__half>();
}

// Several tiles of channels and of pixels, with a part of one at the ends; several steps in depth.
void several_tiles() {
  const bool last = simt::config().seed % 2 == 0;  // a schedule each
  stage<float>({1, 136, 1, 136, last, 1}, 1);
  stage<double>({1, 72, 1, 72, last, 1}, 1);
  stage<__nv_bfloat16>({1, 136, 1, 136, last, 1}, 1);
  stage<__half>({1, 131, 1, 5, last, 1}, 0);
}

void addends_and_alignment() {
  for (const bool last : {false, true}) {
    stage<float>({1, 8, 4, 4, last, 1}, 4, true, 1);
    stage<__nv_bfloat16>({1, 8, 4, 4, last, 3}, 3, true, 4);
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
  const int64_t last = (kPixels - 1) * 8;
  x.as<__half>()[last + 3] = rounded<__half>(2);
  simt::config().only_blocks = {kPixels / 128 - 1};
  pydense::residual_stage_cuda(kOp, FloatType::kFloat16,
                               {{1, 8, kPixels / 128, 128, true, 1},
                                {x.as<__half>(), 0, 1, 128 * 8},
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
    SIMT_EXPECT(value(out.as<__half>()[last + c]) ==
                2 * value(weight[static_cast<size_t>(c * 8 + 3)]));
  }
}

// ---- what is asked of memory -------------------------------------------------------------------

// The first blocks, which share `pixels` pixels, stand for all of the shape.
template <class T>
void count_product(const char* kernel, const char* name, bool last, int64_t pixels,
                   uint64_t blocks) {
  constexpr int64_t kChannels = 256;
  const auto elements = static_cast<size_t>(kChannels * 128 * 128);
  simt::Buffer<T> x(elements, "x");
  simt::Buffer<T> weight(kChannels * kChannels, "weight");
  simt::Buffer<T> addend(elements, "addend");
  simt::Buffer<T> out(elements, "out");
  simt::fill(x, 1);
  simt::fill(weight, 2);
  simt::fill(addend, 3);
  const PoolSource source = {addend.data(), 0, 0, 0};
  simt::config().only_blocks.resize(blocks);
  std::iota(simt::config().only_blocks.begin(), simt::config().only_blocks.end(), uint64_t{0});
  simt::Limits limits{
      .kernel = kernel,
      .minimum_bytes = static_cast<double>((3 * kChannels * pixels + kChannels * kChannels) *
                                           static_cast<int64_t>(sizeof(T)))};
  limits.shape = name;
  limits.scale = 8.0 * 128 * 128 / static_cast<double>(pixels);
  simt::counted(limits, [&] {
    pydense::residual_stage_cuda(kOp, kFloatType<T>,
                                 {{8, kChannels, 128, 128, last, 1},
                                  {x.data(), 0, 0, 0},
                                  weight.data(),
                                  nullptr,
                                  &source,
                                  1,
                                  out.data(),
                                  nullptr,
                                  nullptr},
                                 0, nullptr);
  });
  simt::config().only_blocks.clear();
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  constexpr const char* kMma = "residual_mma_kernel";
  count_product<__nv_bfloat16>(kMma, "8 x 256 x 128 x 128, bfloat16, 1 addend", false, 512, 8);
  count_product<__nv_bfloat16>(kMma, "8 x 256 x 128 x 128, bfloat16, 1 addend, channels_last", true,
                               512, 8);
  count_product<float>("residual_fma_kernel", "8 x 256 x 128 x 128, float32, 1 addend", false, 256,
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
                             {"several tiles", several_tiles},
                             {"addends and alignment", addends_and_alignment},
                             {"sums", sums},
                             {"nothing", nothing},
                             {"2^31 + 1024 elements", beyond_32_bits, simt::kRelease | simt::kAsan},
                             {"counters", counters, simt::kTrace},
                         });
}
