// SPDX-License-Identifier: Apache-2.0
// The weight of a dense convolution as panels of the product's columns. Blocks of outputs follow
// each other; each holds a slab for every tap and piece of the channels, and a slab a panel of
// kGemmColumns outputs after the other. A slab stays in the second-level cache while pixels pass.
#pragma once

#include "atrous_conv/dense.h"
#include "common/buffer.h"
#include "common/gemm/gemm_panels.h"
#include "common/simd_lanes.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kBlockOutputs = 256;
constexpr int64_t kPanelBytes = 32 << 10;  // of a slab, at most

template <class S>
class WeightPanels {
 public:
  using P = GemmOperandOf<S>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr auto kSize = static_cast<int64_t>(sizeof(P));
  static constexpr int64_t kStep = kGemmStep<P>;

  explicit WeightPanels(const DenseConvShape& shape)
      : outputs_(shape.outputs),
        channels_(shape.channels),
        taps_(shape.taps()),
        depth_(gemm_depth<P>(shape.channels)) {
    const int64_t panels = gemm_panels(outputs_, kColumns);
    blocks_ = ceil_div(panels, kBlockOutputs / kColumns);
    block_panels_ = ceil_div(panels, blocks_);
    blocks_ = ceil_div(panels, block_panels_);
    panels_ = panels;
    const int64_t slabs = ceil_div(depth_ * kColumns * kSize, kPanelBytes);
    // Whole parts: sums do not depend on the width of vectors.
    slab_ = ceil_div(ceil_div(depth_, slabs), kGemmPartDepth) * kGemmPartDepth;
    slabs_ = ceil_div(depth_, slab_);
  }

  int64_t blocks() const { return blocks_; }
  int64_t slabs() const { return slabs_; }
  int64_t panels(int64_t block) const {
    return smaller(block_panels_, panels_ - block * block_panels_);
  }
  int64_t block_panels() const { return block_panels_; }
  // Of a slab: its first channel, and how many they are, whole steps.
  int64_t first_channel(int64_t slab) const { return slab * slab_; }
  int64_t slab_depth(int64_t slab) const { return smaller(slab_, depth_ - slab * slab_); }
  int64_t bytes() const { return taps_ * depth_ * panels_ * kColumns * kSize; }

  // Elements before a slab; its panels are slab_depth * kColumns apart.
  int64_t place(int64_t block, int64_t tap, int64_t slab) const {
    return (taps_ * depth_ * block * block_panels_ +
            (tap * depth_ + first_channel(slab)) * panels(block)) *
           kColumns;
  }

  void pack(const DenseConvWeight& weight, P* to, ParallelFor parallel_for) const {
    parallel_tasks(parallel_for, panels_ * slabs_,
                   [&](int64_t task) { pack_panel(weight, task / slabs_, task % slabs_, to); });
  }

 private:
  static constexpr int64_t kTransposedBytes = 16 << 10;

  // All taps of a slab of a panel. A few channels are transposed in the first-level cache and go to
  // their places from there.
  void pack_panel(const DenseConvWeight& weight, int64_t panel, int64_t slab, P* to) const {
    const int64_t depth = slab_depth(slab);
    const int64_t first = first_channel(slab);
    const int64_t chunk =
        smaller(depth, larger(1, kTransposedBytes / (taps_ * kColumns * kSize * kStep)) * kStep);
    const Buffer memory = buffer_of<P>(static_cast<size_t>(chunk * taps_ * kColumns));
    P* const rows = memory.as<P>();
    const int64_t block = panel / block_panels_;
    for (int64_t k = 0; k < depth; k += chunk) {
      const int64_t count = smaller(chunk, depth - k);
      transpose(weight, panel * kColumns, first + k, count, rows);
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t from = weight.flipped ? taps_ - 1 - tap : tap;
        P* const own =
            to + place(block, tap, slab) + (panel % block_panels_ * depth + k) * kColumns;
        for (int64_t c = 0; c < count; c += kStep) {
          const P* const row = rows + (c * taps_ + from) * kColumns;
          if constexpr (kStep == 2) {
            gemm_pair_rows(row, row + taps_ * kColumns, own + c * kColumns);
          } else {
            std::memcpy(own + c * kColumns, row, static_cast<size_t>(kColumns * kSize));
          }
        }
      }
    }
  }

  // [channel][tap][output], zeros behind the last channel and output.
  void transpose(const DenseConvWeight& weight, int64_t output, int64_t channel, int64_t count,
                 P* rows) const {
    const int64_t outputs = smaller(kColumns, outputs_ - output);
    const int64_t channels = smaller(count, channels_ - channel);
    if (outputs < kColumns || channels < count) {
      std::memset(rows, 0, static_cast<size_t>(count * taps_ * kColumns * kSize));
    }
    const S* const from =
        static_cast<const S*>(weight.data) + output * weight.output + channel * weight.channel;
    if (weight.tap == 1 && weight.channel == taps_) {
      transpose_numbers(weight, from, outputs, channels * taps_, 1, rows);
    } else if (weight.tap == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        transpose_numbers(weight, from + c * weight.channel, outputs, taps_, 1,
                          rows + c * taps_ * kColumns);
      }
    } else if (weight.channel == 1) {
      for (int64_t tap = 0; tap < taps_; ++tap) {
        transpose_numbers(weight, from + tap * weight.tap, outputs, channels, taps_,
                          rows + tap * kColumns);
      }
    } else {
      for (int64_t i = 0; i < outputs * channels * taps_; ++i) {
        const int64_t o = i / (channels * taps_);
        const int64_t c = i / taps_ % channels;
        rows[i % (channels * taps_) * kColumns + o] =
            gemm_operand<P>(from + o * weight.output + c * weight.channel + i % taps_ * weight.tap);
      }
    }
  }

  // `count` numbers of every output that lie side by side; each goes `step` rows on.
  static void transpose_numbers(const DenseConvWeight& weight, const S* from, int64_t outputs,
                                int64_t count, int64_t step, P* rows) {
    constexpr int kLanes = static_cast<int>(kColumns) / 2;
    using V = Vec<std::conditional_t<kStep == 2, uint32_t, P>, kLanes>;
    for (int64_t o = 0; o < outputs; o += kLanes) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t part = smaller(kLanes, count - i);
        V square[kLanes];
        for (int64_t k = 0; k < kLanes; ++k) {
          square[k] = o + k < outputs ? numbers<V>(from + (o + k) * weight.output + i, part) : V{};
        }
        transpose_square(square);
        for (int64_t k = 0; k < part; ++k) {
          P* const to = rows + (i + k) * step * kColumns + o;
          if constexpr (kStep == 2) {
            store(to, __builtin_convertvector(square[k], Vec<uint16_t, kLanes>));
          } else {
            store(to, square[k]);
          }
        }
      }
    }
  }

  // Numbers as operands; pairs are made later, from rows.
  template <class V>
  static V numbers(const S* from, int64_t count) {
    if constexpr (kStep == 2) {
      Vec<uint16_t, kLanesIn<V>> bits = {};
      if (count == kLanesIn<V>) {
        bits = load<Vec<uint16_t, kLanesIn<V>>>(from);
      } else {
        std::memcpy(&bits, from, static_cast<size_t>(count) * sizeof(S));
      }
      return __builtin_convertvector(bits, V);
    } else {
      return count == kLanesIn<V> ? load_as<V>(from) : load_part<V>(from, count);
    }
  }

  int64_t outputs_;
  int64_t channels_;
  int64_t taps_;
  int64_t depth_;  // channels, whole steps
  int64_t panels_;
  int64_t blocks_;
  int64_t block_panels_;
  int64_t slab_;  // channels of one, whole steps
  int64_t slabs_;
};

}  // namespace pydense::PYDENSE_ISA
