// SPDX-License-Identifier: Apache-2.0
// Pictures and the plain pool that tests of max pooling and of chained residual pooling share.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "chained_residual_pool/max_pool.h"
#include "driver.h"
#include "float_types.h"

namespace pool_checks {

using pydense::FloatType;
using pydense::PoolShape;
using pydense::PoolSource;

constexpr const char* kOp = "test";

using simt::kEpsilon;
using simt::kFloatType;
using simt::rounded;
using simt::value;

// The place of a number in a picture with `gap` elements between its rows.
struct Layout {
  PoolShape shape;
  int64_t gap = 0;

  int64_t pixel() const { return shape.channels_last ? shape.channels : 1; }
  int64_t row() const { return shape.width * pixel() + gap; }
  int64_t channel() const { return shape.channels_last ? 1 : shape.height * row(); }
  int64_t batch() const {
    return shape.height * row() * (shape.channels_last ? 1 : shape.channels);
  }
  size_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<size_t>(n * batch() + c * channel() + y * row() + x * pixel());
  }
  size_t elements() const { return static_cast<size_t>(shape.batches * batch()); }
  PoolSource source(const void* data) const { return {data, batch(), channel(), row()}; }
};

template <class Fn>
void for_each_element(const PoolShape& shape, const Fn& fn) {
  for (int64_t n = 0; n < shape.batches; ++n) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      for (int64_t y = 0; y < shape.height; ++y) {
        for (int64_t x = 0; x < shape.width; ++x) {
          fn(n, c, y, x);
        }
      }
    }
  }
}

// Whole numbers from few, so that maxima tie and sums are exact. special: -0, NaN and many -inf
// among them.
template <class T>
void fill_whole(simt::Buffer<T>& to, uint64_t seed, bool special = false) {
  std::mt19937_64 random(seed);
  for (T& x : to) {
    const uint64_t draw = random() % 40;
    double drawn = static_cast<double>(random() % 5) - 2;
    if (special && draw == 0) {
      drawn = std::numeric_limits<double>::quiet_NaN();
    } else if (special && draw < 30) {
      drawn = -std::numeric_limits<double>::infinity();
    } else if (special && drawn == 0) {
      drawn = draw % 2 == 0 ? 0.0 : -0.0;
    }
    x = rounded<T>(drawn);
  }
}

// Where a window has its maximum, by looking at every element from the first to the last. The
// picture begins after `skip` elements.
struct Maximum {
  int64_t y;
  int64_t x;
};
template <class T>
Maximum maximum_at(const simt::Buffer<T>& from, const Layout& layout, int64_t n, int64_t c,
                   int64_t y, int64_t x, size_t skip = 0) {
  const PoolShape& shape = layout.shape;
  const int64_t reach = shape.size / 2;
  const int64_t top = std::max<int64_t>(y - reach, 0);
  const int64_t left = std::max<int64_t>(x - reach, 0);
  Maximum at = {top, left};
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = top; i <= std::min(y + reach, shape.height - 1); ++i) {
    for (int64_t j = left; j <= std::min(x + reach, shape.width - 1); ++j) {
      const double own = value(from[layout.at(n, c, i, j) + skip]);
      if (own > best || std::isnan(own)) {
        best = own;
        at = {i, j};
      }
    }
  }
  return at;
}

}  // namespace pool_checks
