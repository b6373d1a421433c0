// SPDX-License-Identifier: Apache-2.0
// Forward: rows of the inputs are spread horizontally once each, into a pair of rows that stays in
// the first-level cache, and every row of the output is a sum of such rows. Memory sees each input
// once and each output once.
#include <memory>
#include <type_traits>

#include "upsample/upsample_spread.h"

namespace pydense::PYDENSE_ISA {
namespace {

// Of a row at work: with the pairs of rows that it is a sum of, a tile stays in the first-level
// cache.
constexpr int64_t kTileElements = 2048;
constexpr int64_t kSumTilePixelElements = 1024;  // several inputs, channels_last
constexpr int64_t kTaskElements = 65536;
constexpr int64_t kAhead = 1024;   // elements that memory is asked for early
constexpr int64_t kTaskRows = 32;  // at least: every task spreads its first rows by itself

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
  int64_t ahead;      // of `same`, where memory is asked for early
  int64_t out_ahead;  // of the output
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

// The same with the weights in registers, for whole vectors. Returns the elements that are done.
template <int Same, int Pairs, class S>
[[gnu::noinline]] int64_t blend_vectors(const Terms<S>& terms, S* to, int64_t elements, bool relu) {
  using T = ComputeOf<S>;
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  const S* const same = terms.same[0];
  const T* a[Pairs];
  const T* b[Pairs];
  V w0[Pairs];
  V w1[Pairs];
#pragma GCC unroll 4
  for (int k = 0; k < Pairs; ++k) {
    a[k] = terms.pairs[k].a;
    b[k] = terms.pairs[k].b;
    w0[k] = broadcast<V>(terms.pairs[k].w0);
    w1[k] = broadcast<V>(terms.pairs[k].w1);
  }
  int64_t e = 0;
  for (; e + kLanes <= elements; e += kLanes) {
    V sum{};
    __builtin_prefetch(to + e + terms.out_ahead, 1);
    if constexpr (Same == 1) {
      __builtin_prefetch(same + e + terms.ahead);
      sum = load_as<V>(same + e);
    }
#pragma GCC unroll 4
    for (int k = 0; k < Pairs; ++k) {
      const V up = fma(w1[k], load<V>(b[k] + e), w0[k] * load<V>(a[k] + e));
      sum = k + Same == 0 ? up : sum + up;
    }
    store_as(to + e, relu ? (sum < 0 ? V{} : sum) : sum);
  }
  return e;
}

template <class S>
void blend_row(const Terms<S>& terms, S* to, int64_t elements, bool relu) {
  constexpr int kLanes = kNativeLanesOf<ComputeOf<S>>;
  using V = Vec<ComputeOf<S>, kLanes>;
  constexpr int kMaxPairs = 4;
  int64_t e = 0;
  if (terms.num_same <= 1 && terms.num_pairs >= 1 && terms.num_pairs <= kMaxPairs) {
    with_constant<kMaxPairs>(terms.num_pairs, [&](auto pairs) {
      constexpr int kPairs = decltype(pairs)::value;
      e = terms.num_same == 0 ? blend_vectors<0, kPairs>(terms, to, elements, relu)
                              : blend_vectors<1, kPairs>(terms, to, elements, relu);
    });
  }
  for (; e + kLanes <= elements; e += kLanes) {
    store_as(to + e, blend<V>(terms, e, relu));
  }
  if (e < elements && elements >= kLanes) {  // the last vector overlaps
    e = elements - kLanes;
    return store_as(to + e, blend<V>(terms, e, relu));
  }
  for (; e < elements; ++e) {
    store_as(to + e, blend<ComputeOf<S>>(terms, e, relu));
  }
}

template <class S>
class Forward {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;

  static constexpr int kSpare = kMaxVectors * kLanes;

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
        num_tiles_(
            smaller(args.shape.width, ceil_div(args.shape.width * unit_, wanted_tile(args)))),
        tile_elements_(ceil_div(args.shape.width, num_tiles_) * unit_) {
    const UpsampleInput& first = args.inputs[0];
    // Where a row is used for few rows of the output, spreading it first does not pay; converting
    // 16-bit numbers again for each does sooner. The arithmetic is the same, and so are the bits.
    constexpr int64_t kFifths = std::is_same_v<S, T> ? 2 : 3;
    direct_ = args.num_inputs == 1 && !first.same_size && !args.relu && unit_ >= kLanes &&
              5 * first.y.in_size > kFifths * first.y.out_size;
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
        input.staged = larger(input.staged, spread->count() * unit_ + kSpare);
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
  // A plane of an input, and the rows of it that are spread: two, by the parity of their number.
  struct Rows {
    const S* plane;
    T* row[2];
    int64_t number[2];
  };

  static int64_t wanted_tile(const UpsampleArgs& args) {
    return args.shape.channels_last && args.num_inputs > 1 ? kSumTilePixelElements : kTileElements;
  }

  // Behind a short part of a row, its part of the next row is what follows.
  int64_t ahead(int64_t row) const { return unit_ == 1 || num_tiles_ == 1 ? kAhead : row; }

  Tile tile(int64_t t) const {
    return {args_.shape.width * t / num_tiles_, args_.shape.width * (t + 1) / num_tiles_};
  }

  void run_band(int64_t first_plane, int64_t end_plane, int64_t first_row, int64_t end_row) const {
    const int64_t length = (ceil_div(tile_elements_, kLanes) + 1) * kLanes;  // aligned rows
    const int64_t pairs = 2 * int64_t{args_.num_inputs} * length;
    int64_t staged = 0;
    for (int k = 0; k < args_.num_inputs; ++k) {
      staged = larger(staged, inputs_[k].staged);
    }
    const Buffer buffer = buffer_of<T>(static_cast<size_t>(pairs + staged));
    Rows rows[kMaxUpsampleInputs];
    for (int k = 0; k < args_.num_inputs; ++k) {
      for (int i = 0; i < 2; ++i) {
        rows[k].row[i] = buffer.as<T>() + (2 * int64_t{k} + i) * length;
      }
    }
    T* const stage = buffer.as<T>() + pairs;
    for (int64_t t = 0; t < num_tiles_; ++t) {
      // Columns that no input reaches are 0 and stay so.
      std::memset(buffer.data(), 0, static_cast<size_t>(pairs) * sizeof(T));
      for (int64_t plane = first_plane; plane < end_plane; ++plane) {
        for (int k = 0; k < args_.num_inputs; ++k) {
          rows[k].plane = plane_of(*inputs_[k].from, plane);
          rows[k].number[0] = rows[k].number[1] = -1;
        }
        for (int64_t y = first_row; y < end_row; ++y) {
          run_row(plane, y, t, rows, stage);
        }
      }
    }
  }

  // The columns of a tile straight from the pixels of two rows.
  void run_pixels(const S* plane, int64_t y, const Tile& columns, S* out) const {
    const Input& input = inputs_[0];
    const AxisTable<T>& axis = input.x;
    const bool inside = y >= input.y.begin && y < input.y.end;
    const S* const upper = plane + (inside ? input.y.i0[y] : 0) * input.from->strides.row;
    const S* const lower = plane + (inside ? input.y.i1[y] : 0) * input.from->strides.row;
    const V up = broadcast<V>(inside ? input.y.w0[y] : T{});
    const V down = broadcast<V>(inside ? input.y.w1[y] : T{});
    for (int64_t x = columns.begin; x < columns.end; ++x, out += unit_) {
      if (!inside || x < axis.begin || x >= axis.end) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(unit_) * sizeof(S));
        continue;
      }
      const int64_t left = axis.i0[x] * unit_;
      const int64_t right = axis.i1[x] * unit_;
      const V w0 = broadcast<V>(axis.w0[x]);
      const V w1 = broadcast<V>(axis.w1[x]);
      for (int64_t at = 0; at < unit_; at += kLanes) {
        const int64_t c = smaller(at, unit_ - kLanes);  // the last vector overlaps
        const V above = fma(w1, load_as<V>(upper + right + c), w0 * load_as<V>(upper + left + c));
        const V below = fma(w1, load_as<V>(lower + right + c), w0 * load_as<V>(lower + left + c));
        __builtin_prefetch(out + c + kAhead, 1);
        store_as(out + c, fma(down, below, up * above));
      }
    }
  }

  void run_row(int64_t plane, int64_t y, int64_t t, Rows* rows, T* stage) const {
    const UpsampleShape& shape = args_.shape;
    if (direct_) {
      const Tile pixels = tile(t);
      return run_pixels(rows[0].plane, y, pixels,
                        static_cast<S*>(args_.out) +
                            ((plane * shape.height + y) * shape.width + pixels.begin) * unit_);
    }
    Terms<S> terms;
    terms.num_same = terms.num_pairs = 0;
    terms.ahead = kAhead;
    terms.out_ahead = ahead(shape.width * unit_);
    const Tile columns = tile(t);
    for (int k = 0; k < args_.num_inputs; ++k) {
      const Input& input = inputs_[k];
      const S* const from = rows[k].plane;
      if (input.from->same_size) {
        terms.same[terms.num_same++] = from + y * input.from->strides.row + columns.begin * unit_;
        terms.ahead = ahead(input.from->strides.row);
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
    const int64_t stride = input.from->strides.row;
    if constexpr (std::is_same_v<S, T>) {
      if (unit_ >= kLanes) {
        return tile.pixels(from, to, unit_);
      }
      if (unit_ == 1) {
        const int64_t staged = tile.staged();
        convert(from + staged, tile.count() - staged, stride, stage + staged);
        return tile.row(from, stride, stage, to);
      }
    }
    convert(from, tile.count() * unit_, stride, stage);
    if (unit_ == 1) {
      tile.row(stage, 0, stage, to);
    } else {
      tile.pixels(stage, to, unit_);
    }
  }

  // Behind them, vectors may be read of which no number is used. Asks for the row that follows.
  static void convert(const S* from, int64_t count, int64_t stride, T* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      __builtin_prefetch(from + i + stride);
      store(to + i, load_as<V>(from + i));
    }
    if (i < count) {
      store(to + i, load_part<V>(from + i, count - i));
    }
  }

  const UpsampleArgs& args_;
  int64_t unit_;  // elements of a pixel that lie together
  int64_t num_tiles_;
  int64_t tile_elements_;
  bool direct_;
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
