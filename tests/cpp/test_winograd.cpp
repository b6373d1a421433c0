// SPDX-License-Identifier: Apache-2.0
// Winograd's atrous convolutions against plain sums, over tiles, layouts, threads and instruction
// sets. Memory ends with the last number, so that AddressSanitizer sees what reads or writes on.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "atrous_conv/winograd.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::thread_for;

namespace {

std::vector<float> normal(int64_t count, unsigned seed, double scale) {
  std::mt19937 random(seed);
  std::normal_distribution<double> numbers;
  std::vector<float> result(static_cast<size_t>(count));
  for (float& to : result) {
    to = static_cast<float>(scale * numbers(random));
  }
  return result;
}

struct Case {
  int64_t images;
  int64_t channels;
  int64_t outputs;
  int64_t height;
  int64_t width;
  int64_t rate;
};

// Grids that tiles cut evenly and not, of one pixel, of one row; rates of the map's size and more;
// several panels of everything, none whole.
std::vector<Case> cases() {
  return {{2, 3, 5, 9, 11, 2},   {1, 33, 37, 7, 8, 1}, {1, 2, 3, 1, 1, 1},   {3, 1, 1, 5, 20, 3},
          {1, 17, 16, 6, 5, 9},  {1, 4, 3, 13, 4, 4},  {1, 300, 2, 4, 3, 1}, {2, 0, 3, 2, 2, 1},
          {1, 5, 70, 24, 24, 6}, {0, 2, 2, 3, 3, 1}};
}

class Problem {
 public:
  Problem(const Case& c, int tile, bool channels_last, bool flipped)
      : c_(c),
        pixels_(c.height * c.width),
        x_(normal(c.images * c.channels * pixels_, 1, 1)),
        weight_(normal(c.outputs * c.channels * 9, 2,
                       1 / std::sqrt(9.0 * static_cast<double>(std::max<int64_t>(1, c.channels))))),
        bias_(normal(c.outputs, 4, 1)),
        out_(static_cast<size_t>(c.images * c.outputs * pixels_)) {
    args_ = {c.images, c.channels,   c.outputs,     c.height,   c.width,
             c.rate,   tile,         channels_last, x_.data(),  weight_.data(),
             flipped,  bias_.data(), true,          out_.data()};
  }

  void check() {
    winograd("op", args_, serial_for);
    compare(true, true);
    const std::vector<float> serial = out_;
    std::fill(out_.begin(), out_.end(), 9.0F);
    winograd("op", args_, thread_for);
    EXPECT(same(serial));
    const std::vector<float> last = weight_last();
    args_.weight = last.data();
    args_.weight_last = true;
    std::fill(out_.begin(), out_.end(), 9.0F);
    winograd("op", args_, thread_for);
    EXPECT(same(serial));
    args_.weight = weight_.data();
    args_.weight_last = false;
    args_.relu = false;
    winograd("op", args_, serial_for);
    compare(true, false);
    args_.bias = nullptr;
    winograd("op", args_, serial_for);
    compare(false, false);
  }

 private:
  bool same(const std::vector<float>& wanted) const {
    return wanted.empty() ||
           std::memcmp(wanted.data(), out_.data(), wanted.size() * sizeof(float)) == 0;
  }

  // The weight's taps before its second axis.
  std::vector<float> weight_last() const {
    const auto inner = static_cast<size_t>(args_.flipped ? c_.outputs : c_.channels);
    std::vector<float> last(weight_.size());
    for (size_t i = 0; i < weight_.size(); ++i) {
      const size_t row = i / 9 / inner;
      last[(row * 9 + i % 9) * inner + i / 9 % inner] = weight_[i];
    }
    return last;
  }

  void compare(bool bias, bool relu) const {
    double worst = 0;
    for (int64_t n = 0; n < c_.images; ++n) {
      for (int64_t o = 0; o < c_.outputs; ++o) {
        for (int64_t p = 0; p < pixels_; ++p) {
          double wanted = sum(n, o, p / c_.width, p % c_.width);
          wanted = bias ? wanted + bias_[static_cast<size_t>(o)] : wanted;
          wanted = relu ? std::max(0.0, wanted) : wanted;
          worst = std::max(worst, std::fabs(out_[at(n, o, p, c_.outputs)] - wanted));
        }
      }
    }
    EXPECT(worst < (args_.tile == 2 ? 1e-5 : 6e-5));
  }

  double sum(int64_t n, int64_t o, int64_t y, int64_t x) const {
    double total = 0;
    for (int64_t t = 0; t < 9; ++t) {
      const int64_t row = y + (t / 3 - 1) * c_.rate;
      const int64_t column = x + (t % 3 - 1) * c_.rate;
      if (row < 0 || row >= c_.height || column < 0 || column >= c_.width) {
        continue;
      }
      for (int64_t c = 0; c < c_.channels; ++c) {
        const int64_t w =
            args_.flipped ? (c * c_.outputs + o) * 9 + 8 - t : (o * c_.channels + c) * 9 + t;
        total += static_cast<double>(x_[at(n, c, row * c_.width + column, c_.channels)]) *
                 weight_[static_cast<size_t>(w)];
      }
    }
    return total;
  }

  size_t at(int64_t n, int64_t channel, int64_t pixel, int64_t channels) const {
    return static_cast<size_t>(args_.channels_last ? (n * pixels_ + pixel) * channels + channel
                                                   : (n * channels + channel) * pixels_ + pixel);
  }

  Case c_;
  int64_t pixels_;
  std::vector<float> x_;
  std::vector<float> weight_;
  std::vector<float> bias_;
  std::vector<float> out_;
  WinogradArgs args_;
};

// ReLU keeps a NaN; one pixel's reaches the tiles that read it and no other phase grid.
void check_nan() {
  constexpr int64_t kSize = 8;
  std::vector<float> x(kSize * kSize, 1.0F);
  x[9] = std::numeric_limits<float>::quiet_NaN();  // (1, 1), of the odd grid
  const std::vector<float> weight(9, 1.0F);
  std::vector<float> out(x.size());
  winograd("op",
           {1, 1, 1, kSize, kSize, 2, 2, false, x.data(), weight.data(), false, nullptr, true,
            out.data()},
           serial_for);
  for (int64_t p = 0; p < kSize * kSize; ++p) {
    const bool odd = p / kSize % 2 == 1 && p % kSize % 2 == 1;
    EXPECT(odd || std::isfinite(out[static_cast<size_t>(p)]));
  }
  EXPECT(std::isnan(out[9]));
}

void check_errors() {
  WinogradArgs args = {};
  args.tile = 5;
  args.rate = 1;
  EXPECT_THROWS(winograd("op", args, serial_for), "op: tile must be 2, 3 or 4, got 5");
  args.tile = 2;
  args.rate = 0;
  EXPECT_THROWS(winograd("op", args, serial_for), "op: rate must be 1 or more, got 0");
  args.rate = 1;
  args.width = -1;
  EXPECT_THROWS(winograd("op", args, serial_for), "op: sizes must not be negative");
}

}  // namespace

int main() {
  for (const CpuIsa isa : available_cpu_isas()) {
    set_cpu_isa(cpu_isa_name(isa));
    for (const Case& c : cases()) {
      for (const int tile : {2, 3, 4}) {
        for (const bool channels_last : {false, true}) {
          Problem(c, tile, channels_last, false).check();
        }
        Problem(c, tile, true, true).check();
      }
    }
    check_nan();
  }
  check_errors();
  return testing::report("winograd");
}
