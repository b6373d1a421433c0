// SPDX-License-Identifier: Apache-2.0
// How a stage is cut into tiles, what a tile reads and writes, and the sums at its end.
#pragma once

#include "chained_residual_pool/max_pool_tile.h"
#include "chained_residual_pool/residual_stage.h"
#include "common/gemm/gemm.h"
#include "common/lines_ahead.h"

namespace pydense::PYDENSE_ISA {

// out[e] = addends[0][at + e] + ... + (sum[e] + bias) for e in [0, count); sum may be null.
template <class S, class T>
PYDENSE_HD void finish(const T* sum, const T* bias, T one_bias, const S* const* addends,
                       int num_addends, int64_t at, int64_t count, S* out) {
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  for (int64_t e = 0; e < count; e += kLanes) {
    const int64_t part = count - e;
    const bool whole = part >= kLanes;
    const auto read = [&](const auto* from) {
      return whole ? load_as<V>(from + e) : load_part<V>(from + e, part);
    };
    V own{};
    if (sum != nullptr) {
      own = read(sum);
      own = bias != nullptr ? own + read(bias) : own + broadcast<V>(one_bias);
    }
    if (num_addends > 0) {
      V total = read(addends[0] + at);
      for (int k = 1; k < num_addends; ++k) {
        total += read(addends[k] + at);
      }
      own = sum != nullptr ? total + own : total;
    }
    if (whole) {
      store_as(out + e, own);
    } else {
      store_part(out + e, own, part);
    }
  }
}

template <class S>
class StageTiles {
 protected:
  static constexpr auto kSize = static_cast<int64_t>(sizeof(S));

  // Tiles of about `pixels` pixels, at most `columns` wide, or where no narrow rest remains so.
  StageTiles(const ResidualStageArgs& args, int64_t pixels, int64_t columns)
      : args_(args),
        channels_(args.shape.channels),
        last_(args.shape.channels_last),
        columns_(columns_of(args.shape.width, smaller(columns, pixels))),
        rows_(evenly(args.shape.height, larger(1, pixels / columns_))),
        across_(ceil_div(args.shape.width, columns_)),
        down_(ceil_div(args.shape.height, rows_)) {}

  // Parts of nearly the same size, of at most `most`.
  static int64_t evenly(int64_t count, int64_t most) {
    return ceil_div(count, ceil_div(count, most));
  }
  // channels_last whole blocks of the product, but no narrow second tile.
  int64_t columns_of(int64_t width, int64_t columns) const {
    if (last_) {
      return width < 2 * columns ? width : columns;
    }
    return evenly(width, columns);
  }

  int64_t image_of(int64_t task) const { return task / (across_ * down_); }
  PoolTile tile_of(int64_t task) const {
    const int64_t top = task / across_ % down_ * rows_;
    const int64_t left = task % across_ * columns_;
    return {top, smaller(top + rows_, args_.shape.height), left,
            smaller(left + columns_, args_.shape.width)};
  }

  // What a task reads.
  LinesAhead lines_of(int64_t task) const {
    const int64_t reach = args_.shape.size / 2;
    const PoolTile tile = tile_of(task);
    const PoolPicture<S> from = picture(image_of(task), 0, 1);
    const int64_t left = larger(0, tile.left - reach);
    const int64_t right = smaller(from.width, tile.right + reach);
    const int64_t top = larger(0, tile.top - reach);
    const int64_t bottom = smaller(from.height, tile.bottom + reach);
    return {from.from + top * from.row_stride + left * from.pixel_stride,
            (right - left) * from.pixel_stride * kSize,
            bottom - top,
            from.row_stride * kSize,
            last_ ? 1 : channels_,
            last_ ? 0 : args_.x.channel * kSize};
  }

  // Of a dense picture that a task writes, or none.
  LinesAhead result_lines_of(int64_t task, const void* picture, int64_t size) const {
    const PoolTile tile = tile_of(task);
    const int64_t pixel = (last_ ? channels_ : 1) * size;
    if (picture == nullptr) {
      return {};
    }
    return {static_cast<const char*>(picture) +
                dense_index(image_of(task), 0, tile.top, tile.left) * size,
            (tile.right - tile.left) * pixel,
            tile.bottom - tile.top,
            args_.shape.width * pixel,
            last_ ? 1 : channels_,
            last_ ? 0 : args_.shape.height * args_.shape.width * size};
  }

  static void copy_rows(int64_t rows, int64_t count, const S* from, int64_t from_row, S* to,
                        int64_t to_row) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to + i * to_row, from + i * from_row, static_cast<size_t>(count * kSize));
    }
  }

  // What a tile of a plane reads.
  void prefetch_plane(const PoolPicture<S>& plane, const PoolTile& tile) const {
    const int64_t reach = args_.shape.size / 2;
    const int64_t first = larger(0, tile.left - reach);
    const int64_t end = smaller(plane.width, tile.right + reach);
    for (int64_t y = larger(0, tile.top - reach); y < smaller(plane.height, tile.bottom + reach);
         ++y) {
      prefetch(plane.from + y * plane.row_stride + first, end - first);
    }
  }

  // Elements of a dense picture before (image, channel, y, x).
  int64_t dense_index(int64_t image, int64_t channel, int64_t y, int64_t x) const {
    const PoolShape& shape = args_.shape;
    return last_ ? ((image * shape.height + y) * shape.width + x) * channels_ + channel
                 : ((image * channels_ + channel) * shape.height + y) * shape.width + x;
  }
  uint8_t* offsets_at(int64_t index) const {
    return args_.offsets == nullptr ? nullptr : args_.offsets + index;
  }
  PoolPicture<S> picture(int64_t image, int64_t channel, int64_t unit) const {
    const PoolSource& x = args_.x;
    return {static_cast<const S*>(x.data) + image * x.batch + channel * (last_ ? 1 : x.channel),
            x.row,
            last_ ? channels_ : 1,
            args_.shape.height,
            args_.shape.width,
            unit};
  }

  // Calls fn(pixel of the tile, y, x, count) for the parts of [begin, end) that lie in one row.
  template <class Fn>
  static void for_pieces(const PoolTile& tile, int64_t begin, int64_t end, const Fn& fn) {
    const int64_t width = tile.right - tile.left;
    for (int64_t p = begin; p < end;) {
      const int64_t x = p % width;
      const int64_t count = smaller(width - x, end - p);
      fn(p, tile.top + p / width, tile.left + x, count);
      p += count;
    }
  }

  void find_addends(int64_t image, int64_t c, int64_t y, int64_t x, const S** addends) const {
    for (int k = 0; k < args_.num_addends; ++k) {
      const PoolSource& from = args_.addends[k];
      addends[k] = static_cast<const S*>(from.data) + image * from.batch + y * from.row +
                   (last_ ? x * channels_ + c : c * from.channel + x);
    }
  }

  // What a product's results meet in memory comes from afar, row by row from another page: the CPU
  // does not foresee it, and the product gives it time to arrive.
  void ask_for_results(int64_t image, int64_t c, int64_t y, int64_t x, int64_t count,
                       GemmAhead& asked) const {
    const S* addends[kMaxResidualStages];
    find_addends(image, c, y, x, addends);
    for (int k = 0; k < args_.num_addends; ++k) {
      asked.add(addends[k], count * kSize);
    }
    asked.add(static_cast<const S*>(args_.out) + dense_index(image, c, y, x), count * kSize);
  }

  const ResidualStageArgs& args_;
  int64_t channels_;
  bool last_;
  int64_t columns_;  // of a tile
  int64_t rows_;
  int64_t across_;  // tiles
  int64_t down_;
};

}  // namespace pydense::PYDENSE_ISA
