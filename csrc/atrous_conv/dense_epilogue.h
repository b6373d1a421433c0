// SPDX-License-Identifier: Apache-2.0
// From sums to results: f(scale * sum + bias), rounded once, to wherever the picture lies.
#pragma once

#include "atrous_conv/dense.h"
#include "common/buffer.h"
#include "common/gemm/gemm.h"
#include "common/relu.h"
#include "common/simd_lanes.h"

namespace pydense::PYDENSE_ISA {

template <class S>
class DenseEpilogue {
  using P = GemmOperandOf<S>;
  using T = ComputeOf<S>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;

 public:
  explicit DenseEpilogue(const DenseConvArgs& args) : args_(args) {
    const int64_t outputs = gemm_panels(args.shape.outputs, kColumns) * kColumns;
    memory_ = buffer_of<T>(static_cast<size_t>(2 * outputs));
    bias_ = memory_.as<T>();
    scale_ = bias_ + outputs;
    for (int64_t o = 0; o < outputs; ++o) {
      const bool own = o < args.shape.outputs;
      bias_[o] = own && args.bias != nullptr ? static_cast<const T*>(args.bias)[o] : T{0};
      scale_[o] = own && args.scale != nullptr ? static_cast<const T*>(args.scale)[o] : T{1};
    }
  }

  // A panel of outputs from `output` on of a run: sums are [count][kColumns].
  void write(const T* sums, int64_t count, int64_t image, int64_t output, int64_t y, int64_t x,
             bool vertical) const {
    const DenseConvTarget& out = args_.out;
    S* const to = static_cast<S*>(out.data) + image * out.batch + output * out.channel +
                  y * out.row + x * out.pixel;
    const int64_t step = vertical ? out.row : out.pixel;
    const int64_t outputs = smaller(kColumns, args_.shape.outputs - output);
    if (out.channel == 1) {
      write_pixels(sums, count, outputs, output, to, step);
    } else {
      write_planes(sums, count, outputs, output, to, step);
    }
  }

 private:
  V result(const T* sums, int64_t output) const {
    return relu_of(fma(load<V>(scale_ + output), load<V>(sums), load<V>(bias_ + output)),
                   args_.relu);
  }

  void write_pixels(const T* sums, int64_t count, int64_t outputs, int64_t output, S* to,
                    int64_t step) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t o = 0; o < outputs; o += kLanes) {
        const V v = result(sums + i * kColumns + o, output + o);
        S* const own = to + i * step + o;
        if (o + kLanes <= outputs) {
          store_as(own, v);
        } else {
          store_part(own, v, outputs - o);
        }
      }
    }
  }

  void write_planes(const T* sums, int64_t count, int64_t outputs, int64_t output, S* to,
                    int64_t step) const {
    for (int64_t o = 0; o < outputs; o += kLanes) {
      for (int64_t first = 0; first < count; first += kLanes) {
        const int64_t part = smaller(kLanes, count - first);
        V square[kLanes] = {};
        for (int64_t i = 0; i < part; ++i) {
          square[i] = result(sums + (first + i) * kColumns + o, output + o);
        }
        transpose_square(square);
        for (int64_t j = 0; j < smaller(kLanes, outputs - o); ++j) {
          S* const own = to + (o + j) * args_.out.channel + first * step;
          if (step == 1 && part == kLanes) {
            store_as(own, square[j]);
          } else if (step == 1) {
            store_part(own, square[j], part);
          } else {
            T lanes[kLanes];
            store(lanes, square[j]);
            for (int64_t i = 0; i < part; ++i) {
              store_as(own + i * step, lanes[i]);
            }
          }
        }
      }
    }
  }

  const DenseConvArgs& args_;
  Buffer memory_;
  T* bias_;
  T* scale_;
};

}  // namespace pydense::PYDENSE_ISA
