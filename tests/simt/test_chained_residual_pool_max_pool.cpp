// SPDX-License-Identifier: Apache-2.0
// Max pooling on a GPU against a plain loop over the window, and bit by bit against the CPU.
#include <numeric>

#include "pool_checks.h"

namespace {

using namespace pool_checks;  // NOLINT(google-build-using-namespace)

template <class T>
bool same_bits(const simt::Buffer<T>& a, const simt::Buffer<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
void forward_and_backward(const PoolShape& shape, bool special = false, int64_t gap = 0) {
  const Layout own = {shape, gap};
  const Layout dense = {shape};
  simt::Buffer<T> x(own.elements(), "x");
  simt::Buffer<T> grad(own.elements(), "grad");
  simt::Buffer<T> addend(dense.elements(), "addend");
  fill_whole(x, 1, special);
  fill_whole(grad, 2);
  fill_whole(addend, 3);
  simt::Buffer<T> out(dense.elements(), "out");
  simt::Buffer<T> plain(dense.elements(), "out without offsets");
  simt::Buffer<uint8_t> offsets(dense.elements(), "offsets");
  pydense::max_pool_forward_cuda(
      kOp, kFloatType<T>, {shape, own.source(x.data()), out.data(), offsets.data()}, 0, nullptr);
  pydense::max_pool_forward_cuda(kOp, kFloatType<T>,
                                 {shape, own.source(x.data()), plain.data(), nullptr}, 0, nullptr);
  std::vector<double> expected(dense.elements());
  std::vector<double> gathered(dense.elements());
  const int64_t reach = shape.size / 2;
  bool places = true;
  bool values = true;
  for_each_element(shape, [&](int64_t n, int64_t c, int64_t i, int64_t j) {
    const Maximum best = maximum_at(x, own, n, c, i, j);
    const size_t at = dense.at(n, c, i, j);
    const double maximum = value(x[own.at(n, c, best.y, best.x)]);
    for (const T found : {out[at], plain[at]}) {
      values =
          values && (std::isnan(maximum) ? std::isnan(value(found))
                                         : value(found) == maximum &&
                                               std::signbit(value(found)) == std::signbit(maximum));
    }
    places = places && offsets[at] == ((best.y - i + reach) << 4 | (best.x - j + reach));
    gathered[dense.at(n, c, best.y, best.x)] += value(grad[own.at(n, c, i, j)]);
  });
  SIMT_EXPECT(values);
  SIMT_EXPECT(places);

  for (const bool more : {false, true}) {
    for (size_t i = 0; i < gathered.size(); ++i) {
      expected[i] = gathered[i] + (more ? value(addend[i]) : 0);
    }
    simt::Buffer<T> result(dense.elements(), "result");
    pydense::MaxPoolBackwardArgs args = {shape, own.source(grad.data()), offsets.data(),
                                         more ? addend.data() : nullptr, result.data()};
    pydense::max_pool_backward_cuda(kOp, kFloatType<T>, args, 0, nullptr);
    simt::expect_close(result, expected, 0, 0);
    // Numbers whose sums are rounded: in the CPU's order.
    simt::fill(grad, 4);
    pydense::max_pool_backward_cuda(kOp, kFloatType<T>, args, 0, nullptr);
    simt::Buffer<T> cpu(dense.elements(), "result of the CPU");
    args.result = cpu.data();
    pydense::max_pool_backward(kOp, kFloatType<T>, args, pydense::serial_for);
    SIMT_EXPECT(same_bits(result, cpu));
    fill_whole(grad, 2);
  }
}

void every_dtype(const PoolShape& shape, bool special, int64_t gap = 0) {
  forward_and_backward<float>(shape, special, gap);
  forward_and_backward<double>(shape, special, gap);
  forward_and_backward<__nv_bfloat16>(shape, special, gap);
  forward_and_backward<__half>(shape, special, gap);
}

// With vectors, and where a row or a pixel is no multiple of them.
void dtypes() {
  for (const bool special : {false, true}) {
    every_dtype({2, 3, 13, 24, false, 5}, special);
    every_dtype({1, 2, 9, 11, false, 5}, special);
    every_dtype({2, 8, 11, 7, true, 5}, special);
    every_dtype({1, 3, 9, 6, true, 5}, special);
  }
}

void window_sizes() {
  for (const int size : {3, 7, 9, 11, 13}) {
    for (const bool special : {false, true}) {
      forward_and_backward<float>({1, 2, 15, 20, false, size}, special);
      forward_and_backward<__nv_bfloat16>({1, 8, 9, 14, true, size}, special);
      forward_and_backward<double>({1, 3, 5, 9, size % 4 == 3, size}, special);
    }
  }
}

// Pictures smaller than the window, and of one pixel.
void small() {
  for (const bool last : {false, true}) {
    forward_and_backward<float>({1, 1, 1, 1, last, 5}, true);
    forward_and_backward<float>({1, 4, 2, 3, last, 13}, true);
    forward_and_backward<__half>({2, 8, 1, 8, last, 5}, true);
    forward_and_backward<float>({1, 4, 30, 1, last, 5}, true);
  }
}

// Several tiles across a row, of pixels and of channels, with a part of a tile at the end.
void several_tiles() {
  forward_and_backward<float>({1, 1, 9, 1100, false, 5});
  forward_and_backward<double>({1, 1, 5, 523, false, 13});
  forward_and_backward<__nv_bfloat16>({1, 1, 6, 1063, false, 5});
  forward_and_backward<float>({1, 44, 10, 61, true, 5});
  forward_and_backward<double>({1, 34, 5, 19, true, 13});
  forward_and_backward<__half>({1, 19, 6, 50, true, 3});
}

void many_planes() {
  forward_and_backward<float>({3, 45, 3, 4, false, 5});
  forward_and_backward<float>({70, 2, 3, 3, true, 3});
}

// Rows with gaps between: with vectors, and where they would not be aligned.
void gaps() {
  for (const bool last : {false, true}) {
    every_dtype({2, 8, 6, 16, last, 5}, true, 8);
    every_dtype({1, 8, 5, 8, last, 5}, false, 3);
  }
}

void nothing() {
  forward_and_backward<float>({0, 3, 4, 4, false, 5});
  forward_and_backward<float>({2, 0, 4, 4, false, 5});
}

void random_shapes() {
  std::mt19937_64 generator(simt::config().seed);
  const auto any = [&](int64_t from, int64_t to) {
    return from + static_cast<int64_t>(generator() % static_cast<uint64_t>(to - from + 1));
  };
  for (int i = 0; i < 5; ++i) {
    const PoolShape shape = {any(1, 2),  any(1, 12),     any(1, 30),
                             any(1, 90), any(0, 1) == 1, static_cast<int>(3 + 2 * any(0, 5))};
    forward_and_backward<float>(shape, any(0, 1) == 1, any(0, 2));
    forward_and_backward<__nv_bfloat16>(shape, any(0, 1) == 1, any(0, 2));
  }
}

// Past 2^31 elements: the blocks of the last plane alone, on memory that is not there.
void beyond_32_bits() {
  constexpr int64_t kSide = 64;
  constexpr int64_t kPlane = kSide * kSide;
  constexpr int64_t kPlanes = (int64_t{1} << 31) / kPlane + 16;
  simt::SparseMemory x(kPlanes * kPlane * sizeof(__half));
  simt::SparseMemory out(kPlanes * kPlane * sizeof(__half));
  simt::SparseMemory offsets(kPlanes * kPlane);
  const PoolShape shape = {1, kPlanes, kSide, kSide, false, 5};
  const PoolSource source = {x.as<__half>(), kPlanes * kPlane, kPlane, kSide};
  const int64_t last = (kPlanes - 1) * kPlane;
  x.as<__half>()[last + kPlane - 1] = rounded<__half>(3);
  // 8 threads to a plane, one band: 16 planes to a block; then two planes to one of 8 x 32 threads.
  simt::config().only_blocks = {static_cast<uint64_t>(kPlanes) / 16 - 1};
  pydense::max_pool_forward_cuda(kOp, FloatType::kFloat16,
                                 {shape, source, out.as<__half>(), offsets.as<uint8_t>()}, 0,
                                 nullptr);
  for (int64_t i = 0; i < kPlane; ++i) {
    const bool near = i / kSide >= kSide - 3 && i % kSide >= kSide - 3;
    SIMT_EXPECT(value(out.as<__half>()[last + i]) == (near ? 3 : 0));
  }
  SIMT_EXPECT(offsets.as<uint8_t>()[last + kPlane - 1] == 0x22);
  simt::config().only_blocks = {static_cast<uint64_t>(kPlanes) / 2 - 1};
  pydense::max_pool_backward_cuda(kOp, FloatType::kFloat16,
                                  {shape,
                                   {out.as<__half>(), kPlanes * kPlane, kPlane, kSide},
                                   offsets.as<uint8_t>(),
                                   nullptr,
                                   x.as<__half>()},
                                  0, nullptr);
  simt::config().only_blocks.clear();
  SIMT_EXPECT(value(x.as<__half>()[last + kPlane - 1]) == 27);
}

// ---- what is asked of memory -------------------------------------------------------------------
// The first blocks of a launch are counted, which make `rows` rows of the first planes, and stand
// for all of the shape.

std::vector<uint64_t> first_blocks(int64_t count) {
  std::vector<uint64_t> blocks(static_cast<size_t>(count));
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  return blocks;
}

template <class T>
void count(const char* kernel, const char* name, const PoolShape& shape, int64_t planes,
           int64_t rows, int64_t blocks, bool offsets, bool addend) {
  const bool backward = std::strcmp(kernel, "max_pool_backward_kernel") == 0;
  const int64_t row = shape.width * (shape.channels_last ? shape.channels : 1);
  const auto elements = static_cast<size_t>(planes * shape.height * row);
  simt::Buffer<T> from(elements, "from");
  simt::Buffer<T> to(elements, "to");
  simt::Buffer<T> more(addend ? elements : 0, "addend");
  simt::Buffer<uint8_t> codes(offsets ? elements : 0, "offsets");
  simt::fill(from, 1);
  simt::fill(more, 2);
  const PoolSource source = {from.data(), planes * shape.height * row, shape.height * row, row};
  if (backward) {
    std::mt19937_64 random(3);
    for (uint8_t& code : codes) {
      code = static_cast<uint8_t>((random() % 5) << 4 | random() % 5);
    }
  }
  const auto bytes = static_cast<int64_t>((addend ? 3 : 2) * sizeof(T) + (offsets ? 1 : 0));
  simt::Limits limits{.kernel = kernel,
                      .minimum_bytes = static_cast<double>(planes * rows * row * bytes)};
  limits.shape = name;
  limits.scale = static_cast<double>(shape.batches * (shape.channels_last ? 1 : shape.channels) *
                                     shape.height) /
                 static_cast<double>(planes * rows);
  simt::config().only_blocks = first_blocks(blocks);
  simt::counted(limits, [&] {
    if (backward) {
      pydense::max_pool_backward_cuda(
          kOp, kFloatType<T>,
          {shape, source, codes.data(), addend ? more.data() : nullptr, to.data()}, 0, nullptr);
    } else {
      pydense::max_pool_forward_cuda(kOp, kFloatType<T>,
                                     {shape, source, to.data(), offsets ? codes.data() : nullptr},
                                     0, nullptr);
    }
  });
  simt::config().only_blocks.clear();
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  constexpr const char* kForward = "max_pool_forward_kernel";
  constexpr const char* kBackward = "max_pool_backward_kernel";
  const PoolShape contiguous = {8, 256, 128, 128, false, 5};
  const PoolShape last = {8, 256, 128, 128, true, 5};
  // 32 threads of float32, or 16 of bfloat16, to a row; 5 bands, or 8.
  count<float>(kForward, "8 x 256 x 128 x 128, float32, offsets", contiguous, 4, 128, 5, true,
               false);
  count<__nv_bfloat16>(kForward, "8 x 256 x 128 x 128, bfloat16", contiguous, 8, 128, 8, false,
                       false);
  // The first band of an image.
  count<__nv_bfloat16>(kForward, "8 x 256 x 128 x 128, bfloat16, offsets, channels_last", last, 1,
                       16, 32, true, false);
  count<float>(kBackward, "8 x 256 x 128 x 128, float32, addend", contiguous, 2, 128, 4, true,
               true);
  count<__nv_bfloat16>(kBackward, "8 x 256 x 128 x 128, bfloat16, channels_last", last, 1, 16, 80,
                       true, false);
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(
      argc, argv,
      {
          {"every dtype", dtypes},
          {"window sizes", window_sizes},
          {"small pictures", small},
          {"several tiles", several_tiles},
          {"many planes", many_planes},
          {"gaps between rows", gaps},
          {"nothing", nothing},
          {"random shapes", random_shapes, simt::kRelease},
          {"2^31 + 65536 elements", beyond_32_bits, simt::kRelease | simt::kAsan},
          {"counters", counters, simt::kTrace},
      });
}
