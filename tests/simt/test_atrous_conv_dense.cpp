// SPDX-License-Identifier: Apache-2.0
#include "dense_checks.h"

namespace {

using namespace dense_checks;  // NOLINT(google-build-using-namespace)

template <class T>
void formats() {
  const bool last = simt::config().seed % 2 == 0;  // a schedule each
  for (const bool weight_last : {false, true}) {
    convolve<T>(1, 16, 5, 6, {Branch::same(24, 2)}, {.last = last, .weight_last = weight_last});
    convolve<T>(1, 8, 4, 3, {Branch::same(16, 1)},
                {.last = !last, .weight_last = weight_last, .transposed = true});
  }
}
void dtypes() {
  formats<__nv_bfloat16>();
  formats<__half>();
  formats<float>();
}

// No vector fits: odd numbers of channels and outputs, gaps, an odd beginning.
void odd_numbers() {
  for (const bool last : {false, true}) {
    convolve<__nv_bfloat16>(2, 13, 4, 5, {Branch::same(7, 2)}, {.last = last, .factors = false});
    convolve<__half>(1, 8, 3, 7, {Branch::same(8, 1)},
                     {.last = last, .weight_last = true, .gap = 3, .skip = 1});
    convolve<__half>(1, 8, 3, 7, {Branch::same(8, 1)},
                     {.last = last, .weight_last = true, .gap = 8, .skip = 8});
    convolve<float>(1, 3, 2, 3, {Branch::same(1, 1)}, {.last = last});
  }
}

// Kernels of all kinds, uneven padding, outputs without any tap.
void kernels() {
  const bool last = simt::config().seed % 2 == 0;  // a schedule each
  convolve<__half>(1, 8, 9, 7, {{5, 2, 3, 3, 2, 4, 0, 1, 6}}, {.last = last});
  convolve<__half>(1, 8, 2, 2, {{4, 2, 2, 1, 1, 5, 4, 5, 4}}, {.last = last});
  convolve<__nv_bfloat16>(1, 8, 6, 5, {Branch::same(3, 1, 5)}, {.last = !last});
  convolve<__nv_bfloat16>(2, 8, 7, 5, {Branch::same(9, 40)}, {.last = last});
  convolve<__nv_bfloat16>(3, 8, 1, 1, {Branch::same(9, 1, 1)}, {.last = !last});
}

// Several tiles of pixels and of outputs, full ones among them; long sums, in parts.
void several_tiles() {
  const bool last = simt::config().seed % 2 == 0;
  convolve<__nv_bfloat16>(2, 40, 9, 17, {Branch::same(140, 3)}, {.last = last});
  convolve<__half>(1, 200, 12, 13, {Branch::same(40, 4)}, {.last = !last});
  convolve<float>(1, 72, 12, 12, {Branch::same(33, 12, 1)}, {.last = last});
}

void several_branches() {
  const bool last = simt::config().seed % 2 == 0;
  convolve<__nv_bfloat16>(1, 24, 9, 8,
                          {Branch::same(16, 1, 1), Branch::same(24, 2), Branch::same(8, 5)},
                          {.last = last, .weight_last = !last});
  convolve<__half>(1, 136, 7, 7, {Branch::same(5, 3), Branch::same(36, 9), Branch::same(3, 1, 1)},
                   {.last = !last});
  // More classes than a launch has.
  convolve<__half>(1, 8, 7, 6, {Branch::same(3, 1, 5), Branch::same(8, 2, 5)}, {.last = last});
}

template <class T>
void gradient_formats() {
  const bool last = simt::config().seed % 2 == 0;
  for (const bool weight_last : {false, true}) {
    weight_gradient<T>(2, 16, 5, 6, Branch::same(24, 2),
                       {.last = last, .weight_last = weight_last});
  }
}
void gradients() {
  const bool last = simt::config().seed % 2 == 0;
  gradient_formats<__nv_bfloat16>();
  gradient_formats<__half>();
  gradient_formats<float>();
  weight_gradient<__half>(1, 13, 4, 5, Branch::same(7, 2), {.last = last, .skip = 1});
  weight_gradient<__half>(2, 8, 9, 7, {5, 2, 3, 3, 2, 4, 0, 1, 6}, {.last = !last, .gap = 8});
  weight_gradient<__nv_bfloat16>(1, 8, 6, 5, Branch::same(8, 1, 5), {.last = last});
  weight_gradient<__nv_bfloat16>(2, 8, 3, 4, Branch::same(8, 40), {.last = last});
}
// Several tiles of outputs and of channels, and long sums in parts.
void gradient_tiles() {
  const bool last = simt::config().seed % 2 == 0;
  switch (simt::config().seed % 3) {
    case 0:
      return weight_gradient<__nv_bfloat16>(1, 264, 13, 14, Branch::same(130, 1, 1),
                                            {.last = last, .weight_last = last});
    case 1:
      return weight_gradient<__half>(2, 136, 11, 9, Branch::same(40, 4), {.last = !last});
    default:
      return weight_gradient<float>(1, 20, 17, 16, Branch::same(132, 9), {.last = last});
  }
}

void nothing() {
  weight_gradient<__half>(0, 8, 4, 4, Branch::same(8, 2), {});
  convolve<__half>(0, 8, 4, 4, {Branch::same(8, 2)}, {});
}

// Past 2^31 elements: the block of the last pixels alone, on memory that is not there.
void beyond_32_bits() {
  constexpr int64_t kWidth = 1024;
  constexpr int64_t kHeight = (int64_t{1} << 31) / 8 / kWidth + 1;
  constexpr int64_t kNumbers = kHeight * kWidth * 8;
  simt::SparseMemory x(kNumbers * sizeof(__half));
  simt::SparseMemory out(kNumbers * sizeof(__half));
  simt::Buffer<__half> weight(64, "weight");
  fill_exactly(weight, 1);
  x.as<__half>()[kNumbers - 8 + 3] = rounded<__half>(2);
  const int64_t row = kWidth * 8;
  const DenseConvArgs own = {{1, 8, 8, kHeight, kWidth, kHeight, kWidth, 1, 1, 1, 1, 0, 0},
                             {x.as<__half>(), kNumbers, 1, row, 8},
                             {weight.data(), 8, 1, 64, false},
                             nullptr,
                             nullptr,
                             nullptr,
                             false,
                             {out.as<__half>(), kNumbers, 1, row, 8}};
  const pydense::DenseConvCudaArgs args = {&own, 1};
  simt::Buffer<uint8_t> workspace(
      static_cast<size_t>(pydense::dense_conv_cuda_workspace(kOp, FloatType::kFloat16, args)),
      "workspace");
  simt::config().only_blocks = {static_cast<uint64_t>(kHeight * kWidth / 128 - 1)};
  pydense::dense_conv_cuda(kOp, FloatType::kFloat16, args, workspace.data(), 0, nullptr);
  simt::config().only_blocks.clear();
  for (size_t o = 0; o < 8; ++o) {
    __half& got = out.as<__half>()[kNumbers - 8 + static_cast<int64_t>(o)];
    SIMT_EXPECT(value(got) == value(rounded<__half>(2 * value(weight[o * 8 + 3]))));
    got = rounded<__half>(0);
  }
  x.as<__half>()[kNumbers - 8 + 3] = rounded<__half>(0);
}

// ---- what is asked of memory -------------------------------------------------------------------

constexpr const char* kMma = "dense_mma_kernel";

// Maps of 1 x channels x size x size, all bytes of them; the weights' and the results'.
template <class T>
struct Bytes {
  double x;
  double weights = 0;
  double out = 0;

  Bytes(int64_t channels, int64_t size, const std::vector<Branch>& branches)
      : x(static_cast<double>(channels * size * size * static_cast<int64_t>(sizeof(T)))) {
    for (const Branch& b : branches) {
      weights += static_cast<double>(b.outputs * channels * b.taps()) * sizeof(T);
      out += static_cast<double>(b.outputs * size * size) * sizeof(T);
    }
  }
};

// With fewer channels than the shape of the prediction; tiles of pixels and outputs are the same.
// Sums are so short that there are no parts.
template <class T>
void count_branches(const char* name, int64_t channels, int64_t size,
                    const std::vector<Branch>& branches, double scale) {
  const Bytes<T> bytes(channels, size, branches);
  simt::Limits limits{.kernel = kMma, .minimum_bytes = bytes.x + bytes.weights + bytes.out};
  limits.shape = name;
  limits.scale = scale;
  simt::counted(limits, [&] {
    convolve<T>(1, channels, size, size, branches,
                {.last = true, .weight_last = true, .check = false});
  });
}

// All operands are laid out first.
void count_contiguous() {
  constexpr const char* kName = "1 x 2048 x 33 x 33 to 256, rate 12, float16, contiguous";
  const std::vector<Branch> branches = {Branch::same(256, 12)};
  const Bytes<__half> bytes(32, 33, branches);
  simt::Limits mma{.kernel = kMma, .minimum_bytes = bytes.x + bytes.weights + bytes.out};
  mma.sectors = 1.6;
  mma.reason =
      "rows of contiguous results begin anywhere; with 32 channels counted in place of 2048, "
      "results weigh 64 times too much";
  simt::Limits pixels{.kernel = "dense_pixels_kernel", .minimum_bytes = 2 * bytes.x};
  simt::Limits weight{.kernel = "dense_weight_kernel", .minimum_bytes = 2 * bytes.weights};
  weight.wavefronts = 2.5;
  weight.reason =
      "taps lie closest in memory and farthest in a tile of shared memory, whose banks "
      "some of them share; it is a small part of the time";
  for (simt::Limits* const own : {&mma, &pixels, &weight}) {
    own->shape = kName;
    own->scale = 64;
  }
  simt::counted({mma, pixels, weight},
                [&] { convolve<__half>(1, 32, 33, 33, branches, {.check = false}); });
}

// One tile, in parts. The sums are those of all parts of the pyramid of DeepLab v3.
void count_parts() {
  constexpr int64_t kParts = 8;
  const std::vector<Branch> branches = {Branch::same(256, 1, 1)};
  const Bytes<__nv_bfloat16> bytes(2048, 4, branches);
  const double parts = kParts * 16.0 * 256 * 4;
  simt::Limits mma{.kernel = kMma, .minimum_bytes = bytes.x + bytes.weights + parts};
  mma.shape = "1 x 2048 x 4 x 4 to 256, 1x1, bfloat16, channels_last";
  simt::Limits sum{.kernel = "dense_sum_kernel", .minimum_bytes = parts + bytes.out};
  sum.shape = "1 x 2048 x 33 x 33 to 256 1x1 and 3 x 256 with rates 6, 12, 18, bfloat16";
  sum.scale = 176 * 100.0 / (kParts * 16);  // parts of about 100 pixels
  simt::counted({mma, sum}, [&] {
    convolve<__nv_bfloat16>(1, 2048, 4, 4, branches,
                            {.last = true, .weight_last = true, .check = false});
  });
}

// The blocks of every eighth tile of channels.
void count_gradient() {
  constexpr const char* kName = "1 x 2048 x 33 x 33 by 256, rate 12, bfloat16, channels_last";
  const double numbers = 9.0 * 256 * 256;
  simt::Limits mma{.kernel = "dense_gradient_mma_kernel",
                   .minimum_bytes = 33.0 * 33 * (256 + 256) * 2 + numbers * 4};
  mma.scale = 8;
  simt::Limits sum{.kernel = "dense_gradient_sum_kernel", .minimum_bytes = 18 * 9.0 * 256 * 6};
  sum.scale = 2048.0 / 18;
  mma.shape = sum.shape = kName;
  for (uint64_t block = 0; block < 144; block += 8) {
    simt::config().only_blocks.push_back(block);
  }
  simt::counted({mma, sum}, [&] {
    weight_gradient<__nv_bfloat16>(1, 2048, 33, 33, Branch::same(256, 12),
                                   {.last = true, .weight_last = true, .check = false});
  });
  simt::config().only_blocks.clear();
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  count_branches<__nv_bfloat16>(
      "1 x 2048 x 33 x 33 to 256 1x1 and 3 x 256 with rates 6, 12, 18, bfloat16, channels_last", 32,
      33,
      {Branch::same(256, 1, 1), Branch::same(256, 6), Branch::same(256, 12), Branch::same(256, 18)},
      64);
  count_branches<__nv_bfloat16>("1 x 512 x 41 x 41 to 1024, rate 12, bfloat16, channels_last", 32,
                                41, {Branch::same(1024, 12)}, 16);
  count_branches<float>("1 x 512 x 41 x 41 to 1024, rate 12, TF32, channels_last", 16, 41,
                        {Branch::same(1024, 12)}, 32);
  count_contiguous();
  count_parts();
  count_gradient();
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"every dtype", dtypes},
                             {"odd numbers", odd_numbers},
                             {"kernels", kernels},
                             {"several tiles", several_tiles},
                             {"several branches", several_branches},
                             {"gradients of weights", gradients},
                             {"gradients of weights, several tiles", gradient_tiles},
                             {"nothing", nothing},
                             {"2^31 + 1024 elements", beyond_32_bits, simt::kRelease | simt::kAsan},
                             {"counters", counters, simt::kTrace},
                         });
}
