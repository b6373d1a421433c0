// SPDX-License-Identifier: Apache-2.0
// Forward: rows of the inputs are spread horizontally once each, into a pair of rows that stays in
// the first-level cache, and every row of the output is a sum of such rows. Memory sees each input
// once and each output once.
#include <memory>
#include <type_traits>

#include "common/simd.h"
#include "upsample/upsample_cpu.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kTileElements = 2048;  // of a row at work
constexpr int64_t kTaskElements = 65536;
constexpr int64_t kTaskRows = 32;  // at least: every task spreads its first rows by itself

// Columns [x, x + lanes) of the output are columns of two vectors of the input.
struct Block {
  int32_t x;
  int32_t base0;
  int32_t base1;
  bool narrow;  // each within one vector
};

// The columns [begin, end) of the output that are done in one go.
struct Tile {
  int64_t begin;
  int64_t end;
};

template <class T>
class Spread {
 public:
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;

  // The table of one tile.
  Spread(const AxisTable<T>& x, const Tile& tile, bool with_blocks)
      : x_(x),
        tile_(tile),
        begin_(smaller(larger(tile.begin, x.begin), tile.end)),
        end_(larger(smaller(tile.end, x.end), begin_)),
        first_(begin_ < end_ ? x.i0[begin_] : 0),
        count_(begin_ < end_ ? x.i1[end_ - 1] - first_ + 1 : 0) {
    if (!with_blocks || end_ - begin_ < kLanes) {
      return;
    }
    num_blocks_ = ceil_div(end_ - begin_, kLanes);
    blocks_buffer_ = buffer_of<Block>(static_cast<size_t>(num_blocks_));
    index_buffer_ = buffer_of<IntOf<T>>(static_cast<size_t>(2 * num_blocks_ * kLanes));
    for (int64_t b = 0; b < num_blocks_; ++b) {
      // The last one overlaps the one before.
      const int64_t at = smaller(begin_ + b * kLanes, end_ - kLanes);
      Block& block = blocks()[b];
      block = {static_cast<int32_t>(at), x.i0[at], x.i1[at], true};
      for (int l = 0; l < kLanes; ++l) {
        const int32_t lane0 = x.i0[at + l] - block.base0;
        const int32_t lane1 = x.i1[at + l] - block.base1;
        block.narrow = block.narrow && lane0 < kLanes && lane1 < kLanes;
        index()[2 * b * kLanes + l] = lane0;
        index()[(2 * b + 1) * kLanes + l] = lane1;
      }
    }
  }

  // What is needed of a row of the input.
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }

  // to[x - tile.begin] for one channel; `from` starts at column first() and has kLanes columns more
  // than count(). Columns that no input reaches are not touched.
  void row(const T* from, T* to) const {
    from -= first_;
    to -= tile_.begin;
    if (num_blocks_ == 0) {
      return columns(from, to, begin_, end_);
    }
    const IntOf<T>* lanes = index();
    for (int64_t b = 0; b < num_blocks_; ++b, lanes += 2 * kLanes) {
      const Block& block = blocks()[b];
      if (!block.narrow) [[unlikely]] {
        columns(from, to, block.x, block.x + kLanes);
        continue;
      }
      const V left = permute(load<V>(from + block.base0), load<I>(lanes));
      const V right = permute(load<V>(from + block.base1), load<I>(lanes + kLanes));
      store(to + block.x, fma(load<V>(x_.w1 + block.x), right, load<V>(x_.w0 + block.x) * left));
    }
  }

  // The same for pixels of `channels` each; below kLanes channels `from` and `to` have kLanes
  // elements to spare.
  void pixels(const T* from, T* to, int64_t channels) const {
    from -= first_ * channels;
    to -= tile_.begin * channels;
    const int64_t last = channels - kLanes;
    for (int64_t x = begin_; x < end_; ++x) {
      const T* const a = from + x_.i0[x] * channels;
      const T* const b = from + x_.i1[x] * channels;
      T* const out = to + x * channels;
      const V w0 = broadcast<V>(x_.w0[x]);
      const V w1 = broadcast<V>(x_.w1[x]);
      int64_t c = 0;
      for (; c < last; c += kLanes) {
        store(out + c, fma(w1, load<V>(b + c), w0 * load<V>(a + c)));
      }
      c = last > 0 ? last : 0;
      store(out + c, fma(w1, load<V>(b + c), w0 * load<V>(a + c)));
    }
    if (last < 0 && end_ < tile_.end) {  // what the last pixel wrote too much
      std::memset(to + end_ * channels, 0, kLanes * sizeof(T));
    }
  }

 private:
  void columns(const T* from, T* to, int64_t begin, int64_t end) const {
    for (int64_t x = begin; x < end; ++x) {
      to[x] = fma(x_.w1[x], from[x_.i1[x]], x_.w0[x] * from[x_.i0[x]]);
    }
  }
  Block* blocks() const { return blocks_buffer_.as<Block>(); }
  IntOf<T>* index() const { return index_buffer_.as<IntOf<T>>(); }

  const AxisTable<T>& x_;
  Tile tile_;
  int64_t begin_;  // of the columns that inputs reach
  int64_t end_;
  int64_t first_;
  int64_t count_;
  int64_t num_blocks_ = 0;
  Buffer blocks_buffer_;
  Buffer index_buffer_;
};

template <class T>
struct Pair {
  const T* a;
  const T* b;
  T w0;
  T w1;
};

// What a row of the output is the sum of.
template <class S>
struct Terms {
  using T = ComputeOf<S>;
  const S* same[kMaxUpsampleInputs];
  Pair<T> pairs[kMaxUpsampleInputs];
  int num_same;
  int num_pairs;
};

template <class V, class S>
PYDENSE_HD V blend(const Terms<S>& terms, int64_t e, bool relu) {
  using T = ComputeOf<S>;
  V sum{};
  for (int k = 0; k < terms.num_same; ++k) {
    const V own = load_as<V>(terms.same[k] + e);
    sum = k == 0 ? own : sum + own;
  }
  for (int k = 0; k < terms.num_pairs; ++k) {
    const Pair<T>& pair = terms.pairs[k];
    const V up = fma(broadcast<V>(pair.w1), load<V>(pair.b + e),
                     broadcast<V>(pair.w0) * load<V>(pair.a + e));
    sum = k + terms.num_same == 0 ? up : sum + up;
  }
  return relu ? (sum < 0 ? V{} : sum) : sum;  // NaN stays
}

template <class S>
void blend_row(const Terms<S>& terms, S* to, int64_t elements, bool relu) {
  using T = ComputeOf<S>;
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  int64_t e = 0;
  if (terms.num_same == 0 && terms.num_pairs == 1 && !relu) {
    const Pair<T> pair = terms.pairs[0];
    const V w0 = broadcast<V>(pair.w0);
    const V w1 = broadcast<V>(pair.w1);
    for (; e + kLanes <= elements; e += kLanes) {
      store_as(to + e, fma(w1, load<V>(pair.b + e), w0 * load<V>(pair.a + e)));
    }
  } else {
    for (; e + kLanes <= elements; e += kLanes) {
      store_as(to + e, blend<V>(terms, e, relu));
    }
  }
  if (e < elements && elements >= kLanes) {  // the last vector overlaps
    e = elements - kLanes;
    return store_as(to + e, blend<V>(terms, e, relu));
  }
  for (; e < elements; ++e) {
    store_as(to + e, blend<T>(terms, e, relu));
  }
}

template <class S>
class Forward {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;

  struct Input {
    const UpsampleInput* from;
    AxisTable<T> y;
    AxisTable<T> x;
    std::unique_ptr<std::unique_ptr<Spread<T>>[]> tiles;
    int64_t staged;  // elements of a row of the input that a tile needs, at most
  };

 public:
  explicit Forward(const UpsampleArgs& args)
      : args_(args),
        unit_(args.shape.channels_last ? args.shape.channels : 1),
        num_tiles_(smaller(args.shape.width, ceil_div(args.shape.width * unit_, kTileElements))),
        tile_elements_(ceil_div(args.shape.width, num_tiles_) * unit_) {
    for (int k = 0; k < args.num_inputs; ++k) {
      Input& input = inputs_[k];
      input.from = args.inputs + k;
      if (input.from->same_size) {
        continue;
      }
      input.y = AxisTable<T>(input.from->y);
      input.x = AxisTable<T>(input.from->x);
      input.tiles = std::make_unique<std::unique_ptr<Spread<T>>[]>(static_cast<size_t>(num_tiles_));
      for (int64_t t = 0; t < num_tiles_; ++t) {
        auto spread = std::make_unique<Spread<T>>(input.x, tile(t), unit_ == 1);
        input.staged = larger(input.staged, spread->count() * unit_ + kLanes);
        input.tiles[static_cast<size_t>(t)] = std::move(spread);
      }
    }
  }

  void run(ParallelFor parallel_for) const {
    const UpsampleShape& shape = args_.shape;
    const int64_t planes = shape.batches * (shape.channels_last ? 1 : shape.channels);
    const int64_t row = shape.width * unit_;
    const int64_t rows = larger(kTaskRows, ceil_div(kTaskElements, row));
    const int64_t bands = larger(int64_t{1}, shape.height / rows);
    const int64_t group = bands > 1 ? 1 : larger(int64_t{1}, kTaskElements / (shape.height * row));
    parallel_tasks(parallel_for, ceil_div(planes, group) * bands, [&](int64_t task) {
      const int64_t band = task % bands;
      const int64_t plane = task / bands * group;
      run_band(plane, smaller(plane + group, planes), shape.height * band / bands,
               shape.height * (band + 1) / bands);
    });
  }

 private:
  // Rows that are spread: two of each input, by the parity of their number.
  struct Rows {
    T* row[2];
    int64_t number[2];
  };

  Tile tile(int64_t t) const {
    return {args_.shape.width * t / num_tiles_, args_.shape.width * (t + 1) / num_tiles_};
  }

  void run_band(int64_t first_plane, int64_t end_plane, int64_t first_row, int64_t end_row) const {
    const int64_t length = tile_elements_ + kLanes;
    int64_t staged = 0;
    for (int k = 0; k < args_.num_inputs; ++k) {
      staged = larger(staged, inputs_[k].staged);
    }
    const Buffer buffer = buffer_of<T>(static_cast<size_t>(2 * args_.num_inputs * length + staged));
    Rows rows[kMaxUpsampleInputs];
    for (int k = 0; k < args_.num_inputs; ++k) {
      for (int i = 0; i < 2; ++i) {
        rows[k].row[i] = buffer.as<T>() + (2 * k + i) * length;
      }
    }
    T* const stage = buffer.as<T>() + 2 * args_.num_inputs * length;
    for (int64_t t = 0; t < num_tiles_; ++t) {
      // Columns that no input reaches are 0 and stay so.
      std::memset(buffer.data(), 0, static_cast<size_t>(2 * args_.num_inputs * length) * sizeof(T));
      for (int64_t plane = first_plane; plane < end_plane; ++plane) {
        for (int k = 0; k < args_.num_inputs; ++k) {
          rows[k].number[0] = rows[k].number[1] = -1;
        }
        for (int64_t y = first_row; y < end_row; ++y) {
          run_row(plane, y, t, rows, stage);
        }
      }
    }
  }

  void run_row(int64_t plane, int64_t y, int64_t t, Rows* rows, T* stage) const {
    const UpsampleShape& shape = args_.shape;
    Terms<S> terms;
    terms.num_same = terms.num_pairs = 0;
    const Tile columns = tile(t);
    for (int k = 0; k < args_.num_inputs; ++k) {
      const Input& input = inputs_[k];
      const S* const from = plane_of(*input.from, plane);
      if (input.from->same_size) {
        terms.same[terms.num_same++] = from + y * input.from->strides.row + columns.begin * unit_;
        continue;
      }
      if (y < input.y.begin || y >= input.y.end) {
        continue;
      }
      const int64_t i0 = input.y.i0[y];
      const int64_t i1 = input.y.i1[y];
      for (const int64_t i : {i0, i1}) {
        if (rows[k].number[i & 1] != i) {
          rows[k].number[i & 1] = i;
          spread(input, from + i * input.from->strides.row, t, stage, rows[k].row[i & 1]);
        }
      }
      terms.pairs[terms.num_pairs++] = {rows[k].row[i0 & 1], rows[k].row[i1 & 1], input.y.w0[y],
                                        input.y.w1[y]};
    }
    S* const out = static_cast<S*>(args_.out) +
                   ((plane * shape.height + y) * shape.width + columns.begin) * unit_;
    blend_row(terms, out, (columns.end - columns.begin) * unit_, args_.relu);
  }

  const S* plane_of(const UpsampleInput& input, int64_t plane) const {
    const auto* const data = static_cast<const S*>(input.data);
    if (args_.shape.channels_last) {
      return data + plane * input.strides.batch;
    }
    return data + plane / args_.shape.channels * input.strides.batch +
           plane % args_.shape.channels * input.strides.channel;
  }

  void spread(const Input& input, const S* row, int64_t t, T* stage, T* to) const {
    const Spread<T>& tile = *input.tiles[static_cast<size_t>(t)];
    const S* const from = row + tile.first() * unit_;
    const T* source = stage;
    if constexpr (std::is_same_v<S, T>) {
      source = unit_ >= kLanes ? from : stage;
    }
    if (source == stage) {
      convert(from, tile.count() * unit_, stage);
    }
    if (unit_ == 1) {
      tile.row(source, to);
    } else {
      tile.pixels(source, to, unit_);
    }
  }

  // With kLanes zeros behind: vectors may be read that are not all needed.
  static void convert(const S* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(to + i, load_as<V>(from + i));
    }
    store(to + i, load_part<V>(from + i, count - i));
    std::memset(to + i + kLanes, 0, static_cast<size_t>(count - i) * sizeof(T));
  }

  const UpsampleArgs& args_;
  int64_t unit_;  // elements of a pixel that lie together
  int64_t num_tiles_;
  int64_t tile_elements_;
  Input inputs_[kMaxUpsampleInputs] = {};
};

}  // namespace

template <class S>
void upsample_forward_cpu(const UpsampleArgs& args, ParallelFor parallel_for) {
  Forward<S>(args).run(parallel_for);
}

extern const UpsampleTable kUpsampleTable;
const UpsampleTable kUpsampleTable = {
    {upsample_forward_cpu<float>, upsample_forward_cpu<double>, upsample_forward_cpu<BFloat16>,
     upsample_forward_cpu<Half>},
    {upsample_backward_cpu<float>, upsample_backward_cpu<double>, upsample_backward_cpu<BFloat16>,
     upsample_backward_cpu<Half>}};

}  // namespace pydense::PYDENSE_ISA
