// SPDX-License-Identifier: Apache-2.0
// A block of rows of tiles goes through three steps: tiles are transformed into operands of the
// products, one for each of their (m + 2)^2 places; products; outputs from them. Lanes are
// channels: tiles are the rows of the products, which read them where they were transformed, and
// weights their columns. What a step hands to the next lies in memory that blocks share.
//
// Contiguous pictures are transposed before and after: tiles of a grid are too far from each other
// in their rows for lanes.
#pragma once

#include "atrous_conv/phase_tiles.h"
#include "atrous_conv/winograd.h"
#include "atrous_conv/winograd_math.h"
#include "common/buffer.h"
#include "common/gemm/gemm_panels.h"
#include "common/relu.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kWinogradBlockBytes = 16 << 20;  // of operands and products, about
constexpr int64_t kWinogradGap = 16;               // between rows: not all a power of 2 apart

template <int M>
class WinogradTiles {
  static constexpr int kSide = M + 2;
  static constexpr int kPlaces = kSide * kSide;
  static constexpr int kLanes = kNativeLanes;
  static constexpr int64_t kColumns = kGemmColumns<float>;
  static constexpr int64_t kTaskColumns = 128;  // at most
  static constexpr int64_t kUnit = 4;           // tiles of a task
  using V = Vec<float, kLanes>;

 public:
  // Of channels_last pictures.
  explicit WinogradTiles(const WinogradArgs& args)
      : args_(args),
        down_(phase_tiles(args.height, args.rate, M)),
        across_(phase_tiles(args.width, args.rate, M)),
        operand_row_(ceil_div(args.channels, kLanes) * kLanes + kWinogradGap),
        product_row_(gemm_panels(args.outputs, kColumns) * kColumns + kWinogradGap) {
    const int64_t rows = args.images * down_;
    const int64_t row_bytes =
        kPlaces * (args.channels + args.outputs) * across_ * static_cast<int64_t>(sizeof(float));
    // As many as the bytes allow, or somewhat less or more: what fills whole panels best.
    const int64_t most = larger(1, kWinogradBlockBytes / row_bytes);
    const int64_t fewest = larger(1, smaller(rows, most / 2));
    int64_t least = INT64_MAX;
    for (int64_t n = smaller(rows, most + most / 4); n >= fewest; --n) {
      const int64_t panels = rows / n * gemm_panels(n * across_, kGemmRows) +
                             gemm_panels(rows % n * across_, kGemmRows);
      if (panels < least) {
        least = panels;
        rows_ = n;
      }
    }
    rows_ = larger(1, rows_);
    tiles_ = rows_ * across_;
    weight_ = gemm_panels(args.outputs, kColumns) * kColumns * args.channels + kWinogradGap;
    operand_ = tiles_ * operand_row_ + kWinogradGap;
    product_ = tiles_ * product_row_ + kWinogradGap;
    // One piece, which the next call of this size finds again.
    memory_ = Buffer(checked_bytes(static_cast<size_t>(kPlaces * (weight_ + operand_ + product_)),
                                   sizeof(float)));
    weights_ = memory_.as<float>();
    operands_ = weights_ + kPlaces * weight_;
    products_ = operands_ + kPlaces * operand_;
  }

  void run(ParallelFor parallel_for) {
    transform_weights(parallel_for);
    const int64_t rows = args_.images * down_;
    for (int64_t row = 0; row < rows; row += rows_) {
      const int64_t count = smaller(rows_, rows - row);
      const int64_t tiles = count * across_;
      parallel_tasks(parallel_for, ceil_div(tiles, kUnit), [&](int64_t task) {
        for (int64_t t = task * kUnit; t < smaller(tiles, (task + 1) * kUnit); ++t) {
          transform_tile(t, row);
        }
      });
      const int64_t columns = smaller(kTaskColumns, gemm_block_columns<float>(args_.channels));
      const int64_t blocks = ceil_div(args_.outputs, columns);
      parallel_tasks(parallel_for, kPlaces * blocks, [&](int64_t task) {
        const int64_t first = task % blocks * columns;
        multiply(task / blocks, first, smaller(columns, args_.outputs - first), tiles);
      });
      parallel_tasks(parallel_for, ceil_div(tiles, kUnit), [&](int64_t task) {
        for (int64_t t = task * kUnit; t < smaller(tiles, (task + 1) * kUnit); ++t) {
          transform_output(t, row);
        }
      });
    }
  }

 private:
  // Taps of some channels, [channel][tap][output of a panel].
  using Taps = float[kLanes][9][kColumns];

  // Panels of the products' columns, 0 behind the last output.
  void transform_weights(ParallelFor parallel_for) {
    parallel_tasks(parallel_for, gemm_panels(args_.outputs, kColumns), [&](int64_t task) {
      const int64_t first = task * kColumns;
      const int64_t count = smaller(kColumns, args_.outputs - first);
      Taps taps = {};
      for (int64_t begin = 0; begin < args_.channels; begin += kLanes) {
        const int64_t channels = smaller(kLanes, args_.channels - begin);
        if (args_.weight_last) {
          read_last(first, count, begin, channels, taps);
        } else {
          read_contiguous(first, count, begin, channels, taps);
        }
        float* to = weights_ + first * args_.channels + begin * kColumns;
        for (int64_t c = 0; c < channels; ++c, to += kColumns) {
          for (int64_t o = 0; o < kColumns; o += kLanes) {
            V g[9];
            V u[kPlaces];
            for (int t = 0; t < 9; ++t) {
              g[t] = load<V>(taps[c][t] + o);
            }
            transform_weight<M>(g, u);
            for (int i = 0; i < kPlaces; ++i) {
              store(to + i * weight_ + o, u[i]);
            }
          }
        }
      }
    });
  }

  void read_contiguous(int64_t first, int64_t count, int64_t begin, int64_t channels,
                       Taps& taps) const {
    const int64_t of_output = args_.flipped ? 9 : args_.channels * 9;
    const int64_t of_channel = args_.flipped ? args_.outputs * 9 : 9;
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = args_.weight + first * of_output + (begin + c) * of_channel;
      for (int64_t o = 0; o < count; ++o, from += of_output) {
        for (int t = 0; t < 9; ++t) {
          taps[c][t][o] = from[args_.flipped ? 8 - t : t];
        }
      }
    }
  }

  // Of a weight [outputs, 3, 3, channels] or, flipped, [channels, 3, 3, outputs].
  void read_last(int64_t first, int64_t count, int64_t begin, int64_t channels, Taps& taps) const {
    for (int64_t o = 0; o < count; o += kLanes) {
      const int64_t outputs = smaller(kLanes, count - o);
      for (int t = 0; t < 9; ++t) {
        V square[kLanes] = {};
        if (args_.flipped) {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t row = (begin + c) * 9 + 8 - t;
            square[c] = part_of(args_.weight + row * args_.outputs + first + o, outputs);
          }
        } else {
          for (int64_t i = 0; i < outputs; ++i) {
            const int64_t row = (first + o + i) * 9 + t;
            square[i] = part_of(args_.weight + row * args_.channels + begin, channels);
          }
          transpose_square(square);
        }
        for (int64_t c = 0; c < channels; ++c) {
          store(taps[c][t] + o, square[c]);
        }
      }
    }
  }

  // A row of tiles of all images' rows: where its outputs begin.
  struct Row {
    int64_t image;
    int64_t y;
  };
  Row row_at(int64_t row) const { return {row / down_, phase_tile_at(row % down_, args_.rate, M)}; }

  V shifted(const V& y, const V& bias) const {
    return relu_of(args_.bias == nullptr ? y : y + bias, args_.relu);
  }

  static V part_of(const float* from, int64_t count) {
    return count >= kLanes ? load<V>(from) : load_part<V>(from, count);
  }

  void transform_tile(int64_t t, int64_t first_row) const {
    const auto at = row_at(first_row + t / across_);
    const int64_t left = phase_tile_at(t % across_, args_.rate, M);
    const float* pixels[kPlaces];  // null beside the picture
    for (int i = 0; i < kPlaces; ++i) {
      const int64_t y = at.y + (i / kSide - 1) * args_.rate;
      const int64_t x = left + (i % kSide - 1) * args_.rate;
      const bool inside = y >= 0 && y < args_.height && x >= 0 && x < args_.width;
      pixels[i] = inside
                      ? args_.x + ((at.image * args_.height + y) * args_.width + x) * args_.channels
                      : nullptr;
    }
    float* const to = operands_ + t * operand_row_;
    for (int64_t c = 0; c < args_.channels; c += kLanes) {
      V d[kPlaces];
      V v[kPlaces];
      for (int i = 0; i < kPlaces; ++i) {
        d[i] = pixels[i] == nullptr ? V{} : part_of(pixels[i] + c, args_.channels - c);
      }
      transform<WinogradInput<M>>(d, v);
      for (int i = 0; i < kPlaces; ++i) {
        store(to + i * operand_ + c, v[i]);
      }
    }
  }

  void multiply(int64_t place, int64_t first, int64_t count, int64_t tiles) {
    const int64_t channels = args_.channels;
    const int64_t row = gemm_tile_row<float>(count);
    Buffer buffer = pool_.take(static_cast<size_t>(kGemmRows * row) * sizeof(float));
    auto* const tile = buffer.as<float>();
    const float* const weights = weights_ + place * weight_ + first * channels;
    for (int64_t t = 0; t < tiles; t += kGemmRows) {
      const int64_t rows = smaller(kGemmRows, tiles - t);
      gemm_panel<float, false>(rows, channels, operands_ + place * operand_ + t * operand_row_,
                               operand_row_, weights, channels, count, tile);
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(products_ + place * product_ + (t + i) * product_row_ + first, tile + i * row,
                    static_cast<size_t>(row) * sizeof(float));
      }
    }
    pool_.give_back(std::move(buffer));
  }

  void transform_output(int64_t t, int64_t first_row) const {
    const auto at = row_at(first_row + t / across_);
    const int64_t left = phase_tile_at(t % across_, args_.rate, M);
    const float* const from = products_ + t * product_row_;
    for (int64_t o = 0; o < args_.outputs; o += kLanes) {
      const int64_t count = smaller(kLanes, args_.outputs - o);
      V product[kPlaces];
      V result[M * M];
      for (int i = 0; i < kPlaces; ++i) {
        product[i] = load<V>(from + i * product_ + o);
      }
      transform<WinogradOutput<M>>(product, result);
      const V bias = args_.bias == nullptr ? V{} : part_of(args_.bias + o, count);
      for (int i = 0; i < M * M; ++i) {
        const int64_t y = at.y + i / M * args_.rate;
        const int64_t x = left + i % M * args_.rate;
        if (y >= args_.height || x >= args_.width) {
          continue;
        }
        const V own = shifted(result[i], bias);
        float* const to =
            args_.out + ((at.image * args_.height + y) * args_.width + x) * args_.outputs + o;
        if (count == kLanes) {
          store(to, own);
        } else {
          store_part(to, own, count);
        }
      }
    }
  }

  const WinogradArgs& args_;
  int64_t down_;      // rows of tiles of an image
  int64_t across_;    // tiles of a row
  int64_t rows_ = 0;  // of a block
  int64_t tiles_;
  int64_t operand_row_;  // from a tile to the next
  int64_t product_row_;
  int64_t weight_;  // from a place to the next
  int64_t operand_;
  int64_t product_;
  Buffer memory_;
  float* weights_;   // [place][panel of outputs][channel][output of the panel]
  float* operands_;  // [place][tile][channel]
  float* products_;  // [place][tile][output]
  BufferPool pool_;
};

// to[image][column][row] = from[image][row][column].
inline void transpose_planes(int64_t images, int64_t rows, int64_t columns, const float* from,
                             float* to, ParallelFor parallel_for) {
  constexpr int kLanes = kNativeLanes;
  using V = Vec<float, kLanes>;
  constexpr int64_t kTaskRows = 4 * int64_t{kLanes};
  const int64_t tasks = ceil_div(rows, kTaskRows);
  parallel_tasks(parallel_for, images * tasks, [&](int64_t task) {
    const float* const source = from + task / tasks * rows * columns;
    float* const target = to + task / tasks * rows * columns;
    const int64_t first = task % tasks * kTaskRows;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t width = smaller(kLanes, columns - c);
      for (int64_t r = first; r < smaller(rows, first + kTaskRows); r += kLanes) {
        const int64_t height = smaller(kLanes, rows - r);
        V square[kLanes] = {};
        for (int64_t i = 0; i < height; ++i) {
          const float* const row = source + (r + i) * columns + c;
          square[i] = width == kLanes ? load<V>(row) : load_part<V>(row, width);
        }
        transpose_square(square);
        for (int64_t i = 0; i < width; ++i) {
          float* const column = target + (c + i) * rows + r;
          if (height == kLanes) {
            store(column, square[i]);
          } else {
            store_part(column, square[i], height);
          }
        }
      }
    }
  });
}

}  // namespace pydense::PYDENSE_ISA
