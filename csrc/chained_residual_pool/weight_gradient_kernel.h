// SPDX-License-Identifier: Apache-2.0
// A task is a slab of pixels and a group of outputs. It goes through the pixels in blocks, of which
// both operands fit the second-level cache together with the sums: the gradient's channels are the
// rows of the product, the input's channels its columns, and pixels the depth, in steps of one or,
// where pairs are multiplied, two.
#pragma once

#include "chained_residual_pool/weight_gradient.h"
#include "common/buffer.h"
#include "common/gemm/gemm.h"
#include "common/lines_ahead.h"
#include "common/simd_lanes.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kSlabPixels = 1024;                          // at least
constexpr int64_t kSlabBytes = 16 << 20;                       // of all slabs' sums, about
constexpr int64_t kGroupRows = kGemmRows * (252 / kGemmRows);  // outputs of a task, at most

template <class S>
class WeightGradient {
  using T = ComputeOf<S>;
  using P = GemmOperandOf<S>;
  using Step = GemmLane<P>;
  static constexpr int64_t kStep = kGemmStep<P>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr int64_t kVector = kLanes * kStep;  // pixels in a vector of steps
  // Of both operands.
  static constexpr int64_t kBlockBytes = (kStep == 2 ? 256 : 384) << 10;
  using V = Vec<T, kLanes>;
  using Steps = Vec<Step, kLanes>;

 public:
  explicit WeightGradient(const WeightGradientArgs& args)
      : args_(args),
        channels_(args.shape.channels),
        width_(args.shape.width),
        rows_(args.shape.batches * args.shape.height),
        last_(args.shape.channels_last),
        columns_(gemm_panels(channels_, kColumns) * kColumns) {
    groups_ = ceil_div(channels_, kGroupRows + kGemmRows - 1);
    group_ = ceil_div(ceil_div(channels_, groups_), kGemmRows) * kGemmRows;
    constexpr auto kSize = static_cast<int64_t>(sizeof(T));
    const int64_t slabs = smaller(larger(1, kSlabBytes / (channels_ * columns_ * kSize)),
                                  ceil_div(larger(1, rows_ * width_), kSlabPixels));
    slab_rows_ = ceil_div(larger(1, rows_), slabs);
    slabs_ = ceil_div(larger(1, rows_), slab_rows_);
    depth_ = larger(4, kBlockBytes / ((group_ + columns_) * kSize * kLanes)) * kLanes;
    pitch_ = depth_ + kLanes;
    sums_ = buffer_of<T>(static_cast<size_t>(slabs_ * channels_ * (columns_ + 1)));
  }

  void run(ParallelFor parallel_for) {
    parallel_tasks(parallel_for, slabs_ * groups_, [&](int64_t task) {
      Block block(*this, pool_);
      block.run(task / groups_, task % groups_ * group_);
      pool_.give_back(std::move(block.buffer));
    });
    constexpr int64_t kTaskElements = 65536;
    const int64_t rows = ceil_div(kTaskElements, slabs_ * columns_);
    parallel_tasks(parallel_for, ceil_div(channels_, rows), [&](int64_t task) {
      for (int64_t o = task * rows; o < smaller((task + 1) * rows, channels_); ++o) {
        add_slabs(o);
      }
    });
  }

 private:
  T* weight_sums(int64_t slab, int64_t output) const {
    return sums_.as<T>() + (slab * channels_ + output) * columns_;
  }
  T* bias_sums(int64_t slab) const {
    return sums_.as<T>() + slabs_ * channels_ * columns_ + slab * channels_;
  }

  void add_slabs(int64_t output) {
    if (args_.bias != nullptr) {
      T sum = 0;
      for (int64_t slab = 0; slab < slabs_; ++slab) {
        sum += bias_sums(slab)[output];
      }
      store_as(static_cast<S*>(args_.bias) + output, sum);
    }
    for (int64_t i = 0; args_.weight != nullptr && i < channels_; i += kLanes) {
      V sum = load<V>(weight_sums(0, output) + i);
      for (int64_t slab = 1; slab < slabs_; ++slab) {
        sum += load<V>(weight_sums(slab, output) + i);
      }
      S* const to = static_cast<S*>(args_.weight) + output * channels_ + i;
      if (i + kLanes <= channels_) {
        store_as(to, sum);
      } else {
        store_part(to, sum, channels_ - i);
      }
    }
  }

  // Where a channel of a pixel lies.
  const S* at(const PoolSource& source, int64_t channel, int64_t row, int64_t x) const {
    return static_cast<const S*>(source.data) + row / args_.shape.height * source.batch +
           row % args_.shape.height * source.row +
           (last_ ? x * channels_ + channel : channel * source.channel + x);
  }

  // A task at work.
  struct Block {
    Block(const WeightGradient& owner, BufferPool& pool)
        : own(owner),
          buffer(pool.take(checked_bytes(
              static_cast<size_t>(own.group_ * own.pitch_ + own.columns_ * own.depth_ +
                                  own.columns_ + int64_t{2} * kLanes),
              sizeof(Step)))),
          left(buffer.template as<Step>()),
          right(left + own.group_ * own.pitch_),
          pixel(right + own.columns_ * own.depth_) {}

    void run(int64_t slab_index, int64_t first_output) {
      slab = slab_index;
      first = first_output;
      outputs = smaller(own.group_, own.channels_ - first);
      for (int64_t o = 0; own.args_.bias != nullptr && o < outputs; ++o) {
        own.bias_sums(slab)[first + o] = 0;
      }
      int64_t filled = 0;
      bool more = false;
      const auto multiply = [&](int64_t next_row, int64_t next_x) {
        if (filled > 0 || !more) {
          add_block(filled, more, next_row, next_x);
        }
        more = true;
        filled = 0;
      };
      const int64_t end = smaller(own.rows_, (slab + 1) * own.slab_rows_);
      for (int64_t row = slab * own.slab_rows_; row < end; ++row) {
        for (int64_t x = 0; x < own.width_;) {
          const int64_t count = smaller(own.width_ - x, (own.depth_ - filled) * kStep);
          take(row, x, count, filled);
          x += count;
          filled += ceil_div(count, kStep);
          if (filled == own.depth_) {
            multiply(x < own.width_ ? row : row + 1, x < own.width_ ? x : 0);
          }
        }
      }
      multiply(end, 0);
    }

    // `count` pixels of a row become steps from k on. A last one that is not full ends with 0.
    void take(int64_t row, int64_t x, int64_t count, int64_t k) {
      if (own.last_) {
        take_left_pixels(row, x, count, k);
        if (own.args_.weight != nullptr) {
          take_right_pixels(row, x, count, k);
        }
      } else {
        take_left_planes(row, x, count, k);
        if (own.args_.weight != nullptr) {
          take_right_planes(row, x, count, k);
        }
      }
    }

    // The steps of pixels that lie side by side, 0 behind the last one.
    static Steps steps_of(const S* from, int64_t pixels) {
      if constexpr (std::is_same_v<S, P>) {
        if (pixels >= kVector) {
          return load<Steps>(from);
        }
        S part[kVector] = {};
        std::memcpy(part, from, static_cast<size_t>(pixels) * sizeof(S));
        return load<Steps>(part);
      } else {
        return pixels >= kLanes ? load_as<V>(from) : load_part<V>(from, pixels);
      }
    }

    // Contiguous: an output's pixels lie together, as the product reads rows that are not packed.
    void take_left_planes(int64_t row, int64_t x, int64_t count, int64_t k) {
      for (int64_t o = 0; o < outputs; ++o) {
        const S* const from = own.at(own.args_.grad, first + o, row, x);
        Step* const to = left + o * own.pitch_ + k;
        for (int64_t i = 0; i < count; i += kVector) {
          store(to + i / kStep, steps_of(from + i, count - i));
        }
      }
    }

    // Squares of channels and steps are transposed.
    void take_right_planes(int64_t row, int64_t x, int64_t count, int64_t k) {
      for (int64_t c = 0; c < own.columns_; c += kLanes) {
        Step* const panel =
            right + c / kColumns * kColumns * own.depth_ + k * kColumns + c % kColumns;
        for (int64_t i = 0; i < count; i += kVector) {
          Steps square[kLanes];
          for (int64_t j = 0; j < kLanes; ++j) {
            square[j] = c + j < own.channels_
                            ? steps_of(own.at(own.args_.input, c + j, row, x + i), count - i)
                            : Steps{};
          }
          transpose_square(square);
          const int64_t part = smaller(kLanes, ceil_div(count - i, kStep));
          for (int64_t j = 0; j < part; ++j) {
            store(panel + (i / kStep + j) * kColumns, square[j]);
          }
        }
      }
    }

    // channels_last: a pixel's channels lie together and go into all panels.
    const Step* step_of(const PoolSource& source, int64_t channel, int64_t channels, int64_t row,
                        int64_t x, int64_t pixels) {
      const S* const from = own.at(source, channel, row, x);
      if constexpr (kStep == 2) {
        const S* const next = pixels > 1 ? from + own.channels_ : nullptr;
        constexpr int kCount = 2 * kLanes;
        for (int64_t i = 0; i < channels; i += kCount) {
          const int64_t part = smaller(kCount, channels - i);
          S rows[2][kCount] = {};
          const bool whole = part == kCount && next != nullptr;
          for (int own_row = 0; own_row < 2 && !whole; ++own_row) {
            if (const S* const own_from = own_row == 0 ? from : next; own_from != nullptr) {
              std::memcpy(rows[own_row], own_from + i, static_cast<size_t>(part) * sizeof(S));
            }
          }
          gemm_pair_rows(whole ? from + i : rows[0], whole ? next + i : rows[1],
                         reinterpret_cast<P*>(pixel + i));
        }
        return pixel;
      } else if constexpr (std::is_same_v<S, P>) {
        return from;
      } else {
        for (int64_t i = 0; i < channels; i += kLanes) {
          store(pixel + i, i + kLanes <= channels ? load_as<V>(from + i)
                                                  : load_part<V>(from + i, channels - i));
        }
        return pixel;
      }
    }

    void take_left_pixels(int64_t row, int64_t x, int64_t count, int64_t k) {
      for (int64_t i = 0; i < count; i += kStep, ++k) {
        const Step* const from =
            step_of(own.args_.grad, first, outputs, row, x + i, smaller(kStep, count - i));
        int64_t o = 0;
        for (; o + kGemmRows <= outputs; o += kGemmRows) {
          std::memcpy(left + o * own.pitch_ + k * kGemmRows, from + o, kGemmRows * sizeof(Step));
        }
        for (int64_t j = 0; j < outputs - o; ++j) {
          left[o * own.pitch_ + k * (outputs - o) + j] = from[o + j];
        }
      }
    }

    void take_right_pixels(int64_t row, int64_t x, int64_t count, int64_t k) {
      const int64_t whole = own.channels_ / kColumns * kColumns;
      for (int64_t i = 0; i < count; i += kStep, ++k) {
        const Step* const from =
            step_of(own.args_.input, 0, own.channels_, row, x + i, smaller(kStep, count - i));
        for (int64_t c = 0; c < own.columns_; c += kColumns) {
          Step* const to = right + c * own.depth_ + k * kColumns;
          if (c < whole) {
            std::memcpy(to, from + c, kColumns * sizeof(Step));
          } else {
            for (int64_t j = 0; j < kColumns; ++j) {
              to[j] = c + j < own.channels_ ? from[c + j] : Step{};
            }
          }
        }
      }
    }

    // What the block that begins at that pixel reads of `channels` channels, as far as it lies in
    // the same picture.
    LinesAhead lines_at(const PoolSource& source, int64_t channel, int64_t channels, int64_t row,
                        int64_t x) const {
      constexpr auto kSize = static_cast<int64_t>(sizeof(S));
      if (row >= own.rows_) {
        return {};
      }
      const int64_t height = own.args_.shape.height;
      const int64_t depth = own.depth_ * kStep;
      const int64_t pixels = smaller(own.width_ - x, depth);
      return {own.at(source, channel, row, x),
              pixels * (own.last_ ? channels : 1) * kSize,
              smaller(ceil_div(depth, own.width_), height - row % height),
              source.row * kSize,
              own.last_ ? 1 : channels,
              own.last_ ? 0 : source.channel * kSize};
    }

    void add_block(int64_t depth, bool more, int64_t next_row, int64_t next_x) {
      if (own.args_.weight != nullptr) {
        LinesAhead grad = lines_at(own.args_.grad, first, outputs, next_row, next_x);
        LinesAhead input = lines_at(own.args_.input, 0, own.channels_, next_row, next_x);
        const int64_t blocks = ceil_div(outputs, kGemmRows) * (own.columns_ / kColumns);
        add_products(depth, more, ceil_div(grad.lines(), blocks), grad,
                     ceil_div(input.lines(), blocks), input);
      }
      for (int64_t o = 0; own.args_.bias != nullptr && o < outputs; o += kGemmRows) {
        add_rows(o, smaller(kGemmRows, outputs - o), depth);
      }
    }

    // Sums of a panel's rows, all at a time: each is a chain of additions.
    void add_rows(int64_t panel, int64_t count, int64_t depth) {
      const Step* const from = left + panel * own.pitch_;
      const int64_t step = own.last_ ? count : 1;
      const int64_t row = own.last_ ? 1 : own.pitch_;
      T sums[kGemmRows] = {};
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t i = 0; i < count; ++i) {
          sums[i] = with_step(sums[i], from[k * step + i * row]);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        own.bias_sums(slab)[first + panel + i] += sums[i];
      }
    }

    static T with_step(T sum, Step step) {
      if constexpr (kStep == 2) {
        return sum + float_of<float>(step & 0xFFFFU, P{}) + float_of<float>(step >> 16, P{});
      } else {
        return sum + step;
      }
    }

    void add_products(int64_t depth, bool more, int64_t grad_lines, LinesAhead& grad,
                      int64_t input_lines, LinesAhead& input) {
      GemmAhead asked;
      const auto ask = [&](const void* line) { asked.add(line); };
      for (int64_t o = 0; o < outputs; o += kGemmRows) {
        const int64_t count = smaller(kGemmRows, outputs - o);
        const P* const panel = reinterpret_cast<const P*>(left + o * own.pitch_);
        T* const to = own.weight_sums(slab, first + o);
        for (int64_t c = 0; c < own.columns_; c += kColumns) {
          const P* const columns = reinterpret_cast<const P*>(right + c * own.depth_);
          asked.clear();
          grad.next(grad_lines, ask);
          input.next(input_lines, ask);
          if (own.last_) {
            gemm_rows<P, true>(count, depth * kStep, panel, 0, columns, to + c, own.columns_, more,
                               &asked);
          } else {
            gemm_rows<P, false>(count, depth * kStep, panel, own.pitch_ * kStep, columns, to + c,
                                own.columns_, more, &asked);
          }
        }
      }
    }

    const WeightGradient& own;
    Buffer buffer;
    Step* left;   // the gradient: rows, pitch_ apart, or for channels_last packed
    Step* right;  // the input: panels of columns, depth_ deep
    Step* pixel;  // or two
    int64_t slab = 0;
    int64_t first = 0;
    int64_t outputs = 0;
  };

  const WeightGradientArgs& args_;
  int64_t channels_;
  int64_t width_;
  int64_t rows_;  // of all pictures
  bool last_;
  int64_t columns_;    // of the product: channels, up to whole panels
  int64_t groups_;     // of outputs
  int64_t group_;      // outputs in one
  int64_t slab_rows_;  // rows of pictures in a slab
  int64_t slabs_;
  int64_t depth_;  // steps of a block
  int64_t pitch_;  // no power of 2
  Buffer sums_;
  BufferPool pool_;
};

}  // namespace pydense::PYDENSE_ISA
