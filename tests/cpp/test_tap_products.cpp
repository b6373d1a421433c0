// SPDX-License-Identifier: Apache-2.0
// The products of summed atrous convolutions against plain sums, over types, layouts, threads and
// instruction sets. Numbers are small and whole, so that sums are exact; memory ends with the last
// number, so that AddressSanitizer sees what reads or writes on.
#include <type_traits>
#include <vector>

#include "atrous_conv/tap_products.h"
#include "numbers.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::kDtype;
using testing::on_every_isa;
using testing::read;
using testing::same_bytes;
using testing::thread_for;
using testing::whole_numbers;

namespace {

struct Case {
  int64_t images;
  int64_t channels;
  int64_t outputs;
  int64_t height;
  int64_t width;
  std::vector<int64_t> rows;
  std::vector<int64_t> columns;
};

// Depths of several parts and of half a step; blocks of part of a row and of several; slabs; groups
// of the stack and of channels; taps beyond the map, out of order, one, none.
std::vector<Case> cases() {
  return {
      {2, 5, 3, 7, 9, {-2, 0, 0, 5}, {2, 0, -2, -8}},
      {1, 301, 3, 3, 37, {-1, 0, 1}, {36, 0, -17}},
      {1, 263, 61, 3, 4, {-3, -2, -1, 0, 1, 2, 2}, {1, 0, 0, 0, -3, 2, 3}},
      {1, 3, 2, 31, 19, {-30, 29, 0}, {0, 3, 0}},
      {3, 2, 1, 2, 3, {5, INT64_MIN, 0, INT64_MAX}, {0, 0, 1, INT64_MIN}},
      {1, 1, 1, 1, 1, {0}, {0}},
      {2, 4, 2, 3, 3, {}, {}},
      {2, 0, 2, 3, 3, {0, 1}, {0, 1}},
  };
}

template <class S>
class Problem {
  using T = ComputeOf<S>;

 public:
  Problem(const Case& c, bool channels_last)
      : c_(c),
        last_(channels_last),
        taps_(static_cast<int64_t>(c.rows.size())),
        pixels_(c.height * c.width),
        shape_{{c.outputs, c.height, c.width, taps_, c.rows.data(), c.columns.data(), false},
               c.images,
               c.channels,
               channels_last},
        x_(whole_numbers<S>(c.images * c.channels * pixels_, 1, 5)),
        grad_(whole_numbers<S>(c.images * c.outputs * pixels_, 2, 5)),
        bias_(whole_numbers<T>(c.outputs, 3, 5)) {
    narrow_ = std::is_same_v<S, BFloat16> && multiplies_bf16_pairs();
    wide_stack_ = whole_numbers<T>(taps_ * c.outputs * c.channels, 4, 5);
    narrow_stack_ = whole_numbers<S>(taps_ * c.outputs * c.channels, 4, 5);
  }

  void check() {
    std::vector<S> out(grad_.size());
    std::vector<S> grad_x(x_.size());
    std::vector<T> grad_stack(wide_stack_.size());
    run(serial_for, 1, out, grad_x, grad_stack);
    std::vector<double> exact_out(out.size());
    std::vector<double> exact_x(x_.size());
    std::vector<double> exact_stack(grad_stack.size());
    sum(exact_out, exact_x, exact_stack);
    const auto expect = [](const auto& got, const std::vector<double>& wanted) {
      bool equal = true;
      for (size_t i = 0; i < got.size(); ++i) {
        // The result alone is rounded: what is exact in it has to be met.
        std::remove_cvref_t<decltype(got[0])> rounded;
        portable::store_as(&rounded, static_cast<T>(wanted[i]));
        equal = equal && read(got[i]) == read(rounded);
      }
      EXPECT(equal);
    };
    expect(out, exact_out);
    expect(grad_x, exact_x);
    expect(grad_stack, exact_stack);

    std::vector<S> out2(out.size());
    std::vector<S> grad_x2(grad_x.size());
    std::vector<T> grad_stack2(grad_stack.size());
    run(thread_for, 1 << 20, out2, grad_x2, grad_stack2);
    EXPECT(same_bytes(out, out2) && same_bytes(grad_x, grad_x2) &&
           same_bytes(grad_stack, grad_stack2));
  }

 private:
  void run(ParallelFor parallel_for, int64_t workspace, std::vector<S>& out, std::vector<S>& grad_x,
           std::vector<T>& grad_stack) {
    const void* const stack = narrow_ ? static_cast<const void*>(narrow_stack_.data())
                                      : static_cast<const void*>(wide_stack_.data());
    tap_products("op", kDtype<S>,
                 {shape_,
                  x_.data(),
                  stack,
                  bias_.data(),
                  {out.data(), pixels_, c_.width, 1},
                  c_.outputs * pixels_,
                  workspace},
                 parallel_for);
    tap_picture_gradient("op", kDtype<S>, {shape_, grad_.data(), stack, grad_x.data()},
                         parallel_for);
    tap_stack_gradient("op", kDtype<S>, {shape_, grad_.data(), x_.data(), grad_stack.data()},
                       parallel_for);
  }

  size_t place(int64_t n, int64_t channel, int64_t pixel) const {
    return static_cast<size_t>(last_ ? (n * pixels_ + pixel) * c_.channels + channel
                                     : (n * c_.channels + channel) * pixels_ + pixel);
  }

  void sum(std::vector<double>& out, std::vector<double>& grad_x, std::vector<double>& grad_stack) {
    for (size_t i = 0; i < out.size(); ++i) {
      const auto o = static_cast<int64_t>(i) / pixels_ % c_.outputs;
      out[i] = static_cast<double>(bias_[static_cast<size_t>(o)]);
    }
    for (int64_t t = 0; t < taps_; ++t) {
      const int64_t dy = c_.rows[static_cast<size_t>(t)];
      const int64_t dx = c_.columns[static_cast<size_t>(t)];
      if (dy >= c_.height || dy <= -c_.height || dx >= c_.width || dx <= -c_.width) {
        continue;
      }
      for (int64_t p = 0; p < pixels_; ++p) {
        const int64_t y = p / c_.width + dy;
        const int64_t x = p % c_.width + dx;
        if (y < 0 || y >= c_.height || x < 0 || x >= c_.width) {
          continue;
        }
        for (int64_t n = 0; n < c_.images; ++n) {
          for (int64_t o = 0; o < c_.outputs; ++o) {
            for (int64_t channel = 0; channel < c_.channels; ++channel) {
              const size_t from = place(n, channel, y * c_.width + x);
              const auto to = static_cast<size_t>((n * c_.outputs + o) * pixels_ + p);
              const auto w = static_cast<size_t>((t * c_.outputs + o) * c_.channels + channel);
              const auto weight = static_cast<double>(wide_stack_[w]);
              out[to] += weight * read(x_[from]);
              grad_x[from] += weight * read(grad_[to]);
              grad_stack[w] += read(grad_[to]) * read(x_[from]);
            }
          }
        }
      }
    }
  }

  const Case& c_;
  bool last_;
  int64_t taps_;
  int64_t pixels_;
  TapProductShape shape_;
  std::vector<S> x_;
  std::vector<S> grad_;
  std::vector<T> bias_;
  bool narrow_;
  std::vector<T> wide_stack_;
  std::vector<S> narrow_stack_;
};

template <class S>
void check_all() {
  for (const Case& c : cases()) {
    for (const bool channels_last : {false, true}) {
      Problem<S>(c, channels_last).check();
    }
  }
}

void check_errors() {
  const int64_t none[1] = {0};
  EXPECT_THROWS(tap_products("op", FloatType::kFloat32,
                             {{{1, -1, 1, 1, none, none, false}, 1, 1, false},
                              nullptr,
                              nullptr,
                              nullptr,
                              {nullptr, 1, 1, 1},
                              1,
                              0},
                             serial_for),
                "op: sizes must not be negative, got 1, 1, 1, -1 and 1");
}

}  // namespace

int main() {
  on_every_isa([]<class S>() { check_all<S>(); });
  check_errors();
  return testing::report("tap_products");
}
