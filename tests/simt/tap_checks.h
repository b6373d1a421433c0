// SPDX-License-Identifier: Apache-2.0
// What a GPU does around the products of summed atrous convolutions, against plain loops.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "atrous_conv/tap_gemm.h"
#include "driver.h"
#include "float_types.h"

namespace tap_checks {

using pydense::TapShifts;
using pydense::TapStrides;
using simt::kEpsilon;
using simt::kFloatType;
using simt::rounded;
using simt::value;

constexpr const char* kOp = "test";

struct Shape {
  int64_t images;
  int64_t outputs;
  int64_t height;
  int64_t width;
  std::vector<int64_t> rows;
  std::vector<int64_t> columns;
  int64_t gap = 0;  // between the rows of the maps, besides

  int64_t taps() const { return static_cast<int64_t>(rows.size()); }
  int64_t pixels() const { return height * width; }
  TapShifts shifts() const {
    return {images, outputs, height, width, taps(), rows.data(), columns.data()};
  }
  bool reads(int64_t t, int64_t y, int64_t x) const {
    const int64_t from_y = y + rows[static_cast<size_t>(t)];
    const int64_t from_x = x + columns[static_cast<size_t>(t)];
    return from_y >= 0 && from_y < height && from_x >= 0 && from_x < width;
  }
};

// The taps of 3 x 3 kernels of these rates that reach a pixel.
inline Shape of_rates(int64_t images, int64_t outputs, int64_t height, int64_t width,
                      const std::vector<int64_t>& rates, int64_t gap = 0) {
  Shape shape = {images, outputs, height, width, {0}, {0}, gap};
  for (const int64_t rate : rates) {
    for (int64_t k = 0; k < 9; ++k) {
      const int64_t dy = (k / 3 - 1) * rate;
      const int64_t dx = (k % 3 - 1) * rate;
      if (k != 4 && std::abs(dy) < height && std::abs(dx) < width) {
        shape.rows.push_back(dy);
        shape.columns.push_back(dx);
      }
    }
  }
  return shape;
}

struct Maps {
  const Shape& shape;
  bool last;
  int64_t count;  // of pixels

  int64_t lines() const { return shape.taps() * shape.outputs; }
  int64_t pitch() const { return (last ? lines() : count) + shape.gap; }
  size_t elements() const {
    return static_cast<size_t>(shape.images * (last ? count : lines()) * pitch());
  }
  size_t at(int64_t n, int64_t t, int64_t o, int64_t pixel) const {
    const int64_t line = t * shape.outputs + o;
    return static_cast<size_t>(last ? (n * count + pixel) * pitch() + line
                                    : (n * lines() + line) * pitch() + pixel);
  }
};

// A picture in either format.
struct Picture {
  const Shape& shape;
  bool last;

  TapStrides strides() const {
    const int64_t plane = shape.pixels();
    return last ? TapStrides{plane * shape.outputs, 1, shape.width * shape.outputs, shape.outputs}
                : TapStrides{plane * shape.outputs, plane, shape.width, 1};
  }
  size_t elements() const {
    return static_cast<size_t>(shape.images * shape.outputs * shape.pixels());
  }
  size_t at(int64_t n, int64_t o, int64_t y, int64_t x) const {
    const TapStrides s = strides();
    return static_cast<size_t>(n * s.image + o * s.channel + y * s.row + x * s.pixel);
  }
};

template <class Fn>
void for_each(const Shape& shape, const Fn& fn) {
  for (int64_t n = 0; n < shape.images; ++n) {
    for (int64_t o = 0; o < shape.outputs; ++o) {
      for (int64_t y = 0; y < shape.height; ++y) {
        for (int64_t x = 0; x < shape.width; ++x) {
          fn(n, o, y, x);
        }
      }
    }
  }
}

template <class T>
void adds(const Shape& shape, bool last, bool out_last, int num_biases) {
  const Maps maps = {shape, last, shape.pixels()};
  const Picture picture = {shape, out_last};
  simt::Buffer<T> from(maps.elements(), "maps");
  simt::fill(from, 1);
  std::vector<std::unique_ptr<simt::Buffer<T>>> biases;
  std::vector<const void*> data;
  for (int b = 0; b < num_biases; ++b) {
    biases.push_back(std::make_unique<simt::Buffer<T>>(static_cast<size_t>(shape.outputs), "bias"));
    simt::fill(*biases.back(), static_cast<uint64_t>(2 + b));
    data.push_back(biases.back()->data());
  }
  simt::Buffer<T> out(picture.elements(), "out");
  pydense::tap_add_cuda(kOp, kFloatType<T>,
                        {shape.shifts(), from.data(), maps.pitch(), last, num_biases, data.data(),
                         out.data(), picture.strides()},
                        0, nullptr);
  std::vector<double> expected(picture.elements());
  for_each(shape, [&](int64_t n, int64_t o, int64_t y, int64_t x) {
    double sum = 0;
    for (const auto& bias : biases) {
      sum += value((*bias)[static_cast<size_t>(o)]);
    }
    for (int64_t t = 0; t < shape.taps(); ++t) {
      if (shape.reads(t, y, x)) {
        const int64_t pixel = (y + shape.rows[static_cast<size_t>(t)]) * shape.width + x +
                              shape.columns[static_cast<size_t>(t)];
        sum += value(from[maps.at(n, t, o, pixel)]);
      }
    }
    expected[picture.at(n, o, y, x)] = sum;
  });
  const auto numbers = static_cast<double>(shape.taps() + num_biases + 4);
  simt::expect_close(out, expected, kEpsilon<T>, numbers * std::min(kEpsilon<T>, kEpsilon<float>));
}

// All pixels, and a part of them; what lies between rows of the maps stays as it was.
template <class T>
void gathers(const Shape& shape, bool last, bool grad_last) {
  const Picture picture = {shape, grad_last};
  simt::Buffer<T> grad(picture.elements(), "grad");
  simt::fill(grad, 1);
  const int64_t pixels = shape.pixels();
  for (const auto& [first, count] : {std::array<int64_t, 2>{0, pixels},
                                     std::array<int64_t, 2>{pixels / 3, pixels - pixels / 2}}) {
    if (first + count > pixels) {
      continue;
    }
    const Maps maps = {shape, last, count};
    simt::Buffer<T> to(maps.elements(), "maps");
    std::vector<double> expected(maps.elements(), std::nan(""));
    pydense::tap_gather_cuda(kOp, kFloatType<T>,
                             {shape.shifts(), grad.data(), picture.strides(), first, count,
                              to.data(), maps.pitch(), last},
                             0, nullptr);
    for (int64_t t = 0; t < shape.taps(); ++t) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t y = (first + i) / shape.width - shape.rows[static_cast<size_t>(t)];
        const int64_t x = (first + i) % shape.width - shape.columns[static_cast<size_t>(t)];
        const bool inside = y >= 0 && y < shape.height && x >= 0 && x < shape.width;
        for (int64_t n = 0; n < shape.images; ++n) {
          for (int64_t o = 0; o < shape.outputs; ++o) {
            expected[maps.at(n, t, o, i)] = inside ? value(grad[picture.at(n, o, y, x)]) : 0;
          }
        }
      }
    }
    simt::expect_close(to, expected, 0, 0);
  }
}

template <class T>
void both(const Shape& shape) {
  for (const bool last : {false, true}) {
    adds<T>(shape, last, last, 2);
    adds<T>(shape, last, !last, 0);
    gathers<T>(shape, last, last);
    gathers<T>(shape, last, !last);
  }
}

inline void every_dtype() {
  const Shape shape = of_rates(2, 5, 9, 11, {1, 3, 20}, 3);
  both<float>(shape);
  both<double>(shape);
  both<__nv_bfloat16>(shape);
  both<__half>(shape);
}

inline void sizes() {
  both<float>(of_rates(3, 1, 1, 1, {1}));
  both<float>(of_rates(1, 3, 1, 40, {2, 39}));
  both<__nv_bfloat16>(of_rates(1, 2, 5, 521, {300}, 7));  // several blocks to a line
  both<__half>(of_rates(1, 70, 1, 2, {1}));
}

// 64 branches with all their taps, and biases of each.
inline void many_branches() {
  std::vector<int64_t> rates(64);
  std::iota(rates.begin(), rates.end(), 1);
  const Shape shape = of_rates(1, 1, 65, 65, rates);
  SIMT_EXPECT(shape.taps() == pydense::kMaxTaps);
  for (const bool last : {false, true}) {
    adds<float>(shape, last, last, 64);
  }
  gathers<__nv_bfloat16>(shape, true, true);
}

inline void random_shapes() {
  std::mt19937_64 generator(simt::config().seed);
  const auto any = [&](int64_t from, int64_t to) {
    return from + static_cast<int64_t>(generator() % static_cast<uint64_t>(to - from + 1));
  };
  for (int i = 0; i < 4; ++i) {
    const Shape shape = of_rates(any(1, 2), any(1, 20), any(1, 12), any(1, 25),
                                 {any(1, 12), any(13, 25)}, any(0, 9));
    both<float>(shape);
    both<__nv_bfloat16>(shape);
  }
}

inline void nothing() {
  both<float>(of_rates(0, 3, 4, 5, {1}));
  both<float>(of_rates(2, 0, 4, 5, {1}));
}

// Branches with taps in common, and taps that no branch has left.
template <class T>
void stacks(int64_t branches, int64_t outputs, int64_t channels, int64_t first, int64_t count) {
  const auto size = static_cast<size_t>(outputs * channels * 9);
  std::vector<int64_t> places(static_cast<size_t>(branches * 9));
  int64_t taps = 1;
  for (size_t k = 0; k < places.size(); ++k) {
    places[k] = k % 9 == 4 ? 0 : k % 7 == 3 ? -1 : k % 11 == 10 ? taps - 1 : taps++;
  }
  std::vector<std::unique_ptr<simt::Buffer<T>>> weights;
  std::vector<const void*> data;
  for (int64_t b = 0; b < branches; ++b) {
    weights.push_back(std::make_unique<simt::Buffer<T>>(size, "weight"));
    simt::fill(*weights.back(), static_cast<uint64_t>(b));
    data.push_back(weights.back()->data());
  }
  simt::Buffer<T> stack(static_cast<size_t>(taps * count * channels), "stack");
  pydense::tap_stack_cuda(kOp, kFloatType<T>,
                          {{taps, static_cast<int>(branches), places.data()},
                           data.data(),
                           first,
                           count,
                           channels,
                           stack.data()},
                          0, nullptr);
  std::vector<double> expected(stack.size());
  for (size_t k = 0; k < places.size(); ++k) {
    for (int64_t o = 0; o < count && places[k] >= 0; ++o) {
      for (int64_t c = 0; c < channels; ++c) {
        expected[static_cast<size_t>((places[k] * count + o) * channels + c)] +=
            value((*weights[k / 9])[static_cast<size_t>(((first + o) * channels + c) * 9) + k % 9]);
      }
    }
  }
  simt::expect_close(stack, expected, kEpsilon<T>, 64 * std::min(kEpsilon<T>, kEpsilon<float>));

  // Back: of the stack of all outputs.
  const auto unstacks = [&]<class S>(S) {
    simt::Buffer<S> all(static_cast<size_t>(taps * outputs * channels), "stack");
    simt::fill(all, 5);
    for (size_t b = 0; b < static_cast<size_t>(branches); ++b) {
      simt::Buffer<T> weight(size, "weight");
      const int64_t* const own = places.data() + 9 * b;
      pydense::tap_unstack_cuda(
          kOp, kFloatType<T>,
          {taps, own, !std::is_same_v<S, T>, all.data(), outputs, channels, weight.data()}, 0,
          nullptr);
      std::vector<double> turned(size);
      for (size_t i = 0; i < size; ++i) {
        const int64_t place = own[i % 9];
        turned[i] = place < 0 ? 0
                              : value(rounded<T>(value(
                                    all[static_cast<size_t>(place * outputs * channels) + i / 9])));
      }
      simt::expect_close(weight, turned, 0, 0);
    }
  };
  unstacks(T{});
  if constexpr (sizeof(T) == 2) {
    unstacks(float{});
  }
}

inline void weights() {
  stacks<float>(4, 5, 70, 0, 5);
  stacks<double>(2, 3, 260, 1, 2);
  stacks<__nv_bfloat16>(3, 2, 33, 0, 2);
  stacks<__half>(1, 4, 1, 3, 1);
  stacks<float>(64, 1, 9, 0, 1);
  stacks<double>(64, 1, 5, 0, 1);
}

// Past 2^31 elements: the last blocks alone, on memory that is not there.
inline void beyond_32_bits() {
  constexpr int64_t kSide = 32;
  constexpr int64_t kPixels = kSide * kSide;
  constexpr int64_t kOutputs = 64;
  const Shape shape = of_rates(4000, kOutputs, kSide, kSide, {16});  // 2.4 * 10^9 numbers of maps
  for (const bool last : {false, true}) {
    const Maps maps = {shape, last, kPixels};
    const Picture picture = {shape, last};
    simt::SparseMemory memory(maps.elements() * sizeof(__half));
    simt::SparseMemory small(picture.elements() * sizeof(__half));
    auto* const from = memory.as<__half>();
    auto* const to = small.as<__half>();
    const int64_t n = shape.images - 1;
    constexpr int64_t kCorner = kSide - 1;
    const size_t at = picture.at(n, kOutputs - 1, kCorner, kCorner);
    // Tap 1 is (-16, -16).
    from[maps.at(n, 1, kOutputs - 1, (kCorner - 16) * kSide + kCorner - 16)] = rounded<__half>(3);
    from[maps.at(n, 0, kOutputs - 1, kPixels - 1)] = rounded<__half>(4);
    simt::config().only_blocks = {picture.elements() / 256 - 1};
    pydense::tap_add_cuda(
        kOp, pydense::FloatType::kFloat16,
        {shape.shifts(), from, maps.pitch(), last, 0, nullptr, to, picture.strides()}, 0, nullptr);
    SIMT_EXPECT(value(to[at]) == 7);
    // Backward, the last block has the last line, or the last pixels.
    to[picture.at(n, kOutputs - 1, kCorner - 16, kCorner - 16)] = rounded<__half>(5);
    const int64_t lines = maps.lines();
    const uint64_t of_chunk = static_cast<uint64_t>((lines + 255) / 256);
    simt::config().only_blocks = {
        last ? static_cast<uint64_t>(shape.images * kPixels / 4) * of_chunk - 1
             : static_cast<uint64_t>(shape.images * lines) - 1};
    pydense::tap_gather_cuda(
        kOp, pydense::FloatType::kFloat16,
        {shape.shifts(), to, picture.strides(), 0, kPixels, from, maps.pitch(), last}, 0, nullptr);
    simt::config().only_blocks.clear();
    SIMT_EXPECT(value(from[maps.at(n, shape.taps() - 1, kOutputs - 1, kPixels - 1)]) == 5);
  }
}

}  // namespace tap_checks
