// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "residual_checks.h"

namespace {

using namespace residual_checks;  // NOLINT(google-build-using-namespace)

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
