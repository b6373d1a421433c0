// SPDX-License-Identifier: Apache-2.0
// Upsampling on a GPU against float64, and bit by bit against the CPU kernels: one problem at a
// time.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "driver.h"
#include "upsample/upsample.h"

namespace upsample_checks {

using pydense::AxisBorder;
using pydense::AxisGrid;
using pydense::AxisSpec;
using pydense::BFloat16;
using pydense::FloatType;
using pydense::Half;
using pydense::PictureStrides;
using pydense::UpsampleInput;

struct Size {
  int64_t height;
  int64_t width;
};

// One input; its axes but for the sizes.
struct Map {
  Size size;
  AxisGrid grid = AxisGrid::kHalfPixel;
  AxisBorder border = AxisBorder::kClamp;
  double scale_factor = 0;
  int64_t stride = 1;
  double offset = 0;
  bool same = false;
};

struct Problem {
  int64_t batches;
  int64_t channels;
  Size size;  // of the output
  std::vector<Map> maps;
  bool last = false;
  bool relu = false;
  int64_t gap = 0;    // elements between rows of what may have any strides
  int64_t begin = 0;  // elements before forward's result: it may be aligned for one alone
};

inline AxisSpec axis(const Map& map, int64_t in_size, int64_t out_size) {
  return {map.grid, map.border, in_size, out_size, map.scale_factor, map.stride, map.offset};
}

// The weights of one axis, [out, in], from the definitions.
inline std::vector<double> weights(const AxisSpec& axis) {
  std::vector<double> w(static_cast<size_t>(axis.out_size * axis.in_size));
  const auto at = [&](int64_t y, int64_t i) -> double& {
    return w[static_cast<size_t>(y * axis.in_size + i)];
  };
  const auto in = static_cast<double>(axis.in_size);
  const auto out = static_cast<double>(axis.out_size);
  for (int64_t y = 0; y < axis.out_size; ++y) {
    auto src = static_cast<double>(y);
    if (axis.grid == AxisGrid::kNearest) {
      const float step = static_cast<float>(axis.in_size) / static_cast<float>(axis.out_size);
      const auto i = static_cast<int64_t>(std::floor(step * static_cast<float>(y)));
      at(y, std::min(i, axis.in_size - 1)) = 1;
      continue;
    }
    if (axis.grid == AxisGrid::kCrop) {
      src = (src + axis.offset) / static_cast<double>(axis.stride);
    } else if (axis.in_size != axis.out_size) {
      const double step = axis.scale_factor > 0 ? 1 / axis.scale_factor : in / out;
      src = axis.grid == AxisGrid::kAlignCorners ? src * (in - 1) / std::max(out - 1, 1.0)
                                                 : std::max((src + 0.5) * step - 0.5, 0.0);
    }
    if (axis.grid != AxisGrid::kCrop || axis.border == AxisBorder::kClamp) {
      src = std::min(std::max(src, 0.0), in - 1);
    }
    const double below = std::floor(src);
    for (int64_t tap = 0; tap < 2; ++tap) {
      const int64_t i = static_cast<int64_t>(below) + tap;
      if (i >= 0 && i < axis.in_size) {
        at(y, i) += tap == 0 ? 1 - (src - below) : src - below;
      }
    }
  }
  return w;
}

// A picture in memory.
struct Layout {
  int64_t batches, channels, height, width;
  bool last;
  int64_t gap;

  PictureStrides strides() const {
    const int64_t row = width * (last ? channels : 1) + gap;
    const int64_t plane = row * height;
    return {last ? plane : plane * channels, last ? 1 : plane, row};
  }
  size_t elements() const { return static_cast<size_t>(batches * strides().batch); }
  size_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    const PictureStrides s = strides();
    return static_cast<size_t>(n * s.batch + c * s.channel + y * s.row + x * (last ? channels : 1));
  }
  template <class Fn>
  void for_each(const Fn& fn) const {
    for (int64_t n = 0; n < batches; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t y = 0; y < height; ++y) {
          for (int64_t x = 0; x < width; ++x) {
            fn(n, c, y, x);
          }
        }
      }
    }
  }
};

// kRounding: of a weighted mean of numbers below 1, with the coordinates that its weights come
// from.
template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr FloatType kType = FloatType::kFloat32;
  static constexpr double kEpsilon = 0x1p-23;
  static constexpr double kRounding = 8e-6;
};
template <>
struct TypeOf<double> {
  static constexpr FloatType kType = FloatType::kFloat64;
  static constexpr double kEpsilon = 0x1p-52;
  static constexpr double kRounding = 1e-12;
};
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr FloatType kType = FloatType::kBFloat16;
  static constexpr double kEpsilon = 0x1p-8;
  static constexpr double kRounding = 8e-6;
};
template <>
struct TypeOf<__half> {
  static constexpr FloatType kType = FloatType::kFloat16;
  static constexpr double kEpsilon = 0x1p-11;
  static constexpr double kRounding = 8e-6;
};

// The CPU kernels round products where the machine has no fused multiply-add.
inline bool cpu_is_fused() { return pydense::current_cpu_isa() != pydense::CpuIsa::kBaseline; }

template <class T>
double value(T x) {
  return static_cast<double>(pydense::to_accumulate(x));
}

// Numbers of type T in a layout, the same whatever the layout; gaps are NaN.
template <class T>
void fill(simt::Buffer<T>& to, const Layout& layout, uint64_t seed) {
  const std::vector<double> values = simt::random_values(
      static_cast<size_t>(layout.batches * layout.channels * layout.height * layout.width), seed);
  size_t next = 0;
  layout.for_each([&](int64_t n, int64_t c, int64_t y, int64_t x) {
    to[layout.at(n, c, y, x)] =
        pydense::from_accumulate<T>(static_cast<pydense::Accumulate<T>>(values[next++]));
  });
}

template <class T>
void expect_same_bits(const simt::Buffer<T>& got, const simt::Buffer<T>& expected) {
  if (cpu_is_fused()) {
    SIMT_EXPECT(std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0);
  }
}

constexpr const char* kOp = "test";

// sum_k U_k x_k in float64, [N, C, H, W] dense.
template <class T>
std::vector<double> reference_forward(const Problem& p, const Layout& out,
                                      const std::vector<Layout>& layouts,
                                      const std::vector<std::unique_ptr<simt::Buffer<T>>>& inputs) {
  const Layout dense = {p.batches, p.channels, p.size.height, p.size.width, false, 0};
  std::vector<double> sum(dense.elements());
  for (size_t k = 0; k < p.maps.size(); ++k) {
    const Layout& in = layouts[k];
    const simt::Buffer<T>& x = *inputs[k];
    if (p.maps[k].same) {
      out.for_each([&](int64_t n, int64_t c, int64_t i, int64_t j) {
        sum[dense.at(n, c, i, j)] += value(x[in.at(n, c, i, j)]);
      });
      continue;
    }
    const std::vector<double> wy = weights(axis(p.maps[k], in.height, p.size.height));
    const std::vector<double> wx = weights(axis(p.maps[k], in.width, p.size.width));
    out.for_each([&](int64_t n, int64_t c, int64_t i, int64_t j) {
      for (int64_t y = 0; y < in.height; ++y) {
        const double w = wy[static_cast<size_t>(i * in.height + y)];
        for (int64_t column = 0; w != 0 && column < in.width; ++column) {
          const double both = w * wx[static_cast<size_t>(j * in.width + column)];
          if (both != 0) {
            sum[dense.at(n, c, i, j)] += both * value(x[in.at(n, c, y, column)]);
          }
        }
      }
    });
  }
  if (p.relu) {
    for (double& s : sum) {
      s = std::max(s, 0.0);
    }
  }
  return sum;
}

template <class T>
void forward(const Problem& p) {
  const Layout out = {p.batches, p.channels, p.size.height, p.size.width, p.last, 0};
  std::vector<Layout> layouts;
  std::vector<std::unique_ptr<simt::Buffer<T>>> buffers;
  std::vector<UpsampleInput> inputs;
  for (const Map& map : p.maps) {
    const Layout& in = layouts.emplace_back(
        Layout{p.batches, p.channels, map.size.height, map.size.width, p.last, p.gap});
    buffers.push_back(std::make_unique<simt::Buffer<T>>(in.elements(), "input"));
    fill(*buffers.back(), in, buffers.size());
    inputs.push_back({buffers.back()->data(), in.strides(), axis(map, map.size.height, out.height),
                      axis(map, map.size.width, out.width), map.same});
  }
  const auto begin = static_cast<size_t>(p.begin);
  simt::Buffer<T> got(begin + out.elements(), "out");
  simt::Buffer<T> cpu(begin + out.elements(), "out of the CPU");
  pydense::UpsampleArgs args = {{p.batches, p.channels, out.height, out.width, p.last},
                                inputs.data(),
                                static_cast<int>(inputs.size()),
                                got.data() + begin,
                                p.relu};
  pydense::upsample_forward_cuda(kOp, TypeOf<T>::kType, args, 0, nullptr);
  args.out = cpu.data() + begin;
  pydense::upsample_forward(kOp, TypeOf<T>::kType, args, pydense::serial_for);
  expect_same_bits(got, cpu);
  const Layout dense = {p.batches, p.channels, out.height, out.width, false, 0};
  const std::vector<double> expected = reference_forward(p, out, layouts, buffers);
  const double terms = static_cast<double>(p.maps.size());
  out.for_each([&](int64_t n, int64_t c, int64_t y, int64_t x) {
    simt::expect_close_at(
        __FILE__, __LINE__, value(got[begin + out.at(n, c, y, x)]), expected[dense.at(n, c, y, x)],
        0, terms * (2 * TypeOf<T>::kEpsilon + TypeOf<T>::kRounding), out.at(n, c, y, x));
  });
}

template <class T>
void backward(const Problem& p) {
  const Layout grads = {p.batches, p.channels, p.size.height, p.size.width, p.last, p.gap};
  const Layout outs = {p.batches, p.channels, p.size.height, p.size.width, p.last, 0};
  simt::Buffer<T> grad(grads.elements(), "grad");
  simt::Buffer<T> out(outs.elements(), "out");
  fill(grad, grads, 1);
  fill(out, outs, 2);
  for (size_t i = 0; i < out.size(); i += 3) {
    out[i] = pydense::from_accumulate<T>(0);
  }
  // The CPU sums contiguous pictures in the order that is kept for all.
  const Layout plain = {p.batches, p.channels, p.size.height, p.size.width, false, 0};
  simt::Buffer<T> plain_grad(plain.elements(), "contiguous grad");
  simt::Buffer<T> plain_out(plain.elements(), "contiguous out");
  plain.for_each([&](int64_t n, int64_t c, int64_t y, int64_t x) {
    plain_grad[plain.at(n, c, y, x)] = grad[grads.at(n, c, y, x)];
    plain_out[plain.at(n, c, y, x)] = out[outs.at(n, c, y, x)];
  });
  std::vector<std::unique_ptr<simt::Buffer<T>>> got;
  std::vector<std::unique_ptr<simt::Buffer<T>>> cpu;
  std::vector<UpsampleInput> inputs;
  std::vector<UpsampleInput> plain_inputs;
  for (const Map& map : p.maps) {
    const Layout in = {p.batches, p.channels, map.size.height, map.size.width, p.last, 0};
    const Layout flat = {p.batches, p.channels, map.size.height, map.size.width, false, 0};
    got.push_back(std::make_unique<simt::Buffer<T>>(in.elements(), "gradient"));
    cpu.push_back(std::make_unique<simt::Buffer<T>>(in.elements(), "gradient of the CPU"));
    const AxisSpec y = axis(map, map.size.height, p.size.height);
    const AxisSpec x = axis(map, map.size.width, p.size.width);
    inputs.push_back({got.back()->data(), in.strides(), y, x, map.same});
    plain_inputs.push_back({cpu.back()->data(), flat.strides(), y, x, map.same});
  }
  const auto args = [&](bool flat) {
    return pydense::UpsampleBackwardArgs{
        {p.batches, p.channels, p.size.height, p.size.width, p.last && !flat},
        flat ? plain_grad.data() : grad.data(),
        flat ? plain.strides() : grads.strides(),
        !p.relu ? nullptr
        : flat  ? plain_out.data()
                : out.data(),
        flat ? plain_inputs.data() : inputs.data(),
        static_cast<int>(inputs.size())};
  };
  pydense::upsample_backward_cuda(kOp, TypeOf<T>::kType, args(false), 0, nullptr);
  pydense::upsample_backward(kOp, TypeOf<T>::kType, args(true), pydense::serial_for);
  for (size_t k = 0; k < p.maps.size(); ++k) {
    const Map& map = p.maps[k];
    const Layout in = {p.batches, p.channels, map.size.height, map.size.width, p.last, 0};
    const Layout flat = {p.batches, p.channels, map.size.height, map.size.width, false, 0};
    simt::Buffer<T> ours(in.elements(), "contiguous gradient");
    const std::vector<double> wy = weights(axis(map, in.height, p.size.height));
    const std::vector<double> wx = weights(axis(map, in.width, p.size.width));
    in.for_each([&](int64_t n, int64_t c, int64_t i, int64_t j) {
      const T mine = (*got[k])[in.at(n, c, i, j)];
      ours[flat.at(n, c, i, j)] = mine;
      double expected = 0;
      double terms = 1;
      for (int64_t y = 0; y < p.size.height; ++y) {
        const double w =
            map.same ? static_cast<double>(i == y) : wy[static_cast<size_t>(y * in.height + i)];
        for (int64_t x = 0; w != 0 && x < p.size.width; ++x) {
          const double both = w * (map.same ? static_cast<double>(j == x)
                                            : wx[static_cast<size_t>(x * in.width + j)]);
          const size_t at = plain.at(n, c, y, x);
          if (both != 0 && !(p.relu && value(plain_out[at]) <= 0)) {
            expected += both * value(plain_grad[at]);
            terms += both;
          }
        }
      }
      simt::expect_close_at(__FILE__, __LINE__, value(mine), expected, TypeOf<T>::kEpsilon,
                            terms * TypeOf<T>::kRounding, in.at(n, c, i, j));
    });
    expect_same_bits(ours, *cpu[k]);
  }
}

template <class T>
void both(const Problem& p) {
  for (const bool last : {false, true}) {
    Problem q = p;
    q.last = last;
    forward<T>(q);
    backward<T>(q);
  }
}

}  // namespace upsample_checks
