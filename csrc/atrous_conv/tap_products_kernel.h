// SPDX-License-Identifier: Apache-2.0
// Tasks are blocks of pixels, for the gradient of the stack blocks of channels. Maps that a product
// reads are made as its packed operand, of the taps that reach the block's rows.
#pragma once

#include "atrous_conv/tap_products.h"
#include "atrous_conv/tap_rows.h"
#include "common/buffer.h"
#include "common/gemm/gemm_panels.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kTapSlab = 256;                            // pixels, whole steps
constexpr int64_t kTapColumns = 256;                         // channels of a task
constexpr int64_t kTapRows = kGemmRows * (384 / kGemmRows);  // of the stack, in a task
constexpr int64_t kTapPitch = kTapSlab + 16;                 // no power of 2

template <class S>
class TapProducts {
  using T = ComputeOf<S>;
  using P = GemmOperandOf<S>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr int64_t kStep = kGemmStep<P>;

 public:
  explicit TapProducts(const TapProductShape& shape)
      : shape_(shape),
        taps_(shape.taps),
        pixels_(shape.taps.height * shape.taps.width),
        rows_(shape.taps.taps * shape.taps.outputs) {}

  void maps(const TapMapsArgs& args, ParallelFor parallel_for) const {
    const int64_t depth = gemm_depth<P>(shape_.channels);
    const Buffer stack = packed(static_cast<const P*>(args.stack), shape_.channels, 1, rows_,
                                shape_.channels, parallel_for);
    const Cut cut = this->cut(depth);
    BufferPool pool;
    parallel_tasks(parallel_for, shape_.images * cut.count, [&](int64_t task) {
      const Block block = block_of(cut, task);
      Buffer buffer = block_memory(pool, cut, depth);
      T* const tile = buffer.as<T>();
      P* const b = reinterpret_cast<P*>(tile + cut.columns * kGemmRows);
      const S* const x = static_cast<const S*>(args.x) + block.image * shape_.channels * pixels_;
      gemm_pack_block(shape_.channels_last ? x + block.first * shape_.channels : x + block.first,
                      shape_.channels_last ? 1 : pixels_,
                      shape_.channels_last ? shape_.channels : 1, block.count, shape_.channels, b);
      T* const to = static_cast<T*>(args.maps) + block.image * rows_ * pixels_ + block.first;
      const int64_t row = gemm_tile_row<P>(block.count);
      for (int64_t r = block.taps.begin * taps_.outputs / kGemmRows * kGemmRows;
           r < block.taps.end * taps_.outputs; r += kGemmRows) {
        const int64_t rows = smaller(kGemmRows, rows_ - r);
        gemm_panel(rows, depth, stack.as<P>() + r * depth, 0, b, depth, block.count, tile);
        for (int64_t i = 0; i < rows; ++i) {
          copy_row(tile + i * row, block.count, to + (r + i) * pixels_);
        }
      }
      pool.give_back(std::move(buffer));
    });
  }

  void picture(const TapPictureGradientArgs& args, ParallelFor parallel_for) const {
    const int64_t channels = shape_.channels;
    const int64_t depth = gemm_depth<P>(rows_);
    const Buffer stack =
        packed(static_cast<const P*>(args.stack), 1, channels, channels, rows_, parallel_for);
    const Cut cut = this->cut(depth);
    BufferPool pool;
    parallel_tasks(parallel_for, shape_.images * cut.count, [&](int64_t task) {
      const Block block = block_of(cut, task);
      Buffer buffer = block_memory(pool, cut, depth);
      T* const tile = buffer.as<T>();
      P* const b = reinterpret_cast<P*>(tile + cut.columns * kGemmRows);
      const int64_t first = block.taps.begin * taps_.outputs / kStep * kStep;
      const int64_t end =
          smaller(depth, larger(first, gemm_depth<P>(block.taps.end * taps_.outputs)));
      const int64_t row = gemm_tile_row<P>(block.count);
      P rows[kStep][kGemmMaxColumns];
      std::memset(static_cast<void*>(rows), 0, sizeof(rows));
      for (int64_t k = first; k < end; k += kStep) {
        for (int64_t i = 0; i < kStep; ++i) {
          shifted(args.grad, block.image, k + i, block.first, block.count, rows[i]);
        }
        gemm_spread_row(rows[0], rows[kStep - 1], block.count, end - first, k - first, b);
      }
      for (int64_t c = 0; c < channels; c += kGemmRows) {
        const int64_t count = smaller(kGemmRows, channels - c);
        gemm_panel(count, end - first, stack.as<P>() + c * depth + first * count, 0, b, end - first,
                   block.count, tile);
        write(tile, row, block, c, count, static_cast<S*>(args.grad_x));
      }
      pool.give_back(std::move(buffer));
    });
  }

  void stack(const TapStackGradientArgs& args, ParallelFor parallel_for) const {
    const int64_t across = ceil_div(shape_.channels, kTapColumns);
    const int64_t down = ceil_div(rows_, kTapRows);
    BufferPool pool;
    parallel_tasks(parallel_for, across * down, [&](int64_t task) {
      const int64_t c = task % across * kTapColumns;
      const int64_t channels = smaller(kTapColumns, shape_.channels - c);
      const int64_t first = task / across * kTapRows;
      const int64_t end = smaller(rows_, first + kTapRows);
      const int64_t width = gemm_tile_row<P>(channels);
      Buffer buffer = pool.take(
          static_cast<size_t>(kTapRows * kTapColumns) * sizeof(T) +
          static_cast<size_t>(kTapSlab * kTapColumns + kGemmRows * kTapPitch) * sizeof(P));
      T* const sums = buffer.as<T>();
      P* const x = reinterpret_cast<P*>(sums + kTapRows * kTapColumns);
      P* const grad = x + kTapSlab * kTapColumns;
      std::memset(static_cast<void*>(sums), 0,
                  static_cast<size_t>((end - first) * width) * sizeof(T));
      for (int64_t image = 0; image < shape_.images; ++image) {
        for (int64_t p = 0; p < pixels_; p += kTapSlab) {
          const int64_t count = smaller(kTapSlab, pixels_ - p);
          const int64_t depth = gemm_depth<P>(count);
          const Taps taps = taps_of(p, count);
          const int64_t last = smaller(end, taps.end * taps_.outputs);
          int64_t r = taps.begin * taps_.outputs;
          r = first + larger(0, r - first) / kGemmRows * kGemmRows;
          if (r >= last) {
            continue;
          }
          const S* const from = static_cast<const S*>(args.x) + image * shape_.channels * pixels_ +
                                (shape_.channels_last ? p * shape_.channels + c : c * pixels_ + p);
          gemm_pack_block(from, shape_.channels_last ? shape_.channels : 1,
                          shape_.channels_last ? 1 : pixels_, channels, count, x);
          for (; r < last; r += kGemmRows) {
            const int64_t rows = smaller(kGemmRows, end - r);
            for (int64_t i = 0; i < rows; ++i) {
              shifted(args.grad, image, r + i, p, count, grad + i * kTapPitch);
              if (depth > count) {
                grad[i * kTapPitch + count] = P{};
              }
            }
            add_product(rows, depth, grad, x, sums + (r - first) * width, width);
          }
        }
      }
      for (int64_t r = first; r < end; ++r) {
        copy_row(sums + (r - first) * width, channels,
                 static_cast<T*>(args.grad_stack) + r * shape_.channels + c);
      }
      pool.give_back(std::move(buffer));
    });
  }

 private:
  // From the first tap that reads some rows to the last.
  struct Taps {
    int64_t begin;
    int64_t end;
  };
  Taps taps_of(int64_t first_pixel, int64_t count) const {
    const int64_t top = first_pixel / taps_.width;
    const int64_t bottom = (first_pixel + count - 1) / taps_.width;
    Taps found = {taps_.taps, 0};
    for (int64_t t = 0; t < taps_.taps; ++t) {
      const int64_t dx = taps_.columns[t];
      if (taps_.rows[t] <= bottom && taps_.rows[t] > top - taps_.height && dx < taps_.width &&
          dx > -taps_.width) {
        found.begin = smaller(found.begin, t);
        found.end = t + 1;
      }
    }
    return found.end == 0 ? Taps{0, 0} : found;
  }

  struct Block {
    int64_t image;
    int64_t first;  // pixel
    int64_t count;
    Taps taps;
  };
  // The blocks of an image.
  struct Cut {
    int64_t columns;
    int64_t count;
  };
  Cut cut(int64_t depth) const {
    const int64_t columns =
        smaller(gemm_block_columns<P>(depth), gemm_panels(pixels_, kColumns) * kColumns);
    return {columns, ceil_div(pixels_, columns)};
  }
  Block block_of(const Cut& cut, int64_t task) const {
    const int64_t first = task % cut.count * cut.columns;
    const int64_t count = smaller(cut.columns, pixels_ - first);
    return {task / cut.count, first, count, taps_of(first, count)};
  }
  // Memory for what a panel makes of a block, T [kGemmRows, columns], and behind it the block.
  static Buffer block_memory(BufferPool& pool, const Cut& cut, int64_t depth) {
    return pool.take(checked_bytes(static_cast<size_t>(cut.columns * kGemmRows), sizeof(T)) +
                     checked_bytes(static_cast<size_t>(cut.columns * depth), sizeof(P)));
  }

  static Buffer packed(const P* from, int64_t row, int64_t column, int64_t rows, int64_t depth,
                       ParallelFor parallel_for) {
    constexpr int64_t kTaskRows = 8 * kGemmRows;
    const int64_t deep = gemm_depth<P>(depth);
    Buffer result(checked_bytes(static_cast<size_t>(rows * deep), sizeof(P)));
    parallel_tasks(parallel_for, ceil_div(rows, kTaskRows), [&](int64_t task) {
      const int64_t first = task * kTaskRows;
      gemm_pack_rows(from + first * row, row, column, smaller(kTaskRows, rows - first), depth,
                     result.as<P>() + first * deep);
    });
    return result;
  }

  // Pixels of the map of row r of the stack, 0 for the row that fills up the last step.
  void shifted(const void* grad, int64_t image, int64_t r, int64_t first, int64_t count,
               P* to) const {
    if (r >= rows_) {
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(count) * sizeof(P));
      return;
    }
    const int64_t t = r / taps_.outputs;
    const S* const plane =
        static_cast<const S*>(grad) + (image * taps_.outputs + r % taps_.outputs) * pixels_;
    const int64_t dy = shift_back(taps_.rows[t]);
    const int64_t dx = shift_back(taps_.columns[t]);
    for (int64_t p = first; p < first + count;) {
      const int64_t x = p % taps_.width;
      const int64_t part = smaller(taps_.width - x, first + count - p);
      copy_shifted(plane, taps_.height, taps_.width, dy, dx, p / taps_.width, x, x + part,
                   to + p - first);
      p += part;
    }
  }

  // Sums of slabs are added one by one: chains of additions are short.
  static void add_product(int64_t rows, int64_t depth, const P* a, const P* b, T* to, int64_t row) {
    T tile[kGemmRows * kColumns];
    for (int64_t j = 0; j < row; j += kColumns) {
      gemm_rows<P, false>(rows, depth, a, kTapPitch, b + j * depth, tile, kColumns);
      gemm_add_tile<P>(rows, tile, to + j, row);
    }
  }

  void write(const T* tile, int64_t row, const Block& block, int64_t c, int64_t channels,
             S* to) const {
    to += block.image * shape_.channels * pixels_;
    if (shape_.channels_last) {
      for (int64_t p = 0; p < block.count; ++p) {
        S* const pixel = to + (block.first + p) * shape_.channels + c;
        for (int64_t i = 0; i < channels; ++i) {
          store_as(pixel + i, tile[i * row + p]);
        }
      }
      return;
    }
    using V = Vec<T, kNativeLanesOf<T>>;
    for (int64_t i = 0; i < channels; ++i) {
      S* const plane = to + (c + i) * pixels_ + block.first;
      int64_t p = 0;
      for (; p + kLanesIn<V> <= block.count; p += kLanesIn<V>) {
        store_as(plane + p, load<V>(tile + i * row + p));
      }
      if (p < block.count) {
        store_part(plane + p, load<V>(tile + i * row + p), block.count - p);
      }
    }
  }

  const TapProductShape& shape_;
  const TapMaps& taps_;
  int64_t pixels_;
  int64_t rows_;  // of the stack
};

template <class S>
constexpr TapProductFunctions tap_product_functions() noexcept {
  return {[](const TapMapsArgs& args, ParallelFor parallel_for) {
            TapProducts<S>(args.shape).maps(args, parallel_for);
          },
          [](const TapPictureGradientArgs& args, ParallelFor parallel_for) {
            TapProducts<S>(args.shape).picture(args, parallel_for);
          },
          [](const TapStackGradientArgs& args, ParallelFor parallel_for) {
            TapProducts<S>(args.shape).stack(args, parallel_for);
          }};
}

}  // namespace pydense::PYDENSE_ISA
