// SPDX-License-Identifier: Apache-2.0
// Picture by picture both operands are laid out, and every tap is a matrix product of a range of
// rows. A task is a tap and a block of its sums; operands come by pieces of depth that the
// second-level cache holds with the block.
//
// Where few columns lie beside the picture (small rates), all taps read one layout: a tap moves the
// gradient's pixels along, and what then has no partner meets a zero. Else a column of taps after
// the other gets a layout of the columns that meet. Zeros make NaN of infinities, which such a tap
// does not see: where a sum is NaN, the columns are summed up once more, one after the other.
#pragma once

#include <atomic>

#include "atrous_conv/dense_gradient_operands.h"
#include "common/gemm/gemm_parts.h"

namespace pydense::PYDENSE_ISA {

template <class S>
class DenseWeightGradient {
  using Operands = GradientOperands<S>;
  using P = GemmOperandOf<S>;
  using T = ComputeOf<S>;
  using Step = GemmLane<P>;
  static constexpr int64_t kStep = kGemmStep<P>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr int64_t kPiece = 256 * kStep;  // pixels
  static constexpr int64_t kBlockChannels = 256;
  static constexpr int64_t kBlockOutputs = 96 / kGemmRows * kGemmRows;
  static constexpr int64_t kLeastBlockOutputs = 2 * kGemmRows;
  // So many tasks of one size, or more, keep any usual number of threads busy to the end.
  static constexpr int64_t kTasks = 48;

 public:
  explicit DenseWeightGradient(const DenseConvGradientArgs& args)
      : args_(args),
        panels_(gemm_panels(args.shape.channels, kColumns)),
        taps_(args.shape.taps()),
        sums_(buffer_of<T>(checked_bytes(static_cast<size_t>(taps_ * panels_ * kColumns),
                                         static_cast<size_t>(args.shape.outputs)))) {}

  void run(ParallelFor parallel_for) {
    const bool together = columns_go_together();
    sum_up(together, parallel_for);
    if (write(parallel_for) && together) {
      sum_up(false, parallel_for);
      write(parallel_for);
    }
  }

 private:
  struct Range {
    int64_t begin;
    int64_t end;
    int64_t count() const { return larger(0, end - begin); }
  };
  // Columns of taps that one layout serves, and what it is of.
  struct Layout {
    int64_t tap;
    int64_t taps;
    PixelColumns of_grad;
    PixelColumns of_x;
    int64_t around;  // zeros around a channel of the gradient
  };

  // The outputs for which a tap meets the picture.
  static Range outputs_of(int64_t tap, int64_t dilation, int64_t padding, int64_t size,
                          int64_t out_size) {
    const int64_t first = padding - tap * dilation;
    return {larger(0, first), smaller(out_size, first + size)};
  }
  Range rows_of(int64_t tap) const {
    const DenseConvShape& shape = args_.shape;
    return outputs_of(tap, shape.dilation_y, shape.top, shape.height, shape.out_height);
  }
  Range columns_of(int64_t tap) const {
    const DenseConvShape& shape = args_.shape;
    return outputs_of(tap, shape.dilation_x, shape.left, shape.width, shape.out_width);
  }
  static int64_t whole_steps(int64_t pixels) { return ceil_div(pixels, kStep) * kStep; }

  // A layout for all taps. In rows of the width W of the layout, output p of a tap lies beside
  // column p + shift of x. Outputs before column 0 of x lie behind a row's last output, in zeros of
  // the row before; columns behind the last output's are zeros of x.
  Layout layout_of_all() const {
    const DenseConvShape& shape = args_.shape;
    const int64_t most = larger(0, shift(shape.kernel_width - 1));
    const int64_t least = larger(0, -shift(0));
    const int64_t row = whole_steps(larger(shape.out_width + most, shape.width + least));
    return {0,
            shape.kernel_width,
            {0, shape.out_width, row, shape.out_height},
            {0, shape.width, row, shape.height},
            larger(most, least)};
  }
  Layout layout_of_column(int64_t j) const {
    const DenseConvShape& shape = args_.shape;
    const Range columns = columns_of(j);
    const int64_t count = columns.count();
    const int64_t row = whole_steps(count);
    return {j,
            1,
            {columns.begin, count, row, shape.out_height},
            {columns.begin + shift(j), count, row, shape.height},
            0};
  }
  // Column of x less that of the output, at a column of taps.
  int64_t shift(int64_t j) const { return j * args_.shape.dilation_x - args_.shape.left; }

  // Whether the zeros between cost less than a layout for each column of taps: about a twelfth of
  // the product.
  bool columns_go_together() const {
    const int64_t taps = args_.shape.kernel_width;
    int64_t apart = 0;
    for (int64_t j = 0; j < taps; ++j) {
      apart += whole_steps(columns_of(j).count());
    }
    return taps > 1 && layout_of_all().of_x.row * taps * 12 <= apart * 13;
  }

  void sum_up(bool together, ParallelFor parallel_for) {
    for (int64_t image = 0; image < args_.shape.batches; ++image) {
      if (together) {
        lay_out(image, layout_of_all(), parallel_for);
        multiply(image > 0, layout_of_all(), parallel_for);
        continue;
      }
      for (int64_t j = 0; j < args_.shape.kernel_width; ++j) {
        if (columns_of(j).count() > 0) {
          lay_out(image, layout_of_column(j), parallel_for);
          multiply(image > 0, layout_of_column(j), parallel_for);
        }
      }
    }
  }

  void lay_out(int64_t image, const Layout& layout, ParallelFor parallel_for) {
    const DenseConvShape& shape = args_.shape;
    // The first layout need not be the largest.
    const auto grow = [](Buffer& buffer, int64_t elements, size_t size) {
      buffer.grow(checked_bytes(static_cast<size_t>(elements), size), 0);
    };
    const int64_t panel_steps = shape.height * layout.of_x.row / kStep * kColumns;
    grow(rows_, shape.outputs * Operands::pitch(layout.of_grad, layout.around), sizeof(P));
    grow(operand_, panels_ * panel_steps, sizeof(Step));
    const auto* const grad = static_cast<const S*>(args_.grad.data) + image * args_.grad.batch;
    const auto* const x = static_cast<const S*>(args_.x.data) + image * args_.x.batch;
    constexpr int64_t kGroup = 16;  // channels of a task
    constexpr int64_t kPanelTasks = 16;
    const int64_t groups = ceil_div(shape.outputs, kGroup);
    const int64_t height = ceil_div(shape.height, ceil_div(kPanelTasks, panels_));  // of a band
    const int64_t bands = ceil_div(shape.height, height);
    parallel_tasks(parallel_for, groups + panels_ * bands, [&](int64_t task) {
      if (task < groups) {
        Operands::take_rows(args_.grad, grad, layout.of_grad, layout.around, task * kGroup,
                            smaller(kGroup, shape.outputs - task * kGroup), rows_.as<P>());
      } else {
        const int64_t panel = (task - groups) / bands;
        const int64_t y = (task - groups) % bands * height;
        Operands::take_panel(args_.x, x, layout.of_x, y, smaller(y + height, shape.height),
                             panel * kColumns, smaller(kColumns, shape.channels - panel * kColumns),
                             operand_.as<Step>() + panel * panel_steps);
      }
    });
  }

  T* sums_at(int64_t tap, int64_t panel, int64_t output) const {
    return sums_.as<T>() + ((tap * panels_ + panel) * args_.shape.outputs + output) * kColumns;
  }

  void multiply(bool more, const Layout& layout, ParallelFor parallel_for) {
    const DenseConvShape& shape = args_.shape;
    const int64_t taps = shape.kernel_height * layout.taps;
    const int64_t across = ceil_div(panels_, kBlockChannels / kColumns);
    const int64_t block_panels = ceil_div(panels_, across);
    const int64_t down = larger(
        ceil_div(shape.outputs, kBlockOutputs),
        smaller(ceil_div(kTasks, taps * across), ceil_div(shape.outputs, kLeastBlockOutputs)));
    const int64_t block = ceil_div(ceil_div(shape.outputs, down), kGemmRows) * kGemmRows;
    // Neighbours share the panels of x.
    parallel_tasks(parallel_for, across * taps * down, [&](int64_t task) {
      const int64_t panel = task / (taps * down) * block_panels;
      const int64_t i = task / down % taps / layout.taps;
      const int64_t j = layout.tap + task / down % layout.taps;
      const int64_t first = task % down * block;
      multiply_block(more, layout, i, j, {first, smaller(first + block, shape.outputs)},
                     {panel, smaller(panel + block_panels, panels_)});
    });
  }

  void multiply_block(bool more, const Layout& layout, int64_t i, int64_t j, const Range& outputs,
                      const Range& panels) const {
    const DenseConvShape& shape = args_.shape;
    const Range rows = rows_of(i);
    const int64_t row = layout.of_x.row;
    const int64_t pitch = Operands::pitch(layout.of_grad, layout.around);
    const int64_t beside = layout.taps > 1 ? shift(j) : 0;
    const P* const of_grad = rows_.as<P>() + layout.around + rows.begin * row - beside;
    const int64_t below = i * shape.dilation_y - shape.top;
    const P* const of_x = operand_.as<P>() + (rows.begin + below) * row * kColumns;
    const int64_t depth = columns_of(j).count() == 0 ? 0 : rows.count() * row;
    for (int64_t k = 0; k < depth; k += kPiece) {
      for (int64_t o = outputs.begin; o < outputs.end; o += kGemmRows) {
        for (int64_t p = panels.begin; p < panels.end; ++p) {
          gemm_rows_in_parts<P, false>(
              smaller(kGemmRows, outputs.end - o), smaller(kPiece, depth - k),
              of_grad + o * pitch + k, pitch, of_x + (p * shape.height * row + k) * kColumns,
              sums_at(i * shape.kernel_width + j, p, o), kColumns, more || k > 0);
        }
      }
    }
  }

  // Whether any pixel has been added to a tap's sums.
  bool has_sums(int64_t tap) const {
    const DenseConvShape& shape = args_.shape;
    return shape.batches > 0 && rows_of(tap / shape.kernel_width).count() > 0 &&
           columns_of(tap % shape.kernel_width).count() > 0;
  }

  // Returns whether a sum is NaN.
  bool write(ParallelFor parallel_for) const {
    constexpr int64_t kTaskElements = 32768;
    const int64_t outputs = args_.shape.outputs;
    const int64_t block = ceil_div(kTaskElements, kColumns * taps_);
    const int64_t blocks = ceil_div(outputs, block);
    std::atomic<bool> found{false};
    parallel_tasks(parallel_for, panels_ * blocks, [&](int64_t task) {
      const int64_t first = task % blocks * block;
      if (write_block(task / blocks, first, smaller(first + block, outputs))) {
        found = true;
      }
    });
    return found;
  }

  // Squares of taps and channels are transposed.
  bool write_block(int64_t panel, int64_t first_output, int64_t end_output) const {
    constexpr int kLanes = kNativeLanesOf<T>;
    using V = Vec<T, kLanes>;
    const int64_t channels = smaller(kColumns, args_.shape.channels - panel * kColumns);
    auto is_nan = V{} < V{};
    for (int64_t first = 0; first < taps_; first += kLanes) {
      const int64_t count = smaller(kLanes, taps_ - first);
      bool any[kLanes];
      for (int64_t k = 0; k < count; ++k) {
        any[k] = has_sums(first + k);
      }
      for (int64_t o = first_output; o < end_output; ++o) {
        for (int64_t c = 0; c < channels; c += kLanes) {
          V square[kLanes] = {};
          for (int64_t k = 0; k < count; ++k) {
            if (any[k]) {
              square[k] = load<V>(sums_at(first + k, panel, o) + c);
              is_nan |= square[k] != square[k];
            }
          }
          transpose_square(square);
          write_channels(square, o, panel * kColumns + c, smaller(kLanes, channels - c), first,
                         count);
        }
      }
    }
    bool found = false;
    for (int64_t l = 0; l < kLanes; ++l) {
      found = found || is_nan[l] != 0;
    }
    return found;
  }

  // `count` taps from `first` on of some channels of an output.
  template <class V>
  void write_channels(const V* square, int64_t output, int64_t channel, int64_t channels,
                      int64_t first, int64_t count) const {
    constexpr int kLanes = kLanesIn<V>;
    S* const to =
        static_cast<S*>(args_.weight) + (output * args_.shape.channels + channel) * taps_ + first;
    if (count < taps_) {
      for (int64_t i = 0; i < channels; ++i) {
        store_part(to + i * taps_, square[i], count);
      }
      return;
    }
    S all[kLanes * (kLanes + 1)];  // whole vectors: each ends in what the next one overwrites
    for (int64_t i = 0; i < channels; ++i) {
      store_as(all + i * taps_, square[i]);
    }
    std::memcpy(to, all, static_cast<size_t>(channels * taps_) * sizeof(S));
  }

  const DenseConvGradientArgs& args_;
  int64_t panels_;
  int64_t taps_;
  Buffer sums_;     // T [tap][panel][output][kColumns]
  Buffer rows_;     // of the output's gradient
  Buffer operand_;  // of x
};

}  // namespace pydense::PYDENSE_ISA
