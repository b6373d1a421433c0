// SPDX-License-Identifier: Apache-2.0
// Max pooling forward, and backward as a gather in two steps: what the windows of each column give
// to a row, then what the columns around a pixel give to it. Both follow the order in which forward
// found the maxima, and a sum has one order.
#include "chained_residual_pool/max_pool_tile.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kTileElements = 2048;  // of a row at work
constexpr int64_t kMaxUnit = 256;        // channels of a channels_last tile
constexpr int64_t kTaskElements = 65536;
constexpr int64_t kTaskRows = 32;  // at least: every task reduces the rows around it again

// How the work is cut: an image into groups of channels that lie side by side, those into bands of
// rows, those into tiles of columns.
class Cut {
 public:
  explicit Cut(const PoolShape& shape)
      : shape_(shape),
        unit_(shape.channels_last ? smaller(kMaxUnit, shape.channels) : 1),
        groups_(ceil_div(shape.channels, unit_)) {
    const int64_t row = shape.width * unit_;
    bands_ = larger(1, shape.height / larger(kTaskRows, ceil_div(kTaskElements, row)));
    together_ = bands_ > 1 ? 1 : larger(1, kTaskElements / (shape.height * row));
    columns_ = ceil_div(shape.width, ceil_div(row, kTileElements));
  }

  int64_t unit() const { return unit_; }
  int64_t columns() const { return columns_; }
  int64_t tasks() const { return ceil_div(shape_.batches * groups_, together_) * bands_; }

  // Calls fn(image, first channel, channels, tile) for the tiles of a task.
  template <class Fn>
  void run(int64_t task, const Fn& fn) const {
    const int64_t band = task % bands_;
    const int64_t first = task / bands_ * together_;
    const int64_t end = smaller(first + together_, shape_.batches * groups_);
    for (int64_t i = first; i < end; ++i) {
      const int64_t channel = i % groups_ * unit_;
      const int64_t channels = smaller(unit_, shape_.channels - channel);
      for (int64_t x = 0; x < shape_.width; x += columns_) {
        fn(i / groups_, channel, channels,
           PoolTile{shape_.height * band / bands_, shape_.height * (band + 1) / bands_, x,
                    smaller(x + columns_, shape_.width)});
      }
    }
  }

 private:
  const PoolShape& shape_;
  int64_t unit_;
  int64_t groups_;
  int64_t bands_;
  int64_t together_;  // groups of channels in a task
  int64_t columns_;
};

// Elements of a dense picture before (image, channel, y, x).
int64_t dense_index(const PoolShape& shape, int64_t image, int64_t channel, int64_t y, int64_t x) {
  return shape.channels_last
             ? ((image * shape.height + y) * shape.width + x) * shape.channels + channel
             : ((image * shape.channels + channel) * shape.height + y) * shape.width + x;
}

template <class S>
PoolPicture<S> picture_of(const PoolShape& shape, const PoolSource& source, int64_t image,
                          int64_t channel, int64_t channels) {
  const auto* const data = static_cast<const S*>(source.data);
  return {data + image * source.batch + channel * (shape.channels_last ? 1 : source.channel),
          source.row,
          shape.channels_last ? shape.channels : 1,
          shape.height,
          shape.width,
          channels};
}

template <class S>
void forward(const MaxPoolArgs& args, ParallelFor parallel_for) {
  const PoolShape& shape = args.shape;
  const Cut cut(shape);
  const int64_t pixel = shape.channels_last ? shape.channels : 1;
  parallel_tasks(parallel_for, cut.tasks(), [&](int64_t task) {
    TilePool<S, S> pool(shape.size, args.offsets != nullptr, cut.columns(), cut.unit());
    cut.run(task, [&](int64_t image, int64_t channel, int64_t channels, const PoolTile& tile) {
      const int64_t count = (tile.right - tile.left) * channels;
      pool.run(picture_of<S>(shape, args.x, image, channel, channels), tile, [&](int64_t y) {
        const int64_t at = dense_index(shape, image, channel, y, tile.left);
        return PoolSink<S>{static_cast<S*>(args.out) + at,
                           args.offsets == nullptr ? nullptr : args.offsets + at,
                           channels == pixel ? count : channels,
                           0,
                           pixel,
                           pixel};
      });
    });
  });
}

template <class S>
class Backward {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;
  static constexpr IntOf<T> kNowhere = 255;
  static constexpr int kSlots = 16;

  struct Rows {
    const T* grad[kMaxPoolSize];
    const uint8_t* offsets[kMaxPoolSize];
    int count;
    int first;  // what the offsets of the first one to this row begin with
  };

 public:
  Backward(const MaxPoolBackwardArgs& args, int64_t columns, int64_t unit)
      : args_(args),
        reach_(args.shape.size / 2),
        pixel_(args.shape.channels_last ? args.shape.channels : 1) {
    const int64_t row = (columns + 2 * reach_) * unit + int64_t{2} * kLanes;
    buffer_ = buffer_of<T>(static_cast<size_t>(2 * row + kSlots * row * 2));
    sum_ = buffer_.as<T>();
    column_ = reinterpret_cast<IntOf<T>*>(sum_ + row);
    for (int j = 0; j < kSlots; ++j) {
      staged_grad_[j] = sum_ + (2 + j) * row;
      staged_offsets_[j] = reinterpret_cast<uint8_t*>(sum_ + (2 + kSlots) * row) + j * row;
    }
  }

  void run(int64_t image, int64_t channel, int64_t channels, const PoolTile& tile) {
    const PoolShape& shape = args_.shape;
    const PoolPicture<S> grad = picture_of<S>(shape, args_.grad, image, channel, channels);
    const uint8_t* const offsets = args_.offsets + dense_index(shape, image, channel, 0, 0);
    const int64_t first = larger(0, tile.left - reach_);
    const int64_t end = smaller(shape.width, tile.right + reach_);
    const int64_t count = (end - first) * channels;
    const int64_t before = (first - (tile.left - reach_)) * channels;
    nowhere(0, before);
    nowhere(before + count, (tile.right + reach_ - end) * channels);
    int64_t next = larger(0, tile.top - reach_);
    for (int64_t y = tile.top; y < tile.bottom; ++y) {
      Rows rows;
      const int64_t above = larger(0, y - reach_);
      const int64_t below = smaller(shape.height, y + reach_ + 1);
      for (; next < below; ++next) {
        stage(grad, offsets, next, first, end - first);
      }
      rows.count = static_cast<int>(below - above);
      rows.first = static_cast<int>(y - above + reach_);
      for (int j = 0; j < rows.count; ++j) {
        const int slot = static_cast<int>((above + j) % kSlots);
        rows.grad[j] = grad_[slot];
        rows.offsets[j] = offsets_[slot];
      }
      if (rows.count == 5) {
        gather_rows<5>(rows, count, before);
      } else {
        gather_rows<0>(rows, count, before);
      }
      const int64_t at = dense_index(shape, image, channel, y, tile.left);
      const int64_t elements = (tile.right - tile.left) * channels;
      if (shape.size != 5) {
        gather_columns<0, false>(at, channels, elements);
      } else if (channels == 1) {
        gather_columns<5, kShifts<T>>(at, channels, elements);
      } else {
        gather_columns<5, false>(at, channels, elements);
      }
    }
  }

 private:
  void nowhere(int64_t at, int64_t count) {
    for (int64_t i = at; i < at + count; ++i) {
      sum_[i] = 0;
      column_[i] = kNowhere;
    }
  }

  // Row y of the gradient and of the offsets as dense rows: where they are, or copied.
  void stage(const PoolPicture<S>& grad, const uint8_t* offsets, int64_t y, int64_t first,
             int64_t columns) {
    const int slot = static_cast<int>(y % kSlots);
    const int64_t unit = grad.unit;
    const S* const from = grad.from + y * grad.row_stride + first * pixel_;
    const uint8_t* const codes = offsets + (y * grad.width + first) * pixel_;
    if (unit == pixel_) {
      offsets_[slot] = codes;
    } else {
      for (int64_t x = 0; x < columns; ++x) {
        prefetch(codes + x * pixel_ + grad.width * pixel_, unit);
        copy_bytes(codes + x * pixel_, unit, staged_offsets_[slot] + x * unit);
      }
      offsets_[slot] = staged_offsets_[slot];
    }
    if constexpr (std::is_same_v<S, T>) {
      if (unit == pixel_) {
        grad_[slot] = from;
        return;
      }
    }
    const bool together = unit == pixel_;
    for (int64_t x = 0; x < (together ? 1 : columns); ++x) {
      prefetch(from + x * pixel_ + grad.row_stride, together ? 0 : unit);
      copy(from + x * pixel_, together ? columns * unit : unit, staged_grad_[slot] + x * unit);
    }
    grad_[slot] = staged_grad_[slot];
  }

  // Inline: a call for a handful of bytes costs more than they do.
  static void copy_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
    using Bytes = Vec<uint8_t, 16>;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      store(to + i, load<Bytes>(from + i));
    }
    for (; i < count; ++i) {
      to[i] = from[i];
    }
  }

  static void copy(const S* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(to + i, load_as<V>(from + i));
    }
    if (i < count) {
      store(to + i, load_part<V>(from + i, count - i));
    }
  }

  // sum_: what the windows of the columns in and around the tile give to a row. column_: to which
  // column of the window, kNowhere where there is none.
  template <int K>
  [[gnu::noinline]] void gather_rows(const Rows& rows, int64_t count, int64_t at) {
    const int num_rows = K > 0 ? K : rows.count;
    int64_t e = 0;
    const auto gather = [&](const auto& load_grad, const auto& load_offsets) {
      V sum{};
      I column = I{} + kNowhere;
#pragma GCC unroll 5
      for (int j = 0; j < num_rows; ++j) {
        // Of offsets to this row only the column is left, below 16.
        const I code = load_offsets(rows.offsets[j] + e) ^ ((rows.first - j) << 4);
        const I mine = code < 16;
        sum = mine ? sum + load_grad(rows.grad[j] + e) : sum;
        column = mine ? code : column;
      }
      store(sum_ + at + e, sum);
      store(column_ + at + e, column);
    };
    for (; e + kLanes <= count; e += kLanes) {
      gather([](const T* p) { return load<V>(p); },
             [](const uint8_t* p) { return load_bytes<I>(p); });
    }
    if (e < count) {
      const int64_t left = count - e;
      T saved_sum[kLanes];
      IntOf<T> saved_column[kLanes];
      // The padding behind the row stays.
      std::memcpy(saved_sum, sum_ + at + count, sizeof saved_sum);
      std::memcpy(saved_column, column_ + at + count, sizeof saved_column);
      gather([&](const T* p) { return load_part<V>(p, left); },
             [&](const uint8_t* p) {
               uint8_t bytes[kLanes] = {};
               std::memcpy(bytes, p, static_cast<size_t>(left));
               return load_bytes<I>(bytes);
             });
      std::memcpy(sum_ + at + count, saved_sum, sizeof saved_sum);
      std::memcpy(column_ + at + count, saved_column, sizeof saved_column);
    }
  }

  template <int K, bool Shifted>
  [[gnu::noinline]] void gather_columns(int64_t at, int64_t channels, int64_t count) {
    const int size = K > 0 ? K : args_.shape.size;
    const int64_t part = channels == pixel_ ? count : channels;
    S* to = static_cast<S*>(args_.result) + at;
    const S* addend = args_.addend == nullptr ? nullptr : static_cast<const S*>(args_.addend) + at;
    for (int64_t begin = 0; begin < count; begin += part) {
      for (int64_t e = 0; e < part; e += kLanes) {
        V near[kMaxPoolSize];
        V sum{};
        for_columns<K, Shifted, V>(sum_ + begin + e, channels, size,
                                   [&](int j, const V& v) { near[j] = v; });
        for_columns<K, Shifted, I>(
            column_ + begin + e, channels, size,
            [&](int j, const I& column) { sum = column == size - 1 - j ? sum + near[j] : sum; });
        if (e + kLanes <= part) {
          store_as(to + e, addend == nullptr ? sum : sum + load_as<V>(addend + e));
        } else {
          const int64_t left = part - e;
          store_part(to + e, addend == nullptr ? sum : sum + load_part<V>(addend + e, left), left);
        }
      }
      to += pixel_;
      addend = addend == nullptr ? nullptr : addend + pixel_;
    }
  }

  const MaxPoolBackwardArgs& args_;
  int64_t reach_;
  int64_t pixel_;  // elements from pixel to pixel
  Buffer buffer_;
  T* sum_;
  IntOf<T>* column_;
  T* staged_grad_[kSlots];
  uint8_t* staged_offsets_[kSlots];
  const T* grad_[kSlots];
  const uint8_t* offsets_[kSlots];
};

template <class S>
void backward(const MaxPoolBackwardArgs& args, ParallelFor parallel_for) {
  const Cut cut(args.shape);
  parallel_tasks(parallel_for, cut.tasks(), [&](int64_t task) {
    Backward<S> work(args, cut.columns(), cut.unit());
    cut.run(task, [&](int64_t image, int64_t channel, int64_t channels, const PoolTile& tile) {
      work.run(image, channel, channels, tile);
    });
  });
}

}  // namespace

extern const MaxPoolTable kMaxPoolTable;
const MaxPoolTable kMaxPoolTable = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Half>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Half>}};

}  // namespace pydense::PYDENSE_ISA
