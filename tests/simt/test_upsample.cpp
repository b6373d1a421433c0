// SPDX-License-Identifier: Apache-2.0
#include <numeric>

#include "upsample_checks.h"
#include "upsample_large.h"

namespace {

using namespace upsample_checks;  // NOLINT(google-build-using-namespace)

constexpr AxisGrid kCorners = AxisGrid::kAlignCorners;
constexpr AxisGrid kNearest = AxisGrid::kNearest;
constexpr AxisGrid kHalfPixel = AxisGrid::kHalfPixel;

Map crop(Size size, int64_t stride, double offset, AxisBorder border = AxisBorder::kZeros) {
  return {size, AxisGrid::kCrop, border, 0, stride, offset};
}
Map same(Size size) { return {size, kHalfPixel, AxisBorder::kClamp, 0, 1, 0, true}; }

void every_dtype(const Problem& p) {
  both<float>(p);
  both<double>(p);
  both<__nv_bfloat16>(p);
  both<__half>(p);
}

// Widths and channels that vectors divide, and such that they do not.
void dtypes() {
  every_dtype({2, 3, {20, 31}, {{{7, 9}}}});
  every_dtype({2, 8, {19, 40}, {{{7, 9}}}});
}

void scales() {
  both<float>({1, 2, {9, 8}, {{{9, 3}}}});            // equal heights
  both<float>({1, 5, {11, 9}, {{{13, 40}}}});         // down
  both<float>({2, 4, {6, 4}, {{{64, 70}}}});          // far down: rows that nobody needs
  both<float>({1, 3, {17, 7}, {{{5, 61}}}});          // up and down
  both<float>({1, 1, {4, 5}, {{{1, 1}}}});            // one pixel
  both<float>({1, 2, {1, 1}, {{{4, 5}, kCorners}}});  // to one pixel
  both<float>({1, 2, {33, 70}, {{{9, 10}, kCorners}}});
  both<float>({1, 2, {13, 10}, {{{10, 13}, kHalfPixel, AxisBorder::kClamp, 1.31}}});
  both<float>({1, 3, {46, 29}, {{{14, 40}, kNearest}}});
}

void crops() {
  both<float>({1, 2, {40, 34}, {crop({4, 5}, 8, 7)}});
  both<float>({1, 3, {30, 29}, {crop({4, 5}, 4, -9.3)}});  // beyond the picture on all sides
  both<float>({1, 4, {30, 28}, {crop({4, 5}, 4, -9.3, AxisBorder::kClamp)}});
  both<float>({1, 2, {5, 6}, {crop({4, 5}, 2, 100)}});  // nothing of it
  both<double>({1, 2, {50, 33}, {crop({2, 3}, 32, -11.5)}});
}

// Several tiles and bands, with a part of a tile at the ends.
void large() {
  both<float>({1, 2, {75, 300}, {{{19, 75}}}});
  forward<__nv_bfloat16>({1, 1, {70, 261}, {{{70, 140}}}});
  backward<__half>({1, 1, {8, 1300}, {{{3, 325}}}});
}

// More outputs of one input than a block takes in one go.
void enormous_scale() {
  backward<float>({1, 2, {5, 2300}, {{{2, 1}}}});
  backward<float>({1, 2, {5, 2500}, {{{2, 2}}}});
  Problem pixels = {1, 17, {6, 190}, {{{3, 2}}}};
  pixels.last = true;
  backward<float>(pixels);
  backward<__nv_bfloat16>(pixels);
}

void many_planes() {
  both<float>({3, 90, {2, 3}, {{{1, 2}}}});
  both<float>({5, 1, {9, 9}, {{{4, 4}}}});
}

void sums() {
  for (const bool relu : {false, true}) {
    Problem p = {2, 4, {16, 12}, {{{8, 6}}, same({16, 12}), {{4, 3}}, {{2, 2}}}};
    p.relu = relu;
    both<float>(p);
    both<__nv_bfloat16>(p);
    Problem odd = {1, 3, {9, 7}, {{{5, 3}, kCorners}, {{2, 4}, kCorners}}};
    odd.relu = relu;
    both<float>(odd);
    Problem nearest = {1, 3, {9, 7}, {{{5, 3}, kNearest}, same({9, 7})}};
    nearest.relu = relu;
    both<double>(nearest);
  }
  Problem most = {1, 2, {6, 5}, {}};
  most.maps.assign(pydense::kMaxUpsampleInputs, {{3, 2}});
  for (int k = 0; k < 6; ++k) {
    most.maps[static_cast<size_t>(2 * k)] = same({6, 5});
  }
  forward<float>(most);
}

// Rows with gaps between: with vectors, and where they would not be aligned.
void gaps() {
  for (const int64_t gap : {8, 3}) {
    Problem p = {2, 4, {13, 16}, {{{5, 8}}, same({13, 16})}};
    p.gap = gap;
    both<float>(p);
    both<__half>(p);
  }
}

// Results that begin between the places where vectors may.
void unaligned_results() {
  Problem p = {1, 4, {6, 16}, {{{3, 8}}}};
  for (const bool last : {false, true}) {
    p.last = last;
    p.begin = 2;
    forward<float>(p);
    forward<__nv_bfloat16>(p);
    p.begin = 1;
    forward<double>(p);
  }
}

void nothing() {
  forward<float>({0, 3, {4, 4}, {{{2, 2}}}});
  backward<float>({0, 3, {4, 4}, {{{2, 2}}}});
}

// Shapes that nobody thought of.
void random_shapes() {
  std::mt19937_64 generator(simt::config().seed);
  const auto any = [&](int64_t from, int64_t to) {
    return from + static_cast<int64_t>(generator() % static_cast<uint64_t>(to - from + 1));
  };
  for (int i = 0; i < 12; ++i) {
    Map map = {{any(1, 20), any(1, 60)}, static_cast<AxisGrid>(any(0, 4))};
    map.stride = any(1, 9);
    map.offset = static_cast<double>(any(-120, 400)) / 8;
    map.border = any(0, 1) == 0 ? AxisBorder::kZeros : AxisBorder::kClamp;
    Problem p = {any(1, 2), any(1, 9), {any(1, 40), any(1, 130)}, {map}};
    if (map.grid == AxisGrid::kIdentity) {
      p.maps[0].grid = kHalfPixel;
    }
    p.relu = any(0, 1) == 1;
    p.gap = any(0, 2);
    both<float>(p);
  }
}

// ---- what is asked of memory -------------------------------------------------------------------
// One plane, or image, is counted and stands for all of the shape.

simt::Limits limits_of(const char* kernel, const char* shape, int64_t bytes, int64_t times) {
  simt::Limits limits{.kernel = kernel, .minimum_bytes = static_cast<double>(bytes)};
  limits.shape = shape;
  limits.scale = static_cast<double>(times);
  return limits;
}

template <class T>
void count_forward(const simt::Limits& limits, int64_t channels, bool last, Size size,
                   const std::vector<Map>& maps, bool relu = false) {
  const Layout out = {1, channels, size.height, size.width, last, 0};
  simt::Buffer<T> result(out.elements(), "out");
  std::vector<std::unique_ptr<simt::Buffer<T>>> buffers;
  std::vector<UpsampleInput> inputs;
  for (const Map& map : maps) {
    const Layout in = {1, channels, map.size.height, map.size.width, last, 0};
    buffers.push_back(std::make_unique<simt::Buffer<T>>(in.elements(), "input"));
    fill(*buffers.back(), in, 1);
    inputs.push_back({buffers.back()->data(), in.strides(), axis(map, in.height, out.height),
                      axis(map, in.width, out.width), map.same});
  }
  simt::counted(limits, [&] {
    pydense::upsample_forward_cuda(kOp, TypeOf<T>::kType,
                                   {{1, channels, out.height, out.width, last},
                                    inputs.data(),
                                    static_cast<int>(inputs.size()),
                                    result.data(),
                                    relu},
                                   0, nullptr);
  });
}

// The blocks of the first plane, or image, out of as many as the shape has: how pictures are cut
// into bands depends on it. All lie in the same memory.
template <class T>
void count_backward(const simt::Limits& limits, int64_t batches, int64_t channels, bool last,
                    Size size, const Map& map, uint64_t blocks) {
  const Layout out = {1, last ? channels : 1, size.height, size.width, last, 0};
  const Layout in = {batches, channels, map.size.height, map.size.width, last, 0};
  simt::Buffer<T> grad(out.elements(), "grad");
  simt::Buffer<T> result(in.elements(), "gradient");
  fill(grad, out, 1);
  const UpsampleInput input = {result.data(), in.strides(), axis(map, in.height, out.height),
                               axis(map, in.width, out.width), map.same};
  simt::config().only_blocks.resize(blocks);
  std::iota(simt::config().only_blocks.begin(), simt::config().only_blocks.end(), uint64_t{0});
  simt::counted(limits, [&] {
    pydense::upsample_backward_cuda(kOp, TypeOf<T>::kType,
                                    {{batches, channels, out.height, out.width, last},
                                     grad.data(),
                                     {0, last ? 1 : 0, out.strides().row},
                                     nullptr,
                                     &input,
                                     1},
                                    0, nullptr);
  });
  simt::config().only_blocks.clear();
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  constexpr const char* kForward = "upsample_forward_kernel";
  constexpr const char* kBackward = "upsample_backward_kernel";
  count_forward<float>(limits_of(kForward, "16 x 21 x 65 x 65 to 513 x 513, float32",
                                 4 * (65 * 65 + 513 * 513), int64_t{16} * 21),
                       1, false, {513, 513}, {{{65, 65}}});
  count_forward<__nv_bfloat16>(limits_of(kForward, "8 x 150 x 128 x 128 to 512 x 512, bfloat16",
                                         2 * (128 * 128 + 512 * 512), int64_t{8} * 150),
                               1, false, {512, 512}, {{{128, 128}}});
  count_forward<__nv_bfloat16>(
      limits_of(kForward, "128 x 64 x 32 x 32 to 64 x 64, bfloat16, channels_last",
                int64_t{2} * 64 * (32 * 32 + 64 * 64), 128),
      64, true, {64, 64}, {{{32, 32}}});
  count_forward<float>(
      limits_of(kForward, "12 x 48 x 128 x 256 of 4 maps, float32, ReLU",
                int64_t{4} * (2 * 128 * 256 + 64 * 128 + 32 * 64 + 16 * 32), int64_t{12} * 48),
      1, false, {128, 256}, {same({128, 256}), {{64, 128}}, {{32, 64}}, {{16, 32}}}, true);
  simt::Limits uneven = limits_of(kBackward, "16 x 21 x 513 x 513 to 65 x 65, float32",
                                  4 * (65 * 65 + 513 * 513), int64_t{16} * 21);
  uneven.wavefronts = 1.4;
  uneven.reason = "sums of source columns 7.9 apart share banks; shared memory is not what limits";
  count_backward<float>(uneven, 16, 21, false, {513, 513}, {{65, 65}}, 3);
  count_backward<__nv_bfloat16>(
      limits_of(kBackward, "128 x 64 x 64 x 64 to 32 x 32, bfloat16, channels_last",
                int64_t{2} * 64 * (32 * 32 + 64 * 64), 128),
      128, 64, true, {64, 64}, {{32, 32}}, 8);
  count_backward<float>(limits_of("upsample_mask_kernel", "12 x 48 x 128 x 256, float32",
                                  4 * 2 * 128 * 256, int64_t{12} * 48),
                        1, 1, false, {128, 256}, same({128, 256}), 8);
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(
      argc, argv,
      {
          {"every dtype", dtypes},
          {"scales", scales},
          {"crops", crops},
          {"several tiles", large},
          {"enormous scale", enormous_scale},
          {"many planes", many_planes},
          {"sums", sums},
          {"gaps between rows", gaps},
          {"unaligned results", unaligned_results},
          {"empty batch", nothing},
          {"random shapes", random_shapes, simt::kRelease},
          {"2^31 + 16384 elements", large_elements, simt::kRelease | simt::kAsan},
          {"2^31 + 5 planes", large_planes, simt::kRelease | simt::kAsan},
          {"2^31 + 8 channels", large_channels, simt::kRelease | simt::kAsan},
          {"refuses 2^31 tiles", refuses_tiles},
          {"counters", counters, simt::kTrace},
      });
}
