// SPDX-License-Identifier: Apache-2.0
// The two steps of pooling: rows are reduced along x, and an output row is the maximum over reduced
// rows. First along x, then along y: so ties fall as they do in row-major order.
#pragma once

#include <limits>
#include <type_traits>

#include "chained_residual_pool/max_pool.h"
#include "chained_residual_pool/max_pool_math.h"
#include "common/bytes.h"
#include "common/partial.h"
#include "common/simd_lanes.h"

namespace pydense::PYDENSE_ISA {

// Where a row of results goes: in segments of `length` elements, of which the first one has begun
// `phase` elements ago.
template <class Out>
struct PoolSink {
  Out* out;
  uint8_t* offsets;
  int64_t length;
  int64_t phase;
  int64_t out_stride;  // from segment to segment
  int64_t offset_stride;
};

// The same, where it is known whether there is a NaN.
template <bool Nan, bool Offsets, class V, class I>
PYDENSE_HD void take(const V& v, const I& code, V& best, I& best_code) {
  if constexpr (Nan) {
    take_later<Offsets>(v, code, best, best_code);
  } else {
    if constexpr (Offsets) {
      best_code = v > best ? code : best_code;
    }
    best = max(v, best);
  }
}

// Whether vectors at neighbouring columns are better shifted out of two aligned ones than loaded:
// where every second access would cross a cache line.
template <class T>
constexpr bool kShifts = kNativeLanesOf<T> * sizeof(T) == 64;

// best[e] is the maximum of padded[e + j unit], code[e] the first j that it is found at. K is the
// size of the window, or 0 where only `size` says it. Runs on to the end of the last vector.
template <class T, int K, bool Nan, bool Offsets>
[[gnu::noinline]] void pool_along_x(int size, const T* padded, int64_t unit, int64_t count, T* best,
                                    IntOf<T>* code) {
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;
  for (int64_t e = 0; e < count; e += kLanes) {
    V b{};
    I c{};
#pragma GCC unroll 5
    for (int j = 0; j < (K > 0 ? K : size); ++j) {
      const V v = load<V>(padded + e + j * unit);
      if (j == 0) {
        b = v;
      } else {
        take<Nan, Offsets>(v, I{} + j, b, c);
      }
    }
    store(best + e, b);
    if constexpr (Offsets) {
      store(code + e, c);
    }
  }
}

// 0, 1, 2, ...
template <class V>
PYDENSE_HD auto lane_numbers() {
  using I = Vec<IntOf<LaneOf<V>>, kLanesIn<V>>;
  return [&]<int... L>(std::integer_sequence<int, L...>) {
    return I{L...};
  }(std::make_integer_sequence<int, kLanesIn<V>>{});
}

// The vector at column x of a row, -inf beside it. x is at most one vector before it.
template <class V, class S>
PYDENSE_HD V padded_vector(const S* row, int64_t x, int64_t width) {
  using T = LaneOf<V>;
  constexpr T kPadding = -std::numeric_limits<T>::infinity();
  if (x >= 0 && x + kLanesIn<V> <= width) {
    return load_as<V>(row + x);
  }
  if (x < 0 || x >= width) {
    return broadcast<V>(kPadding);
  }
  const int64_t count = width - x;
  const V v = load_part<V>(row + x, count);
  return lane_numbers<V>() < static_cast<IntOf<T>>(count) ? v : broadcast<V>(kPadding);
}

// The maxima of columns and those right of them.
template <bool Nan, bool Offsets, class V, class I>
PYDENSE_HD void pool_pairs(const V& here, const V& right, V& best, I& code) {
  best = here;
  code = I{};
  take<Nan, Offsets>(right, I{} + 1, best, code);
}

// The same for columns [left, right) of a row in memory, whose neighbours are shifted out of
// vectors that do not overlap: of a copy that was just stored, others could not be loaded at once.
// Windows of 3 and 5 are made of pairs. left is 0 or at least a vector. Returns whether there is a
// NaN, if only in a column beside.
template <class T, int K, bool Nan, bool Offsets, class S>
[[gnu::noinline]] bool pool_row_along_x(const S* row, int64_t left, int64_t right, int64_t width,
                                        T* best, IntOf<T>* code) {
  static_assert(K == 3 || K == 5);
  constexpr int kLanes = kNativeLanesOf<T>;
  constexpr int kReach = K / 2;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;
  const V before = padded_vector<V>(row, left - kLanes, width);
  V here = padded_vector<V>(row, left, width);
  I nan = (before != before) | (here != here);
  V pairs_before;
  I codes_before;
  pool_pairs<Nan, Offsets>(before, lanes_from<1>(before, here), pairs_before, codes_before);
  for (int64_t x = left; x < right; x += kLanes) {
    const V after = padded_vector<V>(row, x + kLanes, width);
    nan |= after != after;
    V pairs;
    I codes;
    pool_pairs<Nan, Offsets>(here, lanes_from<1>(here, after), pairs, codes);
    V b = lanes_from<kLanes - kReach>(pairs_before, pairs);
    I c{};
    if constexpr (Offsets) {
      c = lanes_from<kLanes - kReach>(codes_before, codes);
    }
    if constexpr (K == 5) {
      take<Nan, Offsets>(pairs, codes + 2, b, c);
    }
    take<Nan, Offsets>(lanes_from<kReach>(here, after), I{} + (K - 1), b, c);
    store(best + x - left, b);
    if constexpr (Offsets) {
      if (x == 0) {
        const I least = kReach - lane_numbers<V>();
        c = c < least ? least : c;
      }
      store(code + x - left, c);
    }
    here = after;
    pairs_before = pairs;
    codes_before = codes;
  }
  return any_lane(nan);
}

// The same where `unit` channels, in whole vectors, lie together in pixels `pixel` elements apart:
// every pixel is read once, and pairs are kept until the windows that end with them.
template <class T, int K, bool Nan, bool Offsets, class S>
[[gnu::noinline]] bool pool_pixels_along_x(const S* row, int64_t next_row, int64_t pixel,
                                           int64_t unit, int64_t left, int64_t right, int64_t width,
                                           T* best, IntOf<T>* code) {
  static_assert(K == 3 || K == 5);
  constexpr int kLanes = kNativeLanesOf<T>;
  constexpr int kReach = K / 2;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;
  I nan{};
  for (int64_t channel = 0; channel < unit; channel += kLanes) {
    const auto read = [&](int64_t x) {
      if (x < 0 || x >= width) {
        return broadcast<V>(-std::numeric_limits<T>::infinity());
      }
      __builtin_prefetch(row + x * pixel + channel + next_row);
      const V v = load_as<V>(row + x * pixel + channel);
      nan |= v != v;
      return v;
    };
    V pairs[K - 2];  // that begin in the columns before this one, the last one in it if K is 5
    I codes[K - 2];
    V last = read(left - kReach);
    for (int j = 0; j < K - 2; ++j) {
      const V next = read(left - kReach + 1 + j);
      pool_pairs<Nan, Offsets>(last, next, pairs[j], codes[j]);
      last = next;
    }
    for (int64_t x = left; x < right; ++x) {
      const V next = read(x + kReach);
      V b = pairs[0];
      I c = codes[0];
      if constexpr (K == 5) {
        take<Nan, Offsets>(pairs[2], codes[2] + 2, b, c);
        pairs[0] = pairs[1];
        codes[0] = codes[1];
        pairs[1] = pairs[2];
        codes[1] = codes[2];
      }
      take<Nan, Offsets>(next, I{} + (K - 1), b, c);
      pool_pairs<Nan, Offsets>(last, next, pairs[K - 3], codes[K - 3]);
      last = next;
      const int64_t e = (x - left) * unit + channel;
      store(best + e, b);
      if constexpr (Offsets) {
        const I least = I{} + static_cast<IntOf<T>>(larger(0, kReach - x));
        store(code + e, c < least ? least : c);
      }
    }
  }
  return any_lane(nan);
}

// Asks for pixels of the next row while this one is at work: they are too far apart for the CPU to
// foresee.
template <class S>
PYDENSE_HD void prefetch(const S* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < count; i += kLine) {
    __builtin_prefetch(from + i);
  }
}

// Rows of the ring that are in a window, from the first one in the picture on.
template <class T>
struct PoolWindow {
  const T* best[kMaxPoolSize + 1];
  int64_t codes;  // from a row's numbers to its codes
  int rows;
  int first;  // its row in the window
};

// One distance for all rows: with a pointer for each, too few registers are left.
template <class T>
PYDENSE_HD const IntOf<T>* codes_of(const T* best, int64_t codes) {
  return reinterpret_cast<const IntOf<T>*>(best) + codes;
}

constexpr int64_t kWrittenAhead = 512;  // elements

// Walks through the segments of a sink.
template <class Out>
class Segments {
 public:
  PYDENSE_HD explicit Segments(const PoolSink<Out>& sink) : sink_(sink) {}

  // Goes to the next segment; how many of the `left` elements lie in it.
  PYDENSE_HD int64_t next(int64_t left) {
    if (begun_) {
      sink_.out += sink_.out_stride - sink_.phase;
      sink_.offsets += sink_.offset_stride - sink_.phase;
      sink_.phase = 0;
    }
    begun_ = true;
    return smaller(sink_.length - sink_.phase, left);
  }

  template <bool Offsets, bool Whole, class V, class I>
  PYDENSE_HD void write(int64_t i, int64_t part, const V& v, const I& code) const {
    using Bytes = Vec<uint8_t, kLanesIn<V>>;
    // Rows are too short for the CPU to foresee where the next ones go.
    __builtin_prefetch(sink_.out + i + kWrittenAhead, 1);
    if constexpr (Whole) {
      store_as(sink_.out + i, v);
    } else {
      store_part(sink_.out + i, v, part - i);
    }
    if constexpr (Offsets) {
      const Bytes bytes = __builtin_convertvector(code, Bytes);
      if constexpr (Whole) {
        store(sink_.offsets + i, bytes);
      } else {
        std::memcpy(sink_.offsets + i, &bytes, static_cast<size_t>(part - i));
      }
    }
  }

 private:
  PoolSink<Out> sink_;
  bool begun_ = false;
};

template <class T, class Out, int K, bool Nan, bool Offsets>
[[gnu::noinline]] void pool_along_y(const PoolWindow<T>& window, int64_t count,
                                    const PoolSink<Out>& sink) {
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;
  const int rows = K > 0 ? K : window.rows;
  const int first = K > 0 ? 0 : window.first;
  const T* best[K > 0 ? K : kMaxPoolSize];
  for (int j = 0; j < rows; ++j) {
    best[j] = window.best[j];
  }
  Segments<Out> segments(sink);
  for (int64_t begin = 0; begin < count;) {
    const int64_t part = segments.next(count - begin);
    for (int64_t i = 0; i < part; i += kLanes) {
      const int64_t e = begin + i;
      V b = load<V>(best[0] + e);
      I c{};
      if constexpr (Offsets) {
        c = load<I>(codes_of(best[0], window.codes) + e) + (first << 4);
      }
#pragma GCC unroll 4
      for (int j = 1; j < rows; ++j) {
        I own{};
        if constexpr (Offsets) {
          own = load<I>(codes_of(best[j], window.codes) + e) + ((first + j) << 4);
        }
        take<Nan, Offsets>(load<V>(best[j] + e), own, b, c);
      }
      if (i + kLanes <= part) {
        segments.template write<Offsets, true>(i, part, b, c);
      } else {
        segments.template write<Offsets, false>(i, part, b, c);
      }
    }
    begin += part;
  }
}

// Two output rows at once, K + 1 rows of the ring: what their windows share is reduced once. Both
// windows lie in the picture, and the segments of both sinks begin at the same elements.
template <class T, class Out, int K, bool Nan, bool Offsets>
[[gnu::noinline]] void pool_along_y_twice(const PoolWindow<T>& window, int64_t count,
                                          const PoolSink<Out>& upper, const PoolSink<Out>& lower) {
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;
  const T* best[K + 1];
  for (int j = 0; j <= K; ++j) {
    best[j] = window.best[j];
  }
  const auto code_at = [&](int j, int row, int64_t e) {
    I own{};
    if constexpr (Offsets) {
      own = load<I>(codes_of(best[j], e + window.codes)) + (row << 4);
    }
    return own;
  };
  Segments<Out> above(upper);
  Segments<Out> below(lower);
  for (int64_t begin = 0; begin < count;) {
    const int64_t part = above.next(count - begin);
    below.next(count - begin);
    const auto one = [&](int64_t i, auto whole) {
      const int64_t e = begin + i;
      V b = load<V>(best[1] + e);
      I c = code_at(1, 0, e);
#pragma GCC unroll 4
      for (int j = 2; j < K; ++j) {
        take<Nan, Offsets>(load<V>(best[j] + e), code_at(j, j - 1, e), b, c);
      }
      V first = load<V>(best[0] + e);
      I first_code = code_at(0, 0, e);
      take<Nan, Offsets>(b, c + 16, first, first_code);
      above.template write<Offsets, decltype(whole)::value>(i, part, first, first_code);
      take<Nan, Offsets>(load<V>(best[K] + e), code_at(K, K - 1, e), b, c);
      below.template write<Offsets, decltype(whole)::value>(i, part, b, c);
    };
    int64_t i = 0;
    for (; i + kLanes <= part; i += kLanes) {
      one(i, std::true_type{});
    }
    if (i < part) {
      one(i, std::false_type{});
    }
    begin += part;
  }
}

}  // namespace pydense::PYDENSE_ISA
