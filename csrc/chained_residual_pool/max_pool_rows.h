// SPDX-License-Identifier: Apache-2.0
// The two steps of pooling: rows are reduced along x, and an output row is the maximum over reduced
// rows. First along x, then along y: so ties fall as they do in row-major order.
#pragma once

#include <type_traits>

#include "chained_residual_pool/max_pool.h"
#include "chained_residual_pool/max_pool_math.h"
#include "common/bytes.h"
#include "common/partial.h"

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

// Calls fn(j, rows[e + j unit]) for j in [0, k), `a` being rows[e]. Shifted: unit is 1.
template <int K, bool Shifted, class V, class Fn>
PYDENSE_HD void for_columns(const LaneOf<V>* rows, int64_t unit, int k, const Fn& fn) {
  if constexpr (Shifted && K > 0) {
    const V a = load<V>(rows);
    const V b = load<V>(rows + kLanesIn<V>);
    [&]<int... J>(std::integer_sequence<int, J...>) {
      (fn(J, lanes_from<J>(a, b)), ...);
    }(std::make_integer_sequence<int, K>{});
  } else {
#pragma GCC unroll 5
    for (int j = 0; j < (K > 0 ? K : k); ++j) {
      fn(j, load<V>(rows + j * unit));
    }
  }
}

// best[e] is the maximum of padded[e + j unit], code[e] the first j that it is found at. K is the
// size of the window, or 0 where only `size` says it. Runs on to the end of the last vector.
template <class T, int K, bool Nan, bool Offsets, bool Shifted>
[[gnu::noinline]] void pool_along_x(int size, const T* padded, int64_t unit, int64_t count, T* best,
                                    IntOf<T>* code) {
  constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;
  using I = Vec<IntOf<T>, kLanes>;
  for (int64_t e = 0; e < count; e += kLanes) {
    V b{};
    I c{};
    for_columns<K, Shifted, V>(padded + e, unit, size, [&](int j, const V& v) {
      if (j == 0) {
        b = v;
      } else {
        take<Nan, Offsets>(v, I{} + j, b, c);
      }
    });
    store(best + e, b);
    if constexpr (Offsets) {
      store(code + e, c);
    }
  }
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

template <class I>
PYDENSE_HD bool any_lane(const I& mask) {
  if constexpr (kLanesIn<I> <= 2) {
    return (mask[0] | mask[kLanesIn<I> - 1]) != 0;
  } else {
    using Half = Vec<LaneOf<I>, kLanesIn<I> / 2>;
    const auto* const p = reinterpret_cast<const char*>(&mask);
    return any_lane(load<Half>(p) | load<Half>(p + sizeof(Half)));
  }
}

// Rows of the ring that are in a window, from the first one in the picture on.
template <class T>
struct PoolWindow {
  const T* best[kMaxPoolSize + 1];
  const IntOf<T>* code[kMaxPoolSize + 1];
  int rows;
  int first;  // its row in the window
};

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

  template <bool Offsets, class V, class I>
  PYDENSE_HD void write(int64_t i, int64_t part, const V& v, const I& code) const {
    using Bytes = Vec<uint8_t, kLanesIn<V>>;
    const bool whole = i + kLanesIn<V> <= part;
    if (whole) {
      store_as(sink_.out + i, v);
    } else {
      store_part(sink_.out + i, v, part - i);
    }
    if constexpr (Offsets) {
      const Bytes bytes = __builtin_convertvector(code, Bytes);
      if (whole) {
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
  const IntOf<T>* code[K > 0 ? K : kMaxPoolSize];
  for (int j = 0; j < rows; ++j) {
    best[j] = window.best[j];
    code[j] = window.code[j];
  }
  Segments<Out> segments(sink);
  for (int64_t begin = 0; begin < count;) {
    const int64_t part = segments.next(count - begin);
    for (int64_t i = 0; i < part; i += kLanes) {
      const int64_t e = begin + i;
      V b = load<V>(best[0] + e);
      I c{};
      if constexpr (Offsets) {
        c = load<I>(code[0] + e) + (first << 4);
      }
#pragma GCC unroll 4
      for (int j = 1; j < rows; ++j) {
        I own{};
        if constexpr (Offsets) {
          own = load<I>(code[j] + e) + ((first + j) << 4);
        }
        take<Nan, Offsets>(load<V>(best[j] + e), own, b, c);
      }
      segments.template write<Offsets>(i, part, b, c);
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
  const IntOf<T>* code[K + 1];
  for (int j = 0; j <= K; ++j) {
    best[j] = window.best[j];
    code[j] = window.code[j];
  }
  const auto code_at = [&](int j, int row, int64_t e) {
    I own{};
    if constexpr (Offsets) {
      own = load<I>(code[j] + e) + (row << 4);
    }
    return own;
  };
  Segments<Out> above(upper);
  Segments<Out> below(lower);
  for (int64_t begin = 0; begin < count;) {
    const int64_t part = above.next(count - begin);
    below.next(count - begin);
    for (int64_t i = 0; i < part; i += kLanes) {
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
      above.template write<Offsets>(i, part, first, first_code);
      take<Nan, Offsets>(load<V>(best[K] + e), code_at(K, K - 1, e), b, c);
      below.template write<Offsets>(i, part, b, c);
    }
    begin += part;
  }
}

}  // namespace pydense::PYDENSE_ISA
