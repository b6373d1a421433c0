// SPDX-License-Identifier: Apache-2.0
// One tile of queries against all keys, a block of keys at a time: kernel values of a few vectors
// of queries with the block (lanes are queries), then their product with the block's values, as a
// small matrix product with the sums in registers.
#include <cstring>
#include <type_traits>

#include "common/buffer.h"
#include "common/simd.h"
#include "common/with_constant.h"
#include "dense_crf/exact_filter.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kKeys = 128;  // of a block
constexpr int kRun = 16;        // keys summed in registers; runs are summed over a block
constexpr int kVectors = 2;     // of queries
// Rows of values that are summed at once: kVectors registers each, some are left for operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 6;
#endif

// to[0..count) = from[0..count * stride), then its last element up to `padded`.
template <class T>
void pack(const T* from, int64_t stride, int64_t count, int64_t padded, T* to) {
  if (stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = from[i * stride];
    }
  }
  for (int64_t i = count; i < padded; ++i) {
    to[i] = to[count - 1];
  }
}

template <class T>
class Tile {
 public:
  Tile(const ExactFilterArgs<T>& args, const ExactFilterTile& tile)
      : args_(args),
        tile_(tile),
        sums_buffer_(buffer_of<double>(static_cast<size_t>(tile.rows * kExactQueries))),
        buffer_(buffer_of<T>(static_cast<size_t>(kKeys * kQueries + tile.rows * kKeys +
                                                 args.dims * (kKeys + kExactQueries)))),
        sums_(sums_buffer_.template as<double>()),
        weights_(buffer_.template as<T>()),
        values_(weights_ + kKeys * kQueries),
        keys_(values_ + tile.rows * kKeys),
        queries_(keys_ + args.dims * kKeys) {
    std::memset(sums_, 0, static_cast<size_t>(tile.rows * kExactQueries) * sizeof(double));
  }

  void run() {
    pack_features(tile_.first_query, tile_.queries, kExactQueries, queries_);
    for (int64_t first = 0; first < args_.points; first += kKeys) {
      const int64_t count = args_.points - first < kKeys ? args_.points - first : kKeys;
      pack_features(first, count, kKeys, keys_);
      for (int64_t row = 0; row < tile_.rows; ++row) {
        pack(row_of(args_.values, args_.value_strides, row) + first * args_.value_strides[2],
             args_.value_strides[2], count, 0, values_ + row * kKeys);
      }
      for (int64_t query = 0; query < tile_.queries; query += kQueries) {
        weigh_block(count, queries_ + query);
        if (!args_.self_term) {
          remove_self(first, count, tile_.first_query + query);
        }
        add_block(count, sums_ + query);
      }
    }
    const int64_t out_strides[2] = {args_.channels * args_.points, args_.points};
    for (int64_t row = 0; row < tile_.rows; ++row) {
      T* const out = row_of(args_.out, out_strides, row) + tile_.first_query;
      for (int64_t i = 0; i < tile_.queries; ++i) {
        out[i] = static_cast<T>(sums_[row * kExactQueries + i]);
      }
    }
  }

 private:
  static constexpr int kLanes = kNativeLanesOf<T>;
  static constexpr int64_t kQueries = int64_t{kVectors} * kLanes;
  static_assert(kExactQueries % kQueries == 0);
  using V = Vec<T, kLanes>;

  // Row `row` of the tile in an array [batches, channels, ...].
  template <class U>
  U* row_of(U* array, const int64_t* strides, int64_t row) const {
    const int64_t r = tile_.first_row + row;
    const int64_t batch = tile_.image + r / args_.channels;
    return array + batch * strides[0] + r % args_.channels * strides[1];
  }

  void pack_features(int64_t first, int64_t count, int64_t padded, T* to) const {
    const int64_t* strides = args_.feature_strides;
    for (int64_t k = 0; k < args_.dims; ++k) {
      pack(args_.features + tile_.image * strides[0] + k * strides[1] + first * strides[2],
           strides[2], count, padded, to + k * padded);
    }
  }

  // weights_[key][query] = exp(-|f_query - f_key|^2 / 2); queries: [dims][kExactQueries].
  void weigh_block(int64_t count, const T* queries) const {
    switch (args_.dims) {
      case 1:
        return weigh<1>(count, queries);
      case 2:
        return weigh<2>(count, queries);
      case 3:
        return weigh<3>(count, queries);
      case 4:
        return weigh<4>(count, queries);
      case 5:
        return weigh<5>(count, queries);
      case 6:
        return weigh<6>(count, queries);
      default:
        return weigh<0>(count, queries);
    }
  }

  // Not inlined, as add_rows: each gets all registers.
  template <int Dims>
  [[gnu::noinline]] void weigh(int64_t count, const T* queries) const {
    const int64_t dims = Dims > 0 ? Dims : args_.dims;
    const T* const keys = keys_;
    T* weights = weights_;
    for (int64_t j = 0; j < count; ++j) {
      V squares[kVectors] = {};
#pragma GCC unroll 6
      for (int64_t k = 0; k < dims; ++k) {
        const V key = broadcast<V>(keys[k * kKeys + j]);
        for (int64_t v = 0; v < kVectors; ++v) {
          const V difference = key - load<V>(queries + k * kExactQueries + v * kLanes);
          squares[v] = fma(difference, difference, squares[v]);
        }
      }
      constexpr T kFactor = -0.5;
      for (int64_t v = 0; v < kVectors; ++v) {
        store(weights, exp_nonpositive<true>(squares[v] * kFactor));
        weights += kLanes;
      }
    }
  }

  void remove_self(int64_t first_key, int64_t count, int64_t first_query) const {
    for (int64_t i = 0; i < kQueries; ++i) {
      const int64_t j = first_query + i - first_key;
      if (j >= 0 && j < count) {
        weights_[j * kQueries + i] = 0;
      }
    }
  }

  // sums[row][query] += sum over keys of weights_[key][query] values_[row][key].
  void add_block(int64_t count, double* sums) const {
    const int64_t groups = ceil_div(tile_.rows, kMaxRows);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = tile_.rows * group / groups;
      with_constant<kMaxRows>(tile_.rows * (group + 1) / groups - first, [&](auto rows) {
        add_rows<decltype(rows)::value>(count, values_ + first * kKeys,
                                        sums + first * kExactQueries);
      });
    }
  }

  template <int Rows>
  [[gnu::noinline]] void add_rows(int64_t count, const T* values, double* sums) const {
    V block[Rows][kVectors] = {};
    const T* from = weights_;
    for (int64_t begin = 0; begin < count; begin += kRun) {
      const int64_t end = count - begin < kRun ? count : begin + kRun;
      V run[Rows][kVectors] = {};
      for (int64_t j = begin; j < end; ++j) {
        V weights[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) {
          weights[v] = load<V>(from);
          from += kLanes;
        }
#pragma GCC unroll 12
        for (int64_t row = 0; row < Rows; ++row) {
          const V value = broadcast<V>(values[row * kKeys + j]);
          for (int64_t v = 0; v < kVectors; ++v) {
            run[row][v] = fma(weights[v], value, run[row][v]);
          }
        }
      }
      // Unrolled too: an array that is indexed at run time would live on the stack all the time.
#pragma GCC unroll 12
      for (int64_t row = 0; row < Rows; ++row) {
        for (int64_t v = 0; v < kVectors; ++v) {
          block[row][v] = block[row][v] + run[row][v];
        }
      }
    }
    for (int64_t row = 0; row < Rows; ++row) {
      for (int64_t v = 0; v < kVectors; ++v) {
        T lanes[kLanes];
        store(lanes, block[row][v]);
        double* const to = sums + row * kExactQueries + v * kLanes;
        for (int l = 0; l < kLanes; ++l) {
          to[l] += static_cast<double>(lanes[l]);
        }
      }
    }
  }

  const ExactFilterArgs<T>& args_;
  const ExactFilterTile& tile_;
  Buffer sums_buffer_;
  Buffer buffer_;
  double* sums_;  // [rows, kExactQueries]
  T* weights_;    // [kKeys, kQueries]
  T* values_;     // [rows, kKeys]
  T* keys_;       // [dims, kKeys]
  T* queries_;    // [dims, kExactQueries]
};

template <class T>
void run_tile(const ExactFilterArgs<T>& args, const ExactFilterTile& tile) {
  Tile<T>(args, tile).run();
}

}  // namespace

extern const ExactFilterTable kExactFilterTable;
const ExactFilterTable kExactFilterTable = {run_tile<float>, run_tile<double>};

}  // namespace pydense::PYDENSE_ISA
