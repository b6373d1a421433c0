// SPDX-License-Identifier: Apache-2.0
// Cross-entropy on CUDA: shapes, options, numbers that are not finite, counters.
#include "head_cross_entropy.h"

namespace {

// Scales from 1/3 to 13, whole and broken, one pixel, one class, cells of several strips and turns.
template <class S, class L>
void shapes() {
  const HeadCase cases[] = {
      {2, 5, 4, 6, 16, 24, false, Layout::kContiguous},
      {1, 21, 5, 7, 33, 41, true, Layout::kChannelsLast},
      {1, 3, 5, 5, 5, 5, false, Layout::kGaps},
      {1, 1, 3, 4, 10, 12, false, Layout::kContiguous},
      {1, 6, 9, 12, 4, 5, false, Layout::kChannelsLast},
      {1, 7, 1, 1, 9, 9, false, Layout::kContiguous},
      {2, 4, 1, 3, 2, 39, true, Layout::kGaps},
  };
  for (const HeadCase& c : cases) {
    check<S, L>(c, {});
  }
}

void forward_of_options() {
  const HeadCase c = {2, 6, 4, 5, 15, 20, false, Layout::kContiguous};
  for (const bool weight : {false, true}) {
    for (const double smoothing : {0.0, 0.25}) {
      Options options;
      options.weight = options.count = weight;
      options.smoothing = smoothing;
      options.gradient = false;
      options.pixel_weight = smoothing > 0;
      options.divisor = weight ? CrossEntropyDivisor::kWeight : CrossEntropyDivisor::kPixels;
      check<float, int16_t>(c, options);
      options.per_pixel = true;
      check<float, int16_t>(c, options);
    }
  }
}

void gradient_of_options() {
  for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
    const HeadCase c = {2, 6, 4, 5, 15, 20, false, layout};
    for (const bool weight : {false, true}) {
      for (const double smoothing : {0.0, 0.25}) {
        Options options;
        options.weight = weight;
        options.smoothing = smoothing;
        options.pixel_weight = smoothing > 0;
        check<float, int8_t>(c, options);
      }
    }
  }
}

// Halos of tiles in both directions, one turn too few for the columns of a cell, many classes in
// parts, rows of logits that no output of a block reaches, rows where everything is ignored.
void tiles() {
  for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
    check<float, uint8_t>({1, 3, 20, 150, 20, 150, false, layout}, {});
    check<float, int32_t>({2, 37, 3, 70, 6, 140, false, layout}, {});
    check<float, int32_t>({1, 3, 90, 64, 12, 70, true, layout}, {});
    check<float, uint8_t>({1, 2, 30, 127, 4, 127, true, layout}, {});  // as many cells as threads
    check<float, int64_t>({1, 2, 2, 3, 9, 400, false, layout}, {});
    Options options;
    options.everything_ignored_before = 0.5;
    options.per_pixel = true;
    check<float, int16_t>({1, 5, 12, 10, 36, 30, false, layout}, options);
  }
  Options options;
  options.enough_tiles = 1 << 20;  // one row of cells each
  check<float, uint8_t>({2, 3, 5, 20, 15, 41, true, Layout::kContiguous}, options);
}

// Powers relative to each pixel's largest logit, wherever its class stands.
void large_logits() {
  for (const double magnitude : {300.0, 1e4}) {
    const HeadCase c = {1, 9, 4, 6, 15, 25, false, Layout::kContiguous};
    simt::Logits<float> logits(c, 1);
    for (int64_t y = 0; y < c.height; ++y) {
      for (int64_t x = 0; x < c.width; ++x) {
        logits.set(0, (5 * y + 4 * x) % 9, y, x, magnitude);
        logits.set(0, (5 * y + 4 * x + 2) % 9, y, x, -magnitude);
      }
    }
    for (const double smoothing : {0.0, 0.25}) {
      Options options;
      options.smoothing = smoothing;
      options.per_pixel = true;
      options.count = false;  // at this magnitude float rounds to ties
      Call<float, int64_t> call(logits, options);
      call.run();
      // Interpolation in float rounds logits by as much as 1e-7 of the largest.
      call.check(4e-6 + magnitude * 4e-7, magnitude * 4e-7);
    }
  }
}

double loss_of(Call<float, int64_t>& call, size_t pixel) {
  return static_cast<double>(call.loss[pixel]);
}

void not_finite() {
  const HeadCase c = {1, 6, 4, 5, 16, 20, false, Layout::kContiguous};
  for (const double special : {kNan, kInfinity, -kInfinity}) {
    simt::Logits<float> logits(c, 1);
    logits.set(0, 4, 2, 3, special);
    Options options;
    options.per_pixel = true;
    Call<float, int64_t> call(logits, options);
    for (size_t i = 0; i < call.target.size(); ++i) {
      call.target[i] = i % 20 >= 14 ? 100 : static_cast<int64_t>(i % 3);
    }
    call.run();
    const pydense::HeadAxes<float> axes = simt::axes_of<float>(c);
    int64_t surely = 0;   // float may break ties,
    int64_t perhaps = 0;  // or make some
    simt::for_each_output(c, [&](int64_t n, int64_t y, int64_t x) {
      const auto at = static_cast<size_t>(y * c.out_width + x);
      if (x >= 14) {  // ignored, whatever the logits
        SIMT_EXPECT(loss_of(call, at) == 0);
        return;
      }
      const std::vector<double> values = logits.upsampled(n, y, x);
      const auto row = pydense::portable::axis_taps(axes.y, y);
      const auto column = pydense::portable::axis_taps(axes.x, x);
      const bool reached = (row.i0 == 2 || row.i1 == 2) && (column.i0 == 3 || column.i1 == 3);
      const bool is_nan = reached && (std::isnan(values[4]) || values[4] == kInfinity);
      SIMT_EXPECT(std::isnan(loss_of(call, at)) == is_nan);
      const size_t label = at % 3;
      const auto beats = [&](double margin) {
        return !is_nan && std::none_of(values.begin(), values.end(), [&](double value) {
          return value > values[label] + margin;
        });
      };
      perhaps += beats(1e-5);
      surely += beats(0) && std::count_if(values.begin(), values.end(), [&](double value) {
                              return std::abs(value - values[label]) < 1e-5;
                            }) == 1;
    });
    SIMT_EXPECT(surely <= call.counts[0]);
    SIMT_EXPECT(call.counts[0] <= perhaps);
    SIMT_EXPECT(perhaps < surely + 30);
    // Logits to the right of column 3 are reached by ignored outputs alone.
    for (int64_t k = 0; k < c.classes; ++k) {
      for (int64_t h = 0; h < c.height; ++h) {
        SIMT_EXPECT(std::isfinite(call.gradient.value(0, k, h, 4)));
      }
    }
  }
  // All classes at minus infinity.
  simt::Logits<float> none(c, 1);
  for (int64_t k = 0; k < c.classes; ++k) {
    none.set(0, k, 1, 1, -kInfinity);
  }
  Options options;
  options.per_pixel = true;
  Call<float, int64_t> call(none, options);
  std::fill(call.target.begin(), call.target.end(), 2);
  call.run();
  SIMT_EXPECT(std::isnan(loss_of(call, 5 * 20 + 5)) && std::isfinite(loss_of(call, 12 * 20 + 12)));
}

// The first NaN is the largest, in any place of a group and of the parts of many classes.
void counts_with_nan() {
  const HeadCase c = {1, 40, 1, 40, 1, 40, false, Layout::kContiguous};
  for (const int64_t first : {0, 2, 5, 33}) {
    for (const int64_t second : {3, 6, 36, 39}) {
      simt::Logits<float> logits(c, 1);
      for (int64_t x = 0; x < 40; ++x) {
        logits.set(0, first, 0, x, kNan);
        logits.set(0, second, 0, x, kNan);
      }
      Options options;
      options.gradient = false;
      Call<float, int64_t> call(logits, options);
      const int64_t largest = std::min(first, second);
      std::iota(call.target.begin(), call.target.end(), 0);
      call.target[static_cast<size_t>(largest)] = 100;
      call.run();
      SIMT_EXPECT(call.counts[0] == 0 && call.counts[1] == 39);
      std::fill(call.target.begin(), call.target.end(), largest);
      call.run();
      SIMT_EXPECT(call.counts[0] == 40 && call.counts[1] == 40);
    }
  }
}

// A label that is neither a class nor ignored: NaN for its pixel, for the sums, and where it falls.
void labels_that_are_no_class() {
  const HeadCase c = {1, 4, 4, 5, 16, 20, false, Layout::kContiguous};
  simt::Logits<float> logits(c);
  for (const int64_t label : {int64_t{4}, int64_t{-1}, (int64_t{1} << 32) + 1}) {
    for (const bool per_pixel : {false, true}) {
      Options options;
      options.per_pixel = per_pixel;
      Call<float, int64_t> call(logits, options);
      std::fill(call.target.begin(), call.target.end(), 1);
      call.target[7 * 20 + 8] = label;
      call.run();
      call.options.count = per_pixel;
      call.check(kError<float>, kError<float>);
      int64_t wrong = 0;
      for (int64_t h = 0; h < c.height; ++h) {
        for (int64_t w = 0; w < c.width; ++w) {
          wrong += std::isnan(call.gradient.value(0, 3, h, w)) ? 1 : 0;
        }
      }
      SIMT_EXPECT(wrong == 4 && call.counts[1] == 320);
    }
  }
}

void nothing() {
  const HeadCase c = {0, 4, 4, 5, 16, 20, false, Layout::kContiguous};
  simt::Logits<float> logits(c);
  for (const auto divisor :
       {CrossEntropyDivisor::kOne, CrossEntropyDivisor::kWeight, CrossEntropyDivisor::kPixels}) {
    Options options;
    options.divisor = divisor;
    Call<float, int64_t> call(logits, options);
    call.run();
    SIMT_EXPECT(divisor == CrossEntropyDivisor::kOne ? call.total[0] == 0
                                                     : std::isnan(call.total[0]));
    SIMT_EXPECT(call.scale[0] == (divisor == CrossEntropyDivisor::kOne ? 1 : 0));
    SIMT_EXPECT(call.counts[0] == 0 && call.counts[1] == 0);
  }
}

// A map of more than 2^31 logits of a class, and as many in the halo: the last tile alone, and what
// it gets from the one above.
void beyond_32_bits() {
  constexpr int64_t kClasses = 17;
  constexpr int64_t kHeight = 16 * 4097;
  constexpr int64_t kWidth = 128 * 256 - 1;  // of cells there is one more
  constexpr int64_t kMap = kHeight * kWidth;
  for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
    const bool last = layout == Layout::kChannelsLast;
    const HeadCase c = {1, kClasses, kHeight, kWidth, kHeight, kWidth, false, layout};
    simt::SparseMemory logits(kClasses * kMap * sizeof(float));
    simt::SparseMemory gradient(kClasses * kMap * sizeof(float));
    simt::SparseMemory loss(kMap * sizeof(float));
    simt::SparseMemory target(kMap);  // class 0
    CrossEntropyCudaArgs<float> args{};
    args.logits = {
        logits.as<float>(), pydense::FloatType::kFloat32, 1, kClasses, kHeight, kWidth, {}};
    const std::array<int64_t, 4> strides = simt::strides_of(kClasses, kHeight, kWidth, layout);
    std::copy_n(strides.begin(), 4, args.logits.strides);
    args.axes = simt::axes_of<float>(c);
    args.target = target.as<uint8_t>();
    args.target_type = IntegerType::kUInt8;
    args.target_strides[1] = kWidth;
    args.target_strides[2] = 1;
    args.ignore_index = 255;
    args.loss = loss.as<float>();
    args.gradient = gradient.as<float>();
    args.gradient_channels_last = last;
    const CrossEntropyPlan plan = plan_cross_entropy(args.logits, args.axes, true);
    SIMT_EXPECT(plan.tiles_x == 256 && plan.tiles_y == 4097 && plan.rows == 16);
    simt::SparseMemory halo(static_cast<size_t>(plan.halo_rows + plan.halo_columns) *
                            sizeof(float));
    simt::SparseMemory partials(static_cast<size_t>(plan.blocks) * sizeof(CrossEntropyPartial));
    simt::Buffer<double> scale(1, "scale");
    simt::Buffer<int64_t> counts(2, "counts");
    args.halo = halo.as<float>();
    args.partials = partials.as<CrossEntropyPartial>();
    args.scale = scale.data();
    args.counts = counts.data();

    // The last class in the first row of the last tiles; number `shared` of those in the halo.
    const int64_t k = kClasses - 1;
    const int64_t y = kHeight - 16;
    const int64_t x = kWidth - 5;
    const int64_t from = last ? (4095 * kWidth + x) * kClasses + k : (k * 4097 + 4095) * kWidth + x;
    const int64_t shared =
        last ? (4095 * kWidth + x) * kClasses + k : (4095 * kClasses + k) * kWidth + x;
    halo.as<float>()[from] = 1;
    simt::config().only_blocks = {0, static_cast<uint64_t>(plan.blocks - 1),
                                  static_cast<uint64_t>(shared / 256 % (1 << 20) + 1)};
    upsample_cross_entropy_cuda(args, plan, 0, nullptr);
    simt::config().only_blocks.clear();

    // Of three tiles, 128 columns each, but that the first has none left of the picture.
    SIMT_EXPECT(counts[1] == 16 * (128 + 128 + 127));
    const double log_classes = std::log(static_cast<double>(kClasses));
    const float* const losses = loss.as<float>();
    simt::expect_close_at(__FILE__, __LINE__, losses[kMap - 1], log_classes, 1e-6, 0, 0);
    SIMT_EXPECT(losses[kMap - 16 * kWidth - 1] == 0);  // of another tile
    const auto gradient_at = [&](int64_t channel, int64_t row, int64_t column) {
      return static_cast<double>(
          gradient.as<float>()[channel * strides[1] + row * strides[2] + column * strides[3]]);
    };
    const double p = 1.0 / kClasses;
    simt::expect_close_at(__FILE__, __LINE__, gradient_at(0, y + 15, kWidth - 1), p - 1, 1e-6, 0,
                          0);
    simt::expect_close_at(__FILE__, __LINE__, gradient_at(k, y + 15, kWidth - 1), p, 1e-6, 0, 0);
    simt::expect_close_at(__FILE__, __LINE__, gradient_at(k, y, x), p + 1, 1e-6, 0, 0);
    simt::expect_close_at(__FILE__, __LINE__, gradient_at(k, y, x - 1), p, 1e-6, 0, 0);
    SIMT_EXPECT(gradient_at(k, y - 1, x) == 0);
  }
}

void refuses() {
  const HeadCase c = {1, 4, 4, 5, 16, 20, false, Layout::kContiguous};
  simt::Logits<float> logits(c);
  for (const double smoothing : {-0.5, 1.5}) {
    Options options;
    options.smoothing = smoothing;
    Call<float, int64_t> call(logits, options);
    bool refused = false;
    try {
      call.run();
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    SIMT_EXPECT(refused);
  }
  Options all;
  all.smoothing = 1;  // nothing is left for the label
  check<float, int64_t>(c, all);
}

// Tiles of 31 cells and four rows, as those of the large map.
constexpr HeadCase kCounted = {1, 19, 16, 61, 64, 244, false, Layout::kContiguous};
constexpr double kCountedScale = 1024.0 * 2048.0 / (64.0 * 244.0);

void count(Layout layout, bool gradient, const char* shape) {
  HeadCase c = kCounted;
  c.layout = layout;
  simt::Logits<float> logits(c);
  Options options;
  options.gradient = gradient;
  options.count = false;
  options.enough_tiles = 8;
  Call<float, int64_t> call(logits, options);
  const double numbers = 4.0 * 19 * 16 * 61;
  simt::Limits main{.kernel = "cross_entropy_kernel",
                    .minimum_bytes = (gradient ? 2 : 1) * numbers + 8.0 * 64 * 244};
  if (gradient) {
    main.moved = 1.35;
    main.wavefronts = 1.85;
    main.sectors = layout == Layout::kChannelsLast ? 4.4 : 1.3;
    main.reason =
        "moved: the parts of logits that two tiles share. Wavefronts: what belongs to a target is "
        "taken off in words four apart from lane to lane. Sectors, channels last: a thread adds "
        "to four classes of a gradient";
  }
  main.shape = shape;
  main.scale = kCountedScale;
  // Of four tiles three hand a row on, of two one a column; each number is read, and the gradient's
  // read and written. And the records of the blocks, and four numbers.
  const double shared = gradient ? 19.0 * (3 * (3 * 61 + 13) + 3) : 0;
  simt::Limits finish{.kernel = "cross_entropy_finish_kernel",
                      .minimum_bytes = 4.0 * shared + 32.0 * 8 + 96};
  finish.moved = gradient ? 1.45 : 1.2;
  finish.sectors = 3.1;
  finish.reason =
      "a lane reads a record of four numbers; of columns, one number of each row of a plane";
  finish.shape = shape;
  finish.scale = gradient ? kCountedScale : 1;
  simt::counted({main, finish}, [&] { call.run(); });
}
void counters() {
  count(Layout::kContiguous, true, "1x19x256x512 to 1024x2048");
  count(Layout::kChannelsLast, true, "1x19x256x512 to 1024x2048, channels last");
  count(Layout::kContiguous, false, "1x19x256x512 to 1024x2048, no gradient");
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"cross-entropy, float", shapes<float, int64_t>},
                             {"cross-entropy, double", shapes<double, int32_t>},
                             {"cross-entropy, half", shapes<__half, uint8_t>},
                             {"cross-entropy, bfloat16", shapes<__nv_bfloat16, int8_t>},
                             {"forward of all options", forward_of_options},
                             {"gradient of all options", gradient_of_options},
                             {"tiles", tiles},
                             {"large logits", large_logits},
                             {"not finite", not_finite},
                             {"counts with NaN", counts_with_nan},
                             {"labels that are no class", labels_that_are_no_class},
                             {"nothing", nothing},
                             {"beyond 32 bits", beyond_32_bits, simt::kRelease | simt::kAsan},
                             {"refuses", refuses},
                             {"counters", counters},
                         });
}
