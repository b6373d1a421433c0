// SPDX-License-Identifier: Apache-2.0
// The pixels of a stage as an operand of its product: a tile of the picture with what windows reach
// around it comes to shared memory some channels at a time, and is pooled from there. A thread
// pools a strip of two columns and four rows: it reduces each row along x in registers and goes on
// down, so that nothing but the result is written.
#pragma once

#include "chained_residual_pool/max_pool_math.h"
#include "chained_residual_pool/residual_product.cuh"
#include "common/mma.cuh"

namespace pydense {

constexpr int kStripRows = 4;
constexpr int kStripColumns = 2;

// kSize: of the window; 1 where nothing is pooled. kDepth: channels of a step. kTileRows: of the
// rows of the block. kOffsets: p.offsets may be asked for.
template <class T, bool kChannelsLast, int kSize, bool kOffsets, int kDepth, int kTileRows>
class PooledOperand {
  using A = Accumulate<T>;
  static constexpr int kVector = kResidualVector<T>;
  static constexpr int kReach = kSize / 2;
  static constexpr int kRows = kTileRows + 2 * kReach;
  // Rows of contiguous pictures begin and end with whole vectors.
  static constexpr int kSide = kChannelsLast ? kReach : (kReach + kVector - 1) / kVector * kVector;
  static constexpr int kColumns = kResidualColumns + 2 * kSide;
  // Channels of a contiguous picture lie so that the strips of a warp meet no bank twice.
  static constexpr int kPlane = kRows * kColumns + (8 + 32 - kRows * kColumns % 32) % 32;
  // Pixels of channels_last that lie side by side over all banks.
  static constexpr int kLine = 128 / (kDepth * static_cast<int>(sizeof(T)));
  static constexpr int kStripsAcross = kResidualColumns / kStripColumns;
  static constexpr int kStripsDown = kTileRows / kStripRows;
  static_assert(kDepth % 8 == 0 && kTileRows % kStripRows == 0);

 public:
  // Elements of shared memory for the channels of one step.
  static constexpr int kElements = kChannelsLast ? kRows * kColumns * kDepth : kDepth * kPlane;
  // The pooled numbers of a strip in a row.
  using Pooled = Vector<T, kStripColumns>;

  __device__ __forceinline__ PooledOperand(const ResidualStageParams<T>& p,
                                           const ResidualTile<kChannelsLast>& tile)
      : p_(p), tile_(tile) {}

  // Copies channels from `first` on, outside of the picture -inf, which never wins, and zeros for
  // channels that are not there. Seen after a wait for the copies and a barrier.
  __device__ __forceinline__ void bring(int32_t first, T* to) const {
    constexpr int kPixelVectors = kDepth / kVector;
    constexpr int kRowVectors = kColumns / kVector;
    constexpr int kVectors =
        kChannelsLast ? kRows * kColumns * kPixelVectors : kDepth * kRows * kRowVectors;
    const Around around(p_, tile_);
    for (int i = opaque(static_cast<int>(threadIdx.x)); i < kVectors;
         i += static_cast<int>(blockDim.x)) {
      int channel;
      int row;
      int column;
      if constexpr (kChannelsLast) {
        channel = i % kPixelVectors * kVector;
        row = i / kPixelVectors / kColumns;
        column = i / kPixelVectors % kColumns;
      } else {
        channel = i / kRowVectors / kRows;
        row = i / kRowVectors % kRows;
        column = i % kRowVectors * kVector;
      }
      bring_vector(around, first + channel, row, column, to + place(channel, row, column));
    }
  }

  // Pools the channels that `from` has. put(channel, pixel, pooled) takes what a strip has in a
  // row, by its first channel of the step and pixel of the tile.
  template <class Put>
  __device__ __forceinline__ void pool(int32_t first, const T* from, const Put& put) const {
    constexpr int kStrips = kDepth * kStripsAcross * kStripsDown;
    for (int i = opaque(static_cast<int>(threadIdx.x)); i < kStrips;
         i += static_cast<int>(blockDim.x)) {
      if constexpr (kChannelsLast) {
        const int strip = i / kDepth;
        pool_strip(first, from, i % kDepth, strip / kStripsAcross * kStripRows,
                   strip % kStripsAcross * kStripColumns, put);
      } else {
        // A warp has every other of eight channels: they lie in all banks.
        const int rest = i / kStripsAcross / 4;
        const int channel = i / kStripsAcross % 4 * 2 + rest / kStripsDown % 2;
        pool_strip(first, from, rest / kStripsDown / 2 * 8 + channel,
                   rest % kStripsDown * kStripRows, i % kStripsAcross * kStripColumns, put);
      }
    }
  }

 private:
  // A row of a strip, reduced: the maxima, and where they are in their windows.
  struct Best {
    A best[kStripColumns];
    int code[kStripColumns];
  };

  __device__ __forceinline__ static A lowest() { return -static_cast<A>(INFINITY); }

  __device__ __forceinline__ static int place(int channel, int row, int column) {
    if constexpr (kChannelsLast) {
      // Of wide numbers, a warp reads several strips at a time.
      const int swap = sizeof(T) > 2 ? column / kLine & 1 : 0;
      return (row * kColumns + (column ^ swap)) * kDepth + channel;
    } else {
      return channel * kPlane + row * kColumns + column;
    }
  }

  // The tile with what windows reach, and what of it is inside of the picture.
  struct Around {
    const T* from;
    int top;
    int bottom;
    int left;
    int right;

    __device__ __forceinline__ Around(const ResidualStageParams<T>& p,
                                      const ResidualTile<kChannelsLast>& tile)
        : from(p.x + tile.at(p, 0, opaque(tile.y) - kReach, tile.x - kSide)),
          top(kReach - tile.y),
          bottom(p.height - tile.y + kReach),
          left(kSide - tile.x),
          right(p.width - tile.x + kSide) {}
  };

  __device__ __forceinline__ void bring_vector(const Around& around, int32_t channel, int row,
                                               int column, T* to) const {
    const bool in_depth = channel < p_.depth;
    const bool in_rows = row >= around.top && row < around.bottom;
    const T* const from =
        around.from + (kChannelsLast ? (int64_t{row} * p_.width + column) * p_.depth + channel
                                     : (int64_t{channel} * p_.height + row) * p_.width + column);
    if (p_.x_vectors &&
        (!in_depth || (in_rows && column >= around.left && column < around.right))) {
      copy_async_16(to, in_depth ? from : p_.x, in_depth);
      return;
    }
    Vector<T, kVector> values;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const bool there = kChannelsLast ? channel + e < p_.depth : in_depth;
      const int own = kChannelsLast ? column : column + e;
      values[e] = !there ? from_accumulate<T>(0)
                  : in_rows && own >= around.left && own < around.right
                      ? from[e]
                      : from_accumulate<T>(lowest());
    }
    store_vector(to, values);
  }

  template <class Put>
  __device__ __forceinline__ void pool_strip(int32_t first, const T* from, int channel, int row,
                                             int column, const Put& put) const {
    if constexpr (kSize == 1) {
#pragma unroll
      for (int r = 0; r < kStripRows; ++r) {
        finish(first, channel, row + r, column, reduce(from, channel, row + r, column), put);
      }
    } else {
      // What the windows of two rows share is reduced once.
      Best upper[kStripRows / 2];
      Best common[kStripRows / 2];
#pragma unroll
      for (int i = 0; i < kStripRows + 2 * kReach; ++i) {
        const Best reduced = reduce(from, channel, row + i, column);
#pragma unroll
        for (int half = 0; half < kStripRows / 2; ++half) {
          const int in_window = i - 2 * half;  // of the upper row
          if (in_window == 0) {
            upper[half] = reduced;
          } else if (in_window == 1) {
            common[half] = reduced;
          } else if (in_window > 1 && in_window < kSize) {
            take(reduced, (in_window - 1) << portable::kPoolRowBits, common[half]);
          } else if (in_window == kSize) {
            take(common[half], portable::kPoolColumns, upper[half]);
            take(reduced, (in_window - 1) << portable::kPoolRowBits, common[half]);
            finish(first, channel, row + 2 * half, column, upper[half], put);
            finish(first, channel, row + 2 * half + 1, column, common[half], put);
          }
        }
      }
    }
  }

  // A row of the tile around the columns of a strip; two neighbours share all but their ends.
  __device__ __forceinline__ Best reduce(const T* from, int channel, int row, int column) const {
    A v[kSize + 1];
    const int first = column + kSide - kReach;
    // Pairs of neighbours; windows that reach an odd number of columns begin in the middle of one.
    constexpr int kStep = !kChannelsLast && kReach % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int j = 0; j <= kSize; j += kStep) {
      const auto pixels = load_vector<kStep>(from + place(channel, row, first + j));
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        v[j + e] = to_accumulate(pixels[e]);
      }
    }
    A common = v[1];
    int code = 0;
    Best best = {{v[0], A{}}, {0, 0}};
    if constexpr (kSize > 1) {
#pragma unroll
      for (int j = 2; j < kSize; ++j) {
        portable::take_later<kOffsets>(v[j], j - 1, common, code);
      }
      portable::take_later<kOffsets>(common, code + 1, best.best[0], best.code[0]);
      portable::take_later<kOffsets>(v[kSize], kSize - 1, common, code);
    }
    best.best[1] = common;
    best.code[1] = code;
    return best;
  }

  __device__ __forceinline__ static void take(const Best& later, int code, Best& best) {
#pragma unroll
    for (int j = 0; j < kStripColumns; ++j) {
      portable::take_later<kOffsets>(later.best[j], later.code[j] + code, best.best[j],
                                     best.code[j]);
    }
  }

  template <class Put>
  __device__ __forceinline__ void finish(int32_t first, int channel, int row, int column,
                                         const Best& best, const Put& put) const {
    Pooled pooled;
#pragma unroll
    for (int j = 0; j < kStripColumns; ++j) {
      pooled[j] = from_accumulate<T>(best.best[j]);
    }
    put(channel, row * kResidualColumns + column, pooled);
    // Blocks of other channels of the result pool the same.
    const bool wanted = p_.pooled != nullptr || (kOffsets && p_.offsets != nullptr);
    if (kSize > 1 && wanted && tile_.channel == 0) {
      write(first + channel, tile_.y + row, tile_.x + column, best, pooled);
    }
  }

  __device__ __forceinline__ void write(int32_t channel, int32_t y, int32_t x, const Best& best,
                                        const Pooled& pooled) const {
    if (channel >= p_.depth || y >= p_.height || x >= p_.width) {
      return;
    }
    const int64_t at = tile_.at(p_, channel, y, x);
    const bool values = p_.pooled != nullptr;
    const bool places = kOffsets && p_.offsets != nullptr;
    Vector<uint8_t, kStripColumns> codes = {};
    if constexpr (kOffsets) {
#pragma unroll
      for (int j = 0; j < kStripColumns; ++j) {
        // -inf alone: the first element of the picture in the window.
        const int first = max(kReach - y, 0) << portable::kPoolRowBits | max(kReach - (x + j), 0);
        codes[j] = static_cast<uint8_t>(best.best[j] == lowest() ? first : best.code[j]);
      }
    }
    if (!kChannelsLast && p_.result_vectors) {
      if (values) {
        store_global_vector(p_.pooled + at, pooled);
      }
      if (places) {
        store_global_vector(p_.offsets + at, codes);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kStripColumns; ++j) {
      if (x + j < p_.width) {
        const int64_t to = at + j * (kChannelsLast ? p_.depth : 1);
        if (values) {
          p_.pooled[to] = pooled[j];
        }
        if (places) {
          p_.offsets[to] = codes[j];
        }
      }
    }
  }

  const ResidualStageParams<T>& p_;
  ResidualTile<kChannelsLast> tile_;
};

}  // namespace pydense
