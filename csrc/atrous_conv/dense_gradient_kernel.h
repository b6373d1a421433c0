// SPDX-License-Identifier: Apache-2.0
// Picture by picture, and there for one column of taps after the other, both operands are laid out
// and every tap of the column is a matrix product of a range of rows. A task is a tap and a block
// of its sums; operands come by pieces of depth that the second-level cache holds with the block.
#pragma once

#include "atrous_conv/dense_gradient_operands.h"

namespace pydense::PYDENSE_ISA {

template <class S>
class DenseWeightGradient {
  using Operands = GradientOperands<S>;
  using P = GemmOperandOf<S>;
  using T = ComputeOf<S>;
  using Step = GemmLane<P>;
  static constexpr int64_t kStep = kGemmStep<P>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr int64_t kPieceSteps = 256;
  static constexpr int64_t kBlockChannels = 256;
  static constexpr int64_t kBlockOutputs = 96 / kGemmRows * kGemmRows;

 public:
  explicit DenseWeightGradient(const DenseConvGradientArgs& args)
      : args_(args),
        panels_(gemm_panels(args.shape.channels, kColumns)),
        taps_(args.shape.taps()),
        sums_(buffer_of<T>(checked_bytes(static_cast<size_t>(taps_ * panels_ * kColumns),
                                         static_cast<size_t>(args.shape.outputs)))) {}

  void run(ParallelFor parallel_for) {
    const DenseConvShape& shape = args_.shape;
    for (int64_t image = 0; image < shape.batches; ++image) {
      for (int64_t j = 0; j < shape.kernel_width; ++j) {
        const Range columns =
            outputs_of(j, shape.dilation_x, shape.left, shape.width, shape.out_width);
        if (columns.end > columns.begin) {
          lay_out(image, j, columns, parallel_for);
          multiply(image > 0, j, parallel_for);
        }
      }
    }
    constexpr int64_t kTaskElements = 65536;
    const int64_t rows = ceil_div(kTaskElements, shape.channels * taps_);
    parallel_tasks(parallel_for, ceil_div(shape.outputs, rows), [&](int64_t task) {
      for (int64_t o = task * rows; o < smaller((task + 1) * rows, shape.outputs); ++o) {
        write(o);
      }
    });
  }

 private:
  struct Range {
    int64_t begin;
    int64_t end;
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

  void lay_out(int64_t image, int64_t j, const Range& columns, ParallelFor parallel_for) {
    const DenseConvShape& shape = args_.shape;
    const int64_t count = columns.end - columns.begin;
    steps_ = Operands::steps(count);
    constexpr auto kSize = static_cast<int64_t>(sizeof(Step));
    pitch_ = row_pitch<Step>(shape.out_height * steps_);
    // The first column of taps need not be the widest.
    const auto grow = [](Buffer& buffer, int64_t elements, int64_t size) {
      buffer.grow(checked_bytes(static_cast<size_t>(elements), static_cast<size_t>(size)), 0);
    };
    grow(rows_, shape.outputs * pitch_, kSize);
    grow(operand_, panels_ * kColumns * shape.height * steps_, kSize);
    const PixelColumns of_grad = {columns.begin, count, shape.out_height};
    const PixelColumns of_x = {columns.begin + j * shape.dilation_x - shape.left, count,
                               shape.height};
    const auto* const grad = static_cast<const S*>(args_.grad.data) + image * args_.grad.batch;
    const auto* const x = static_cast<const S*>(args_.x.data) + image * args_.x.batch;
    constexpr int64_t kGroup = 16;  // channels of a task
    const int64_t groups = ceil_div(shape.outputs, kGroup);
    parallel_tasks(parallel_for, groups + panels_, [&](int64_t task) {
      if (task < groups) {
        Operands::take_rows(args_.grad, grad, of_grad, task * kGroup,
                            smaller(kGroup, shape.outputs - task * kGroup), rows_.as<Step>(),
                            pitch_);
      } else {
        const int64_t panel = task - groups;
        Operands::take_panel(args_.x, x, of_x, panel * kColumns,
                             smaller(kColumns, shape.channels - panel * kColumns),
                             operand_.as<Step>() + panel * shape.height * steps_ * kColumns);
      }
    });
  }

  T* sums_at(int64_t tap, int64_t panel, int64_t output) const {
    return sums_.as<T>() + ((tap * panels_ + panel) * args_.shape.outputs + output) * kColumns;
  }

  void multiply(bool more, int64_t j, ParallelFor parallel_for) {
    const DenseConvShape& shape = args_.shape;
    const int64_t across = ceil_div(panels_, kBlockChannels / kColumns);
    const int64_t block_panels = ceil_div(panels_, across);
    const int64_t down = ceil_div(shape.outputs, kBlockOutputs);
    const int64_t block = ceil_div(ceil_div(shape.outputs, down), kGemmRows) * kGemmRows;
    parallel_tasks(parallel_for, shape.kernel_height * across * down, [&](int64_t task) {
      const int64_t i = task / (across * down);
      const int64_t first_panel = task / down % across * block_panels;
      const int64_t first = task % down * block;
      const Range rows = rows_of(i);
      const int64_t below = i * shape.dilation_y - shape.top;
      const int64_t depth = (rows.end - rows.begin) * steps_;
      for (int64_t k = 0; k < depth; k += kPieceSteps) {
        const int64_t piece = smaller(kPieceSteps, depth - k) * kStep;
        for (int64_t o = first; o < smaller(first + block, shape.outputs); o += kGemmRows) {
          const Step* const own = rows_.as<Step>() + o * pitch_ + rows.begin * steps_ + k;
          for (int64_t p = first_panel; p < smaller(first_panel + block_panels, panels_); ++p) {
            const Step* const panel =
                operand_.as<Step>() +
                (p * shape.height * steps_ + (rows.begin + below) * steps_ + k) * kColumns;
            gemm_rows<P, false>(smaller(kGemmRows, smaller(first + block, shape.outputs) - o),
                                piece, reinterpret_cast<const P*>(own), pitch_ * kStep,
                                reinterpret_cast<const P*>(panel),
                                sums_at(i * shape.kernel_width + j, p, o), kColumns, more || k > 0);
          }
        }
      }
    });
  }

  // Whether any pixel has been added to a tap's sums.
  bool has_sums(int64_t tap) const {
    const DenseConvShape& shape = args_.shape;
    const Range rows = rows_of(tap / shape.kernel_width);
    const Range columns = outputs_of(tap % shape.kernel_width, shape.dilation_x, shape.left,
                                     shape.width, shape.out_width);
    return shape.batches > 0 && rows.end > rows.begin && columns.end > columns.begin;
  }

  // Squares of taps and channels are transposed.
  void write(int64_t output) const {
    constexpr int kLanes = kNativeLanesOf<T>;
    using V = Vec<T, kLanes>;
    const int64_t channels = args_.shape.channels;
    S* const to = static_cast<S*>(args_.weight) + output * channels * taps_;
    for (int64_t first = 0; first < taps_; first += kLanes) {
      const int64_t count = smaller(kLanes, taps_ - first);
      bool any[kLanes];
      for (int64_t k = 0; k < count; ++k) {
        any[k] = has_sums(first + k);
      }
      for (int64_t c = 0; c < channels; c += kLanes) {
        V square[kLanes] = {};
        for (int64_t k = 0; k < count; ++k) {
          if (any[k]) {
            square[k] = load<V>(sums_at(first + k, c / kColumns, output) + c % kColumns);
          }
        }
        transpose_square(square);
        for (int64_t i = 0; i < smaller(kLanes, channels - c); ++i) {
          store_part(to + (c + i) * taps_ + first, square[i], count);
        }
      }
    }
  }

  const DenseConvGradientArgs& args_;
  int64_t panels_;
  int64_t taps_;
  Buffer sums_;     // T [tap][panel][output][kColumns]
  Buffer rows_;     // of the output's gradient
  Buffer operand_;  // of x
  int64_t steps_ = 0;
  int64_t pitch_ = 0;
};

}  // namespace pydense::PYDENSE_ISA
