// SPDX-License-Identifier: Apache-2.0
// Dense convolutions and their weights' gradient against plain sums, over types, layouts, threads
// and instruction sets. Memory ends with the last number, so that AddressSanitizer sees what reads
// or writes on.
#include <vector>

#include "atrous_conv/dense_gradient.h"
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

// Of 16 bits: as it is stored.
template <class S>
double rounded(double value) {
  S to;
  portable::store_as(&to, static_cast<ComputeOf<S>>(value));
  return read(to);
}

DenseConvShape shape_of(int64_t n, int64_t c, int64_t o, int64_t h, int64_t w, int64_t kh,
                        int64_t kw, int64_t dy, int64_t dx, int64_t top, int64_t left,
                        int64_t more) {
  return {
      n,  c,  o,  h,   w,   h + 2 * top - (kh - 1) * dy + more, w + 2 * left - (kw - 1) * dx, kh,
      kw, dy, dx, top, left};
}

std::vector<DenseConvShape> shapes() {
  return {shape_of(2, 3, 5, 7, 9, 3, 3, 2, 2, 2, 2, 0),
          shape_of(1, 37, 33, 13, 14, 3, 3, 6, 6, 6, 6, 0),
          shape_of(1, 2, 3, 3, 4, 3, 3, 40, 50, 40, 50, 0),
          shape_of(3, 17, 2, 1, 1, 3, 3, 1, 1, 1, 1, 0),
          shape_of(2, 35, 30, 6, 41, 3, 3, 1, 1, 1, 1, 0),
          shape_of(1, 3, 4, 5, 70, 5, 5, 1, 1, 2, 2, 1),
          shape_of(1, 2, 9, 4, 90, 2, 3, 1, 2, 0, 5, 0),
          shape_of(1, 7, 3, 4, 66, 3, 2, 2, 1, 2, -1, 0),
          shape_of(1, 1, 1, 5, 60, 2, 3, 3, 7, 9, 3, 2),
          shape_of(2, 5, 16, 8, 20, 1, 5, 1, 2, -1, -3, 0),
          shape_of(1, 4, 7, 33, 3, 4, 1, 2, 1, 8, 0, 0),
          shape_of(1, 270, 300, 3, 3, 1, 1, 1, 1, 0, 0, 0),
          shape_of(0, 2, 3, 4, 4, 3, 3, 1, 1, 1, 1, 0)};
}

DenseConvPicture picture_of(const void* data, int64_t channels, int64_t height, int64_t width,
                            bool last) {
  const int64_t plane = height * width;
  return last ? DenseConvPicture{data, channels * plane, 1, width * channels, channels}
              : DenseConvPicture{data, channels * plane, plane, width, 1};
}

size_t place(const DenseConvPicture& at, int64_t n, int64_t c, int64_t y, int64_t x) {
  return static_cast<size_t>(n * at.batch + c * at.channel + y * at.row + x * at.pixel);
}

// Calls fn(n, y, x, tap, from_y, from_x) wherever a tap reads the picture.
template <class Fn>
void for_reads(const DenseConvShape& s, const Fn& fn) {
  for (int64_t n = 0; n < s.batches; ++n) {
    for (int64_t y = 0; y < s.out_height; ++y) {
      for (int64_t x = 0; x < s.out_width; ++x) {
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          const int64_t row = y + tap / s.kernel_width * s.dilation_y - s.top;
          const int64_t column = x + tap % s.kernel_width * s.dilation_x - s.left;
          if (row >= 0 && row < s.height && column >= 0 && column < s.width) {
            fn(n, y, x, tap, row, column);
          }
        }
      }
    }
  }
}

// The weight in one of three orders of memory, taps in order or turned round.
enum class Order { kOutputs, kTapsFirst, kTransposed };
DenseConvWeight weight_of(const DenseConvShape& s, const void* data, Order order) {
  const int64_t taps = s.taps();
  switch (order) {
    case Order::kOutputs:
      return {data, s.channels * taps, taps, 1, false};
    case Order::kTapsFirst:
      return {data, s.channels * taps, 1, s.channels, false};
    default:
      return {data, taps, s.outputs * taps, 1, true};
  }
}

template <class S>
void check_forward(const DenseConvShape& s, bool last, Order order) {
  using T = ComputeOf<S>;
  const std::vector<S> x = whole_numbers<S>(s.batches * s.channels * s.height * s.width, 1, 3);
  const std::vector<S> w = whole_numbers<S>(s.outputs * s.channels * s.taps(), 2, 3);
  const std::vector<T> bias = whole_numbers<T>(s.outputs, 3, 9);
  const std::vector<T> scale = whole_numbers<T>(s.outputs, 4, 5);
  const DenseConvPicture from = picture_of(x.data(), s.channels, s.height, s.width, last);
  const DenseConvWeight weight = weight_of(s, w.data(), order);
  const int64_t outputs = s.batches * s.outputs * s.out_height * s.out_width;
  std::vector<S> out(static_cast<size_t>(outputs));
  const DenseConvPicture to = picture_of(out.data(), s.outputs, s.out_height, s.out_width, !last);
  std::vector<double> sums(static_cast<size_t>(outputs));
  for_reads(s, [&](int64_t n, int64_t y, int64_t p, int64_t tap, int64_t row, int64_t column) {
    const int64_t own = weight.flipped ? s.taps() - 1 - tap : tap;
    for (int64_t o = 0; o < s.outputs; ++o) {
      double& sum = sums[place(to, n, o, y, p)];
      for (int64_t c = 0; c < s.channels; ++c) {
        sum +=
            read(x[place(from, n, c, row, column)]) *
            read(w[static_cast<size_t>(o * weight.output + c * weight.channel + own * weight.tap)]);
      }
    }
  });
  const DenseConvArgs args = {s,
                              from,
                              weight,
                              nullptr,
                              scale.data(),
                              bias.data(),
                              true,
                              {out.data(), to.batch, to.channel, to.row, to.pixel}};
  dense_conv("op", kDtype<S>, args, serial_for);
  for (int64_t n = 0; n < s.batches; ++n) {
    for (int64_t o = 0; o < s.outputs; ++o) {
      const auto own = static_cast<size_t>(o);
      for (int64_t i = 0; i < s.out_height * s.out_width; ++i) {
        const size_t at = place(to, n, o, i / s.out_width, i % s.out_width);
        const double sum =
            sums[at] * static_cast<double>(scale[own]) + static_cast<double>(bias[own]);
        EXPECT(read(out[at]) == rounded<S>(sum < 0 ? 0 : sum));
      }
    }
  }
  const std::vector<S> first = out;
  out.assign(out.size(), S{});
  std::vector<char> packed(static_cast<size_t>(dense_conv_packed_bytes("op", kDtype<S>, s)));
  dense_conv_pack("op", kDtype<S>, s, weight, packed.data(), thread_for);
  DenseConvArgs again = args;
  again.packed = packed.data();
  dense_conv("op", kDtype<S>, again, thread_for);
  EXPECT(same_bytes(out, first));
  std::vector<char> rows(static_cast<size_t>(dense_conv_rows_bytes("op", kDtype<S>, s, from)));
  EXPECT(rows.empty() == (from.channel == 1 || s.batches == 0));
  if (!rows.empty()) {
    out.assign(out.size(), S{});
    dense_conv_rows("op", kDtype<S>, s, from, rows.data(), thread_for);
    again.rows = rows.data();
    again.x.data = nullptr;  // not read any more
    dense_conv("op", kDtype<S>, again, thread_for);
    EXPECT(same_bytes(out, first));
  }
}

template <class S>
void check_gradient(const DenseConvShape& s, bool last) {
  const std::vector<S> x = whole_numbers<S>(s.batches * s.channels * s.height * s.width, 1, 3);
  std::vector<S> grad(static_cast<size_t>(s.batches * s.outputs * s.out_height * s.out_width));
  for (size_t i = 0; i < grad.size(); i += grad.size() / 200 + 1) {  // few, so that sums fit
    portable::store_as(&grad[i], static_cast<ComputeOf<S>>(static_cast<int>(i % 3) - 1));
  }
  const DenseConvPicture from = picture_of(x.data(), s.channels, s.height, s.width, last);
  const DenseConvPicture of = picture_of(grad.data(), s.outputs, s.out_height, s.out_width, last);
  std::vector<double> sums(static_cast<size_t>(s.outputs * s.channels * s.taps()));
  for_reads(s, [&](int64_t n, int64_t y, int64_t p, int64_t tap, int64_t row, int64_t column) {
    for (int64_t o = 0; o < s.outputs; ++o) {
      const double own = read(grad[place(of, n, o, y, p)]);
      for (int64_t c = 0; own != 0 && c < s.channels; ++c) {
        sums[static_cast<size_t>((o * s.channels + c) * s.taps() + tap)] +=
            own * read(x[place(from, n, c, row, column)]);
      }
    }
  });
  std::vector<S> found(sums.size());
  std::vector<S> serial(sums.size());
  dense_conv_weight_gradient("op", kDtype<S>, {s, of, from, serial.data()}, serial_for);
  dense_conv_weight_gradient("op", kDtype<S>, {s, of, from, found.data()}, thread_for);
  EXPECT(same_bytes(found, serial));
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT(read(found[i]) == rounded<S>(sums[i]));
  }
}

template <class S>
void check_all() {
  for (const DenseConvShape& shape : shapes()) {
    for (const bool last : {false, true}) {
      for (const Order order : {Order::kOutputs, Order::kTapsFirst, Order::kTransposed}) {
        check_forward<S>(shape, last, order);
      }
      check_gradient<S>(shape, last);
    }
  }
}

void check_refusals() {
  DenseConvShape shape = shape_of(1, 1, 1, 2, 2, 1, 1, 1, 1, 0, 0, 0);
  float number = 0;
  const DenseConvWeight weight = {&number, 1, 1, 1, false};
  shape.outputs = 0;
  EXPECT_THROWS(dense_conv_packed_bytes("op", FloatType::kFloat32, shape),
                "op: channels and outputs must be at least 1, got 1 and 0");
  shape.outputs = 1;
  shape.out_width = 0;
  EXPECT_THROWS(dense_conv("op", FloatType::kFloat32,
                           {shape,
                            {&number, 1, 1, 1, 1},
                            weight,
                            nullptr,
                            nullptr,
                            nullptr,
                            false,
                            {&number, 1, 1, 1, 1}},
                           serial_for),
                "op: output size must be in [1, 2147483648), got (2, 0)");
}

}  // namespace

int main() {
  on_every_isa([]<class S>() { check_all<S>(); });
  check_refusals();
  return testing::report("dense_conv");
}
