// SPDX-License-Identifier: Apache-2.0
// A task is a tile of pixels with all outputs, of rows of the output that read the same rows of x.
// Contiguous: a *slab* of channels after the other becomes panels of pixels, and the weights are
// the rows that pass over them, so that a tile may have many pixels. channels_last: all channels of
// a pixel are summed at once, as they lie, and pixels pass over panels of weights. Either way,
// slabs of the operands stay in the second-level cache, and sums of the product in memory that
// does.
#pragma once

#include "atrous_conv/depthwise_sums.h"
#include "atrous_conv/separable.h"
#include "common/gemm/gemm_parts.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kSlab = 256;             // channels; whole parts of a product
constexpr int64_t kTileColumns = 320;      // pixels of a contiguous tile, about
constexpr int64_t kTilePlaces = 512;       // of rows of the kernel on those of a tile, about
constexpr int64_t kTileBytes = 640 << 10;  // of the operand of a channels_last tile, about
constexpr int64_t kMinTileColumns = 48;

template <class S>
class Separable {
  using T = ComputeOf<S>;
  using P = GemmOperandOf<S>;
  using V = RowVec<T>;
  static constexpr int64_t kLanes = kLanesIn<V>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr bool kPairs = kGemmStep<P> == 2;
  static constexpr int64_t kNone = -1;
  static constexpr int64_t kLine = 64 / sizeof(P);
  static constexpr int64_t kAhead = 4;  // channels whose rows are asked for beforehand

  struct Tile {
    int64_t image;
    const int64_t* rows;  // of the output
    int64_t num_rows;
    int64_t left;
    int64_t width;
    int64_t pixels() const { return num_rows * width; }
  };

 public:
  Separable(const SeparableArgs& args, const DepthwisePlan& plan)
      : args_(args),
        shape_(args.shape),
        plan_(plan),
        channels_(shape_.channels),
        taps_(shape_.kernel_height * shape_.kernel_width),
        depth_(gemm_depth<P>(channels_)),
        columns_(tile_columns()),
        rows_(smaller(shape_.out_height, larger(1, smaller(tile_pixels() / columns_,
                                                           kTilePlaces / shape_.kernel_height)))),
        across_(ceil_div(shape_.out_width, columns_)),
        down_(ceil_div(shape_.out_height, rows_)),
        panel_(shape_.channels_last ? kColumns : kGemmRows),
        weights_(buffer_of<P>(
            checked_bytes(static_cast<size_t>(gemm_panels(args.outputs, panel_) * panel_),
                          static_cast<size_t>(depth_)))),
        kernel_(buffer_of<T>(
            checked_bytes(static_cast<size_t>(taps_ + 1), static_cast<size_t>(channels_)))),
        bias_(buffer_of<T>(static_cast<size_t>(args.outputs))) {
    pack_kernel();
    for (int64_t o = 0; o < args.outputs; ++o) {
      bias_.as<T>()[o] = args.pointwise_bias == nullptr
                             ? T{}
                             : load_as<T>(static_cast<const S*>(args.pointwise_bias) + o);
    }
  }

  void run(ParallelFor parallel_for) {
    parallel_tasks(parallel_for, gemm_panels(args_.outputs, panel_), [&](int64_t panel) {
      const int64_t first = panel * panel_;
      const int64_t count = smaller(panel_, args_.outputs - first);
      const auto* const from = static_cast<const S*>(args_.pointwise_weight) + first * channels_;
      P* const to = weights_.as<P>() + first * depth_;
      shape_.channels_last ? gemm_pack_columns(from, 1, channels_, count, channels_, to)
                           : gemm_pack_rows(from, channels_, 1, count, channels_, to);
    });
    parallel_tasks(parallel_for, shape_.batches * down_ * across_, [&](int64_t task) {
      const int64_t first = task / across_ % down_ * rows_;
      const int64_t left = task % across_ * columns_;
      const Tile tile = {task / (across_ * down_), plan_.rows + first,
                         smaller(rows_, shape_.out_height - first), left,
                         smaller(columns_, shape_.out_width - left)};
      shape_.channels_last ? channels_last(tile) : contiguous(tile);
    });
  }

 private:
  int64_t tile_pixels() const {
    return shape_.channels_last
               ? larger(kMinTileColumns, kTileBytes / (depth_ * static_cast<int64_t>(sizeof(P))))
               : kTileColumns;
  }
  // Cut evenly.
  int64_t tile_columns() const {
    return ceil_div(shape_.out_width, ceil_div(shape_.out_width, tile_pixels()));
  }

  // [channels, taps], or [taps, channels] for channels_last; the biases behind them.
  void pack_kernel() {
    const auto* const weight = static_cast<const S*>(args_.depthwise_weight);
    T* const to = kernel_.as<T>();
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t k = 0; k < taps_; ++k) {
        to[shape_.channels_last ? k * channels_ + c : c * taps_ + k] =
            load_as<T>(weight + c * taps_ + k);
      }
      to[taps_ * channels_ + c] = args_.depthwise_bias == nullptr
                                      ? T{}
                                      : load_as<T>(static_cast<const S*>(args_.depthwise_bias) + c);
    }
  }

  // Calls fn(segment, begin, end) for the parts of segments that lie in the tile.
  template <class Fn>
  void for_segments(const Tile& tile, const Fn& fn) const {
    for (int64_t s = 0; s < plan_.num_segments; ++s) {
      const TapSegment& segment = plan_.segments[s];
      const int64_t begin = larger(segment.begin, tile.left);
      const int64_t end = smaller(segment.end, tile.left + tile.width);
      if (begin < end) {
        fn(segment, begin, end);
      }
    }
  }

  // The rows of x that a contiguous tile reads, each once, as far as it reads them, and where each
  // row of the kernel finds its own.
  struct Reads {
    int64_t* sources;  // [num_sources]
    int64_t num_sources;
    int64_t* places;  // [rows of the tile, kernel_height]: of sources, or kNone
    int64_t begin;    // columns
    int64_t end;
    int64_t row;  // from one to the next, with room for a vector to read on
  };

  Reads reads_of(const Tile& tile, int64_t* memory) const {
    const int64_t count = tile.num_rows * shape_.kernel_height;
    Reads reads = {memory, 0, memory + count, 0, 0, 0};
    for (int64_t k = 0; k < count; ++k) {
      const int64_t from = tile.rows[k / shape_.kernel_height] +
                           k % shape_.kernel_height * shape_.dilation_y - shape_.top;
      reads.places[k] = kNone;
      if (from < 0 || from >= shape_.height) {
        continue;
      }
      int64_t i = 0;
      while (i < reads.num_sources && reads.sources[i] != from) {
        ++i;
      }
      reads.places[k] = i;
      if (i == reads.num_sources) {
        reads.sources[reads.num_sources++] = from;
      }
    }
    reads.begin = smaller(larger(0, tile.left - shape_.left), shape_.width);
    reads.end = larger(reads.begin,
                       smaller(shape_.width, tile.left + tile.width - shape_.left +
                                                 (shape_.kernel_width - 1) * shape_.dilation_x));
    reads.row = reads.end - reads.begin + kLanes;
    return reads;
  }

  void contiguous(const Tile& tile) {
    const int64_t columns = gemm_panels(tile.pixels(), kColumns) * kColumns;
    const int64_t slab = smaller(kSlab, depth_);
    const int64_t row = columns + kColumns / 2;  // of the product: no power of 2
    const int64_t places = tile.num_rows * shape_.kernel_height;
    const Buffer place_memory = buffer_of<int64_t>(static_cast<size_t>(2 * places));
    const Buffer row_memory = buffer_of<KernelRow<T>>(static_cast<size_t>(shape_.kernel_height));
    const Reads reads = reads_of(tile, place_memory.as<int64_t>());
    const int64_t read = reads.num_sources * reads.row;
    // Rows of x, sums of a channel, the product; panels, and for pairs two planes behind them.
    Buffer memory = sums_.take(checked_bytes(
        static_cast<size_t>(read + columns + kLanes + args_.outputs * row), sizeof(T)));
    Buffer operand = operands_.take(
        checked_bytes(static_cast<size_t>(columns * (slab + (kPairs ? 2 : 0))), sizeof(P)));
    T* const x = memory.as<T>();
    T* const sums = x + read;
    T* const product = sums + columns + kLanes;
    P* const panels = operand.as<P>();
    std::memset(x, 0, static_cast<size_t>(read) * sizeof(T));
    for (int64_t c = 0; c < depth_; c += slab) {
      const int64_t depth = smaller(slab, depth_ - c);
      for (int64_t k = 0; k < depth; ++k) {
        sum_channel(tile, reads, c + k, x, row_memory.as<KernelRow<T>>(), sums);
        if constexpr (kPairs) {
          P* const planes = panels + slab * columns;
          store_row(sums, columns, args_.inner_relu, planes + k % 2 * columns);
          for (int64_t p = 0; k % 2 == 1 && p < columns; p += kColumns) {
            gemm_pair_rows(planes + p, planes + columns + p,
                           panels + p * depth + (k - 1) * kColumns);
          }
        } else {
          for (int64_t p = 0; p < columns; p += kColumns) {
            store_row(sums + p, kColumns, args_.inner_relu, panels + p * depth + k * kColumns);
          }
        }
      }
      multiply_panels(tile, c, depth, panels, columns, product, row);
    }
    operands_.give_back(std::move(operand));
    sums_.give_back(std::move(memory));
  }

  // Of a whole tile, zeros behind it. A channel behind the last one is 0.
  void sum_channel(const Tile& tile, const Reads& reads, int64_t c, T* x, KernelRow<T>* rows,
                   T* sums) const {
    const int64_t pixels = tile.pixels();
    const int64_t columns = gemm_panels(pixels, kColumns) * kColumns;
    if (c == channels_) {
      std::memset(sums, 0, static_cast<size_t>(columns) * sizeof(T));
      return;
    }
    const auto* const plane = static_cast<const S*>(args_.x.data) + tile.image * args_.x.batch +
                              c * args_.x.channel + reads.begin;
    const int64_t next = c + kAhead < channels_ ? kAhead * args_.x.channel : 0;
    const int64_t count = reads.end - reads.begin;
    for (int64_t i = 0; i < reads.num_sources; ++i) {
      const S* const from = plane + reads.sources[i] * args_.x.row;
      for (int64_t k = 0; k < count; k += kLine) {
        __builtin_prefetch(from + next + k, 0, 2);
      }
      convert_row(from, count, x + i * reads.row);
    }
    const T* const weight = kernel_.as<T>() + c * taps_;
    const T start = kernel_.as<T>()[taps_ * channels_ + c];
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      int64_t num_rows = 0;
      for (int64_t i = 0; i < shape_.kernel_height; ++i) {
        if (const int64_t at = reads.places[r * shape_.kernel_height + i]; at != kNone) {
          rows[num_rows++] = {x + at * reads.row, weight + i * shape_.kernel_width};
        }
      }
      T* const to = sums + r * tile.width - tile.left;
      // What a vector writes behind a segment's end, the next one writes again.
      for_segments(tile, [&](const TapSegment& segment, int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += kRowVectors * kLanes) {
          with_constant<kRowVectors>(ceil_div(end - at, kLanes), [&](auto n) {
            sum_columns<T, decltype(n)::value>(rows, num_rows, segment.first, segment.last,
                                               at - shape_.left - reads.begin, shape_.dilation_x,
                                               start, to + at);
          });
        }
      });
    }
    for (int64_t p = pixels; p < columns; ++p) {
      sums[p] = 0;
    }
  }

  void multiply_panels(const Tile& tile, int64_t c, int64_t depth, const P* panels, int64_t columns,
                       T* product, int64_t row) const {
    for (int64_t o = 0; o < args_.outputs; o += kGemmRows) {
      const int64_t rows = smaller(kGemmRows, args_.outputs - o);
      T* const sums = product + o * row;
      for (int64_t p = 0; p < columns; p += kColumns) {
        gemm_rows_in_parts<P, true>(rows, depth, weights_.as<P>() + o * depth_ + c * rows, 0,
                                    panels + p * depth, sums + p, row, c > 0);
      }
      for (int64_t i = 0; c + depth == depth_ && i < rows; ++i) {
        for (int64_t r = 0; r < tile.num_rows; ++r) {
          const int64_t at =
              ((tile.image * args_.outputs + o + i) * shape_.out_height + tile.rows[r]) *
                  shape_.out_width +
              tile.left;
          finish(sums + i * row + r * tile.width, nullptr, bias_.as<T>()[o + i], tile.width,
                 static_cast<S*>(args_.out) + at);
        }
      }
    }
  }

  void channels_last(const Tile& tile) {
    const int64_t pixels = tile.pixels();
    const int64_t stride = depth_ + kLine;  // of the operand: no power of 2
    const int64_t row = gemm_panels(args_.outputs, kColumns) * kColumns;
    const Buffer tap_memory = buffer_of<PixelTap<S, const T>>(static_cast<size_t>(taps_));
    Buffer operand = operands_.take(checked_bytes(static_cast<size_t>(pixels * stride), sizeof(P)));
    Buffer memory = sums_.take(checked_bytes(static_cast<size_t>(pixels * row), sizeof(T)));
    sum_pixels_of(tile, tap_memory.as<PixelTap<S, const T>>(), operand.as<P>(), stride);
    for (int64_t c = 0; c < depth_; c += kSlab) {
      const int64_t depth = smaller(kSlab, depth_ - c);
      for (int64_t p = 0; p < pixels; p += kGemmRows) {
        const int64_t rows = smaller(kGemmRows, pixels - p);
        T* const sums = memory.as<T>() + p * row;
        for (int64_t o = 0; o < args_.outputs; o += kColumns) {
          gemm_rows_in_parts<P, false>(rows, depth, operand.as<P>() + p * stride + c, stride,
                                       weights_.as<P>() + o * depth_ + c * kColumns, sums + o, row,
                                       c > 0);
        }
        for (int64_t i = 0; c + depth == depth_ && i < rows; ++i) {
          const int64_t y = tile.rows[(p + i) / tile.width];
          const int64_t at = (tile.image * shape_.out_height + y) * shape_.out_width + tile.left +
                             (p + i) % tile.width;
          finish(sums + i * row, bias_.as<T>(), T{}, args_.outputs,
                 static_cast<S*>(args_.out) + at * args_.outputs);
        }
      }
    }
    sums_.give_back(std::move(memory));
    operands_.give_back(std::move(operand));
  }

  void sum_pixels_of(const Tile& tile, PixelTap<S, const T>* taps, P* operand,
                     int64_t stride) const {
    const auto* const image = static_cast<const S*>(args_.x.data) + tile.image * args_.x.batch;
    const T* const weight = kernel_.as<T>();
    const T* const bias = weight + taps_ * channels_;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      P* const to = operand + (r * tile.width - tile.left) * stride;
      for_segments(tile, [&](const TapSegment& segment, int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += kRowPixels) {
          const int64_t count = taps_at<S, const T>(shape_, segment, tile.rows[r], at, image,
                                                    args_.x.row, weight, taps);
          with_constant<kRowPixels>(end - at, [&](auto n) {
            for (int64_t c = 0; c < channels_; c += kLanes) {
              sum_pixels<S, T, decltype(n)::value>(taps, count, channels_, c,
                                                   smaller(kLanes, channels_ - c), bias,
                                                   args_.inner_relu, to + at * stride, stride);
            }
          });
        }
      });
    }
    for (int64_t p = 0; depth_ > channels_ && p < tile.pixels(); ++p) {
      operand[p * stride + channels_] = P{};
    }
  }

  // Sums and biases, one for each or one for all, as results.
  void finish(const T* sums, const T* biases, T bias, int64_t count, S* to) const {
    for (int64_t e = 0; e < count; e += kLanes) {
      const int64_t part = smaller(kLanes, count - e);
      const auto read = [&](const T* from) {
        return part == kLanes ? load<V>(from + e) : load_part<V>(from + e, part);
      };
      const V shift = biases == nullptr ? broadcast<V>(bias) : read(biases);
      const V result = relu_of(read(sums) + shift, args_.relu);
      if (part == kLanes) {
        store_as(to + e, result);
      } else {
        store_part(to + e, result, part);
      }
    }
  }

  const SeparableArgs& args_;
  const DepthwiseShape& shape_;
  const DepthwisePlan& plan_;
  int64_t channels_;
  int64_t taps_;
  int64_t depth_;    // channels, up to whole steps of the product
  int64_t columns_;  // of a tile
  int64_t rows_;
  int64_t across_;  // tiles
  int64_t down_;
  int64_t panel_;   // outputs of a panel of weights
  Buffer weights_;  // panels
  Buffer kernel_;
  Buffer bias_;
  BufferPool sums_;
  BufferPool operands_;
};

}  // namespace pydense::PYDENSE_ISA
