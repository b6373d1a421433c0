// SPDX-License-Identifier: Apache-2.0
// A task is a tile of pixels with all channels. Contiguous: the pool writes panels of pixels, and
// the weights are the rows that pass over them. channels_last: the pool writes pixels, which pass
// over panels of weights. The tile and the weights fit the second-level cache together.
#pragma once

#include "chained_residual_pool/residual_stage_tiles.h"
#include "common/stream_copy.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kTileBytes = 384 << 10;  // of pooled pixels
constexpr int64_t kMinTilePixels = 64;
constexpr int64_t kMinTiles = 4;
// Of a tile. Contiguous rows are long, for the sake of what is read once. With channels_last tiles
// are tall: fewer rows are reduced for two tiles, and a window of them is in the first-level cache;
// and results of a block of the product lie side by side.
constexpr int64_t kTileColumns = 128;
constexpr int64_t kTileColumnsLast = ceil_div(12, kGemmRows) * kGemmRows;
constexpr int64_t kUnit = 128;  // channels that are pooled together, channels_last

template <class S>
class Stage : StageTiles<S> {
  using Tiles = StageTiles<S>;
  using Tiles::args_;
  using Tiles::channels_;
  using Tiles::columns_;
  using Tiles::kSize;
  using Tiles::last_;
  using Tiles::picture;
  using Tiles::rows_;
  using T = ComputeOf<S>;
  using P = GemmOperandOf<S>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr bool kPairs = kGemmStep<P> == 2;
  static constexpr int kAhead = 3;

  // Whether the product reads pixels where they are.
  static bool reads_directly(const ResidualStageArgs& args) {
    return std::is_same_v<S, P> && args.shape.channels_last && args.shape.size == 1 &&
           args.shape.channels % kGemmStep<P> == 0 &&
           args.x.row == args.shape.width * args.shape.channels && args.pooled == nullptr;
  }
  static int64_t tile_pixels(const ResidualStageArgs& args) {
    const PoolShape& shape = args.shape;
    const int64_t size = kTileBytes / (shape.channels * static_cast<int64_t>(sizeof(P)));
    const int64_t part = shape.batches * shape.height * shape.width / kMinTiles;
    return larger(kMinTilePixels, smaller(size, part));
  }
  static int64_t tile_columns(const ResidualStageArgs& args) {
    if (reads_directly(args)) {
      return args.shape.width;
    }
    return args.shape.channels_last ? kTileColumnsLast : kTileColumns;
  }

 public:
  explicit Stage(const ResidualStageArgs& args)
      : Tiles(
            args,
            reads_directly(args) ? larger(args.shape.width, tile_pixels(args)) : tile_pixels(args),
            tile_columns(args)),
        direct_(reads_directly(args)),
        streams_(std::is_same_v<S, P> && args.pooled != nullptr && args.pooled_late &&
                 args.shape.size > 1 &&
                 args.shape.batches * args.shape.height * args.shape.width * args.shape.channels *
                         kSize >=
                     kStreamedBytes),
        depth_(gemm_depth<P>(channels_)) {
    const auto* const weight = static_cast<const S*>(args.weight);
    weights_ = buffer_of<P>(static_cast<size_t>(
        (last_ ? gemm_panels(channels_, kColumns) * kColumns : channels_) * depth_));
    const int64_t output = args.transposed ? 1 : channels_;  // from one to the next
    const int64_t input = args.transposed ? channels_ : 1;
    if (last_) {
      gemm_pack_columns(weight, input, output, channels_, channels_, weights_.as<P>());
    } else {
      gemm_pack_rows(weight, output, input, channels_, channels_, weights_.as<P>());
    }
    bias_ = buffer_of<T>(static_cast<size_t>(channels_));
    for (int64_t c = 0; c < channels_; ++c) {
      bias_.as<T>()[c] =
          args.bias == nullptr ? T{} : load_as<T>(static_cast<const S*>(args.bias) + c);
    }
  }

  void run(ParallelFor parallel_for) {
    const int64_t tasks = args_.shape.batches * this->across_ * this->down_;
    parallel_tasks(parallel_for, tasks, [&](int64_t task) {
      const int64_t image = this->image_of(task);
      const PoolTile tile = this->tile_of(task);
      LinesAhead ahead[kAhead];  // of what the next task reads, and of what its pool writes
      if (task + 1 < tasks) {
        ahead[0] = this->lines_of(task + 1);
        ahead[1] = this->result_lines_of(task + 1, args_.offsets, 1);
        ahead[2] = this->result_lines_of(task + 1, streams_ ? nullptr : args_.pooled, kSize);
      }
      const int64_t pixels = rows_ * columns_ + kColumns;
      const int64_t products = last_ ? 0 : kGemmRows * product_row(pixels);
      // Pairs: two planes of the tile besides.
      Buffer buffer = pool_.take(
          checked_bytes(static_cast<size_t>(products), sizeof(T)) +
          checked_bytes(static_cast<size_t>(pixels * (depth_ + (kPairs ? 2 : 0))), sizeof(P)));
      T* const product = buffer.as<T>();
      P* const pooled = reinterpret_cast<P*>(product + products);
      if (direct_) {
        const S* const from = picture(image, 0, 1).from + tile.top * args_.x.row;
        multiply_pixels(image, tile, reinterpret_cast<const P*>(from), ahead);
      } else if (last_) {
        pool_pixels(image, tile, pooled);
        multiply_pixels(image, tile, pooled, ahead);
      } else {
        if constexpr (kPairs) {
          pair_planes(image, tile, pooled, pooled + pixels * depth_);
        } else if (args_.shape.size > 1) {
          pool_planes(image, tile, pooled);
        } else {
          copy_planes(image, tile, pooled);
        }
        multiply_planes(image, tile, pooled, product, ahead);
      }
      pool_.give_back(std::move(buffer));
      if (streams_) {
        end_of_stream();
      }
    });
  }

 private:
  // `count` numbers of the pooled map, from there on.
  void save(const P* from, int64_t count, int64_t index) const {
    S* const to = static_cast<S*>(args_.pooled) + index;
    if constexpr (!std::is_same_v<S, P>) {
      finish<S, T>(from, nullptr, 0, nullptr, 0, 0, count, to);
    } else if (streams_) {
      stream_copy(to, from, count * kSize);
    } else {
      std::memcpy(to, from, static_cast<size_t>(count * kSize));
    }
  }

  // Pairs, contiguous: planes of two channels, pooled or as they are, become a row of pairs in
  // every panel.
  void pair_planes(int64_t image, const PoolTile& tile, P* pooled, P* planes) const {
    TilePool<S, P> pool(args_.shape.size, args_.offsets != nullptr, columns_, 1);
    const int64_t width = tile.right - tile.left;
    const int64_t pixels = (tile.bottom - tile.top) * width;
    const int64_t plane = gemm_panels(pixels, kColumns) * kColumns;
    std::memset(planes, 0, static_cast<size_t>(2 * plane * kSize));
    for (int64_t c = 0; c < depth_; c += 2) {
      for (int64_t own = c; own < c + 2; ++own) {
        P* const to = planes + (own - c) * plane;
        if (own == channels_) {
          std::memset(to, 0, static_cast<size_t>(pixels * kSize));
          continue;
        }
        this->prefetch_plane(picture(image, own + 1 < channels_ ? own + 1 : own, 1), tile);
        if (args_.shape.size > 1) {
          pool.run(picture(image, own, 1), tile, [&](int64_t y) {
            return PoolSink<P>{to + (y - tile.top) * width,
                               this->offsets_at(this->dense_index(image, own, y, tile.left)),
                               width,
                               0,
                               0,
                               0};
          });
        } else {
          const PoolPicture<S> from = picture(image, own, 1);
          this->copy_rows(tile.bottom - tile.top, width,
                          from.from + tile.top * from.row_stride + tile.left, from.row_stride, to,
                          width);
        }
        for (int64_t y = tile.top; args_.pooled != nullptr && y < tile.bottom; ++y) {
          save(to + (y - tile.top) * width, width, this->dense_index(image, own, y, tile.left));
        }
      }
      for (int64_t p = 0; p < plane; p += kColumns) {
        gemm_pair_rows(planes + p, planes + plane + p, pooled + p * depth_ + c * kColumns);
      }
    }
  }

  // Nothing is pooled.
  void copy_planes(int64_t image, const PoolTile& tile, T* pooled) const {
    using V = Vec<T, kNativeLanesOf<T>>;
    const int64_t width = tile.right - tile.left;
    const int64_t pixels = (tile.bottom - tile.top) * width;
    for (int64_t c = 0; c < channels_; ++c) {
      const PoolPicture<S> plane = picture(image, c, 1);
      T* const to = pooled + c * kColumns;
      Tiles::for_pieces(tile, 0, pixels, [&](int64_t p, int64_t y, int64_t x, int64_t count) {
        const S* const from = plane.from + y * plane.row_stride + x;
        for (int64_t i = 0; i < count;) {
          const int64_t at = p + i;
          T* const segment = to + at / kColumns * kColumns * channels_ + at % kColumns;
          const int64_t part = smaller(count - i, kColumns - at % kColumns);
          if (part == kColumns) {
            store(segment, load_as<V>(from + i));
            store(segment + kLanesIn<V>, load_as<V>(from + i + kLanesIn<V>));
          } else {
            for (int64_t j = 0; j < part; ++j) {
              segment[j] = load_as<T>(from + i + j);
            }
          }
          i += part;
        }
      });
      clear_behind(to, pixels);
      if (args_.pooled != nullptr) {
        this->copy_rows(
            tile.bottom - tile.top, width, plane.from + tile.top * plane.row_stride + tile.left,
            plane.row_stride,
            static_cast<S*>(args_.pooled) + this->dense_index(image, c, tile.top, tile.left),
            args_.shape.width);
      }
    }
  }

  // Of a last panel that is not full.
  void clear_behind(T* to, int64_t pixels) const {
    for (int64_t p = pixels; p % kColumns != 0; ++p) {
      to[p / kColumns * kColumns * channels_ + p % kColumns] = 0;
    }
  }

  // Contiguous: pixel p of the tile is column p % kColumns of panel p / kColumns.
  void pool_planes(int64_t image, const PoolTile& tile, T* pooled) const {
    TilePool<S, T> pool(args_.shape.size, args_.offsets != nullptr, columns_, 1);
    const int64_t width = tile.right - tile.left;
    const int64_t pixels = (tile.bottom - tile.top) * width;
    const int64_t panel = channels_ * kColumns;
    for (int64_t c = 0; c < channels_; ++c) {
      this->prefetch_plane(picture(image, c + 1 < channels_ ? c + 1 : c, 1), tile);
      pool.run(picture(image, c, 1), tile, [&](int64_t y) {
        const int64_t p = (y - tile.top) * width;
        return PoolSink<T>{pooled + p / kColumns * panel + c * kColumns + p % kColumns,
                           this->offsets_at(this->dense_index(image, c, y, tile.left)),
                           kColumns,
                           p % kColumns,
                           panel,
                           kColumns};
      });
      clear_behind(pooled + c * kColumns, pixels);
    }
    if (args_.pooled == nullptr) {
      return;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      Tiles::for_pieces(tile, 0, pixels, [&](int64_t p, int64_t y, int64_t x, int64_t count) {
        for (int64_t done = 0; done < count;) {  // a row of the tile lies in several panels
          const int64_t at = p + done;
          const int64_t part = smaller(count - done, kColumns - at % kColumns);
          save(pooled + at / kColumns * panel + c * kColumns + at % kColumns, part,
               this->dense_index(image, c, y, x + done));
          done += part;
        }
      });
    }
  }

  // The product of a panel of weights and the whole tile is kept: so few rows of addends are read
  // at a time, and long ones. Planes often lie a power of 2 apart, where caches hold few.
  void multiply_planes(int64_t image, const PoolTile& tile, const P* pooled, T* product,
                       LinesAhead* ahead) const {
    const int64_t pixels = (tile.bottom - tile.top) * (tile.right - tile.left);
    const int64_t row = product_row(pixels);
    const int64_t blocks = ceil_div(pixels, kColumns) * ceil_div(channels_, kGemmRows);
    int64_t lines[kAhead];
    for (int i = 0; i < kAhead; ++i) {
      lines[i] = ceil_div(ahead[i].lines(), blocks);
    }
    const S* addends[kMaxResidualStages];
    GemmAhead asked;
    for (int64_t c = 0; c < channels_; c += kGemmRows) {
      const int64_t rows = smaller(kGemmRows, channels_ - c);
      for (int64_t p = 0; p < pixels; p += kColumns) {
        asked.clear();
        Tiles::for_pieces(tile, p, smaller(p + kColumns, pixels),
                          [&](int64_t /*pixel*/, int64_t y, int64_t x, int64_t count) {
                            for (int64_t i = 0; i < rows; ++i) {
                              this->ask_for_results(image, c + i, y, x, count, asked);
                            }
                          });
        for (int i = 0; i < kAhead; ++i) {
          ahead[i].next(lines[i], [&](const void* line) { asked.add(line); });
        }
        gemm_rows<P, true>(rows, depth_, weights_.as<P>() + c * depth_, 0, pooled + p * depth_,
                           product + p, row, false, &asked);
      }
      for (int64_t i = 0; i < rows; ++i) {
        Tiles::for_pieces(tile, 0, pixels, [&](int64_t p, int64_t y, int64_t x, int64_t count) {
          this->find_addends(image, c + i, y, x, addends);
          finish<S, T>(product + i * row + p, nullptr, bias_.as<T>()[c + i], addends,
                       args_.num_addends, 0, count,
                       static_cast<S*>(args_.out) + this->dense_index(image, c + i, y, x));
        });
      }
    }
  }
  // Of a panel's product; no power of 2 either.
  static int64_t product_row(int64_t pixels) {
    return (pixels / kColumns + 1) * kColumns + kColumns / 2;
  }

  // channels_last: the channels of a pixel lie together, depth_ numbers from those of the next.
  void pool_pixels(int64_t image, const PoolTile& tile, P* pooled) const {
    const int64_t unit = smaller(kUnit, channels_);
    TilePool<S, P> pool(args_.shape.size, args_.offsets != nullptr, columns_, unit);
    const int64_t width = tile.right - tile.left;
    for (int64_t c = 0; c < channels_; c += unit) {
      const int64_t part = smaller(unit, channels_ - c);
      pool.run(picture(image, c, part), tile, [&](int64_t y) {
        return PoolSink<P>{pooled + (y - tile.top) * width * depth_ + c,
                           this->offsets_at(this->dense_index(image, c, y, tile.left)),
                           part,
                           0,
                           depth_,
                           channels_};
      });
    }
    const int64_t pixels = (tile.bottom - tile.top) * width;
    for (int64_t p = 0; depth_ > channels_ && p < pixels; ++p) {
      pooled[p * depth_ + channels_] = P{};
    }
    if (args_.pooled == nullptr) {
      return;
    }
    Tiles::for_pieces(tile, 0, pixels, [&](int64_t p, int64_t y, int64_t x, int64_t count) {
      const int64_t at_once = depth_ == channels_ ? count : 1;  // pixels
      for (int64_t i = 0; i < count; i += at_once) {
        save(pooled + (p + i) * depth_, at_once * channels_, this->dense_index(image, 0, y, x + i));
      }
    });
  }

  void multiply_pixels(int64_t image, const PoolTile& tile, const P* pooled,
                       LinesAhead* ahead) const {
    const int64_t pixels = (tile.bottom - tile.top) * (tile.right - tile.left);
    const int64_t blocks = ceil_div(pixels, kGemmRows) * ceil_div(channels_, kColumns);
    int64_t lines[kAhead];
    for (int i = 0; i < kAhead; ++i) {
      lines[i] = ceil_div(ahead[i].lines(), blocks);
    }
    const int num_addends = args_.num_addends;
    // Products that are results go straight to memory, where their pixels lie side by side.
    const bool straight = num_addends == 0 && args_.bias == nullptr;
    T block[kGemmRows * kColumns];
    const S* addends[kGemmRows * kMaxResidualStages];
    S* outs[kGemmRows];
    GemmAhead asked;
    for (int64_t p = 0; p < pixels; p += kGemmRows) {
      const int64_t rows = smaller(kGemmRows, pixels - p);
      Tiles::for_pieces(tile, p, p + rows, [&](int64_t at, int64_t y, int64_t x, int64_t count) {
        for (int64_t i = at - p; i < at - p + count; ++i, ++x) {
          this->find_addends(image, 0, y, x, addends + i * num_addends);
          outs[i] = static_cast<S*>(args_.out) + this->dense_index(image, 0, y, x);
        }
      });
      for (int64_t c = 0; c < channels_; c += kColumns) {
        const int64_t count = smaller(kColumns, channels_ - c);
        asked.clear();
        for (int64_t i = 0; i < rows; ++i) {
          for (int k = 0; k < num_addends; ++k) {
            asked.add(addends[i * num_addends + k] + c, count * kSize);
          }
          asked.add(outs[i] + c, count * kSize);
        }
        for (int i = 0; i < kAhead; ++i) {
          ahead[i].next(lines[i], [&](const void* line) { asked.add(line); });
        }
        if constexpr (std::is_same_v<S, T>) {
          if (straight && count == kColumns && outs[rows - 1] == outs[0] + (rows - 1) * channels_) {
            gemm_rows<P, false>(rows, depth_, pooled + p * depth_, depth_,
                                weights_.as<P>() + c * depth_, outs[0] + c, channels_, false,
                                &asked);
            continue;
          }
        }
        gemm_rows<P, false>(rows, depth_, pooled + p * depth_, depth_,
                            weights_.as<P>() + c * depth_, block, kColumns, false, &asked);
        for (int64_t i = 0; i < rows; ++i) {
          finish<S, T>(block + i * kColumns, bias_.as<T>() + c, 0, addends + i * num_addends,
                       num_addends, c, count, outs[i] + c);
        }
      }
    }
  }

  bool direct_;
  bool streams_;   // the pooled map past the caches
  int64_t depth_;  // channels, up to whole steps of the product
  Buffer weights_;
  Buffer bias_;
  BufferPool pool_;
};

}  // namespace pydense::PYDENSE_ISA
