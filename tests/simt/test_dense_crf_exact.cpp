// SPDX-License-Identifier: Apache-2.0
// The Gaussian filters over all pairs of points against a sum in double, and the order of points.
#include <algorithm>
#include <cmath>
#include <memory>

#include "dense_crf/exact_fast.h"
#include "dense_crf/exact_filter.h"
#include "driver.h"

namespace {

using pydense::ExactFilterArgs;

struct Case {
  int64_t batches;
  int64_t images;  // of features: 1 or batches
  int64_t channels;
  int64_t points;
  int64_t dims;
  bool self_term;
};

// Points outermost where `last`.
template <class T>
struct Array {
  int64_t strides[3];
  simt::Buffer<T> memory;

  Array(int64_t images, int64_t channels, int64_t points, bool last, const char* name)
      : strides{channels * points, last ? 1 : points, last ? channels : 1},
        memory(static_cast<size_t>(images * channels * points), name) {}
  double at(int64_t image, int64_t channel, int64_t point) const {
    return static_cast<double>(memory[static_cast<size_t>(
        image * strides[0] + channel * strides[1] + point * strides[2])]);
  }
};

template <class T>
std::vector<double> by_definition(const Case& c, const Array<T>& features, const Array<T>& values) {
  std::vector<double> out(static_cast<size_t>(c.batches * c.channels * c.points));
  for (int64_t b = 0; b < c.batches; ++b) {
    const int64_t image = c.images == 1 ? 0 : b;
    for (int64_t i = 0; i < c.points; ++i) {
      for (int64_t j = 0; j < c.points; ++j) {
        double squares = 0;
        for (int64_t k = 0; k < c.dims; ++k) {
          const double difference = features.at(image, k, i) - features.at(image, k, j);
          squares += difference * difference;
        }
        const double weight = i == j && !c.self_term ? 0 : std::exp(-squares / 2);
        for (int64_t row = 0; row < c.channels; ++row) {
          out[static_cast<size_t>((b * c.channels + row) * c.points + i)] +=
              weight * values.at(b, row, j);
        }
      }
    }
  }
  return out;
}

template <class T>
ExactFilterArgs<T> arguments(const Case& c, const Array<T>& features, const Array<T>& values,
                             T* out) {
  ExactFilterArgs<T> args{features.memory.data(),
                          values.memory.data(),
                          out,
                          c.batches,
                          c.images,
                          c.channels,
                          c.points,
                          c.dims,
                          {},
                          {},
                          c.self_term};
  std::copy_n(features.strides, 3, args.feature_strides);
  std::copy_n(values.strides, 3, args.value_strides);
  return args;
}

template <class T>
void filter(const Case& c, bool last = false) {
  Array<T> features(c.images, c.dims, c.points, last, "features");
  Array<T> values(c.batches, c.channels, c.points, last, "values");
  simt::fill(features.memory, 1, 2 / std::sqrt(static_cast<double>(c.dims)));
  simt::fill(values.memory, 2);
  simt::Buffer<T> out(static_cast<size_t>(c.batches * c.channels * c.points), "out");
  const ExactFilterArgs<T> args = arguments(c, features, values, out.data());
  const size_t bytes = pydense::exact_filter_workspace(args);
  simt::Buffer<T> workspace(bytes / sizeof(T), "workspace");
  pydense::exact_filter_cuda(args, workspace.data(), 0, nullptr);
  const double tolerance = sizeof(T) == sizeof(float) ? 4e-6 : 1e-13;
  simt::expect_close(out, by_definition(c, features, values), tolerance, 4 * tolerance);
}

template <class T>
void filters() {
  filter<T>({1, 1, 1, 1, 1, true});
  filter<T>({1, 1, 1, 1, 1, false});
  filter<T>({1, 1, 3, 65, 2, true});
  filter<T>({2, 2, 5, 70, 5, false});
  filter<T>({2, 1, 6, 40, 3, true}, true);
  filter<T>({1, 1, 33, 33, 4, false}, true);
  filter<T>({2, 2, 2, 21, 9, false});
  filter<T>({1, 1, 20, 17, 21, true}, true);
}

// Blocks of queries and segments of keys, the last of each in part.
void blocks() {
  filter<float>({1, 1, 21, 300, 5, false});
  filter<float>({1, 1, 40, 130, 7, false});
  filter<double>({1, 1, 2, 260, 2, false});
}

// ---- the fast mode --------------------------------------------------------------------------

using pydense::PointOrder;

struct Ordered {
  simt::Buffer<int32_t> words;
  PointOrder order;

  Ordered(const Case& c, const Array<float>& features)
      : words(static_cast<size_t>(c.images * ((c.points + 127) / 128) *
                                  pydense::point_order_words(c.dims)),
              "order"),
        order(pydense::point_order(c.images, c.points, c.dims, words.data())) {
    pydense::PointOrderArgs args{features.memory.data(), {}, c.dims, order};
    std::copy_n(features.strides, 3, args.strides);
    simt::Buffer<uint32_t> workspace(pydense::point_order_workspace(args) / 4, "workspace");
    pydense::point_order_cuda(args, workspace.data(), 0, nullptr);
  }
};

void order_of(const Case& c) {
  Array<float> features(c.images, c.dims, c.points, true, "features");
  simt::fill(features.memory, 3, 4);
  const Ordered built(c, features);
  const PointOrder& order = built.order;
  const int64_t runs = order.padded / 64;
  double longest = 0;
  for (int64_t image = 0; image < c.images; ++image) {
    std::vector<int32_t> ids(order.ids + image * order.padded,
                             order.ids + (image + 1) * order.padded);
    for (int64_t i = 0; i < order.padded; ++i) {
      const int32_t id = ids[static_cast<size_t>(i)];
      SIMT_EXPECT((id >= 0) == (i < c.points));
      for (int k = 0; id >= 0 && k < order.width; ++k) {
        const double x = k < c.dims ? features.at(image, k, id) : 0;
        const int64_t at = image * runs + i / 64;
        SIMT_EXPECT(order.features[(at * order.width + k) * 64 + i % 64] == x);
        const float* const keys = order.keys + image * 2 * order.width * runs + i / 64;
        SIMT_EXPECT(keys[k * runs] <= x && x <= keys[(order.width + k) * runs]);
        const float* const queries = order.queries + image * 4 * order.width * runs + i / 32;
        const float low = queries[k * 2 * runs];
        const float high = queries[(order.width + k) * 2 * runs];
        SIMT_EXPECT(low <= x && x <= high);
        longest = std::max(longest, static_cast<double>(high - low));
      }
    }
    std::sort(ids.begin(), ids.end());
    for (int64_t i = 0; i < c.points; ++i) {
      SIMT_EXPECT(ids[static_cast<size_t>(order.padded - c.points + i)] == i);
    }
  }
  // Halved where that helps: runs of 32 are shorter than all points are.
  SIMT_EXPECT(c.points < 1000 || c.dims > 2 || longest < 3);
}

void orders() {
  order_of({1, 1, 1, 1, 1, true});
  order_of({1, 2, 1, 130, 2, true});
  order_of({1, 1, 1, 700, 6, true});
  order_of({1, 1, 1, 1100, 2, true});
}

// The kernel for all cards, and its twin for sm_90a.
void choose_twin(bool twin) {
  setenv("PYDENSE_EXPERIMENTAL_KERNELS", twin ? "1" : "0", 1);  // NOLINT(concurrency-mt-unsafe)
}

void fast(const Case& c, double scale, float skip_tolerance, bool last = false) {
  Array<float> features(c.images, c.dims, c.points, last, "features");
  Array<float> values(c.batches, c.channels, c.points, last, "values");
  simt::fill(features.memory, 1, scale);
  simt::fill(values.memory, 2);
  double most = 0;
  for (float& x : values.memory) {
    x = std::abs(x);
  }
  for (int64_t i = 0; i < c.points; ++i) {
    most += values.at(0, 0, i);
  }
  const Ordered built(c, features);
  const std::vector<double> expected = by_definition(c, features, values);
  for (const bool twin : {false, true}) {
    choose_twin(twin);
    simt::Buffer<float> out(static_cast<size_t>(c.batches * c.channels * c.points), "out");
    pydense::ExactFastArgs args{built.order, values.memory.data(), {},          out.data(),
                                c.batches,   c.channels,           c.self_term, skip_tolerance};
    std::copy_n(values.strides, 3, args.value_strides);
    simt::Buffer<uint32_t> workspace(pydense::exact_fast_workspace(args) / 4, "workspace");
    pydense::exact_fast_cuda(args, workspace.data(), 0, nullptr);
    double errors = 0;
    double squares = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = static_cast<double>(out[i]) - expected[i];
      errors += error * error;
      squares += expected[i] * expected[i];
      if (i < static_cast<size_t>(c.points)) {  // the first channel, whose sum is known
        SIMT_EXPECT(std::abs(error) <= 5e-3 * expected[i] + skip_tolerance * most);
      }
    }
    SIMT_EXPECT(std::sqrt(errors) <= 1e-3 * std::sqrt(squares));
  }
  choose_twin(false);
}

void fasts() {
  fast({1, 1, 1, 1, 1, true}, 1, 0);
  fast({1, 1, 3, 200, 5, true}, 2, 0);
  fast({2, 2, 21, 150, 5, false}, 1, 0, true);
  fast({2, 1, 13, 130, 2, true}, 4, 1e-4F);
  fast({1, 1, 60, 140, 3, false}, 3, 1e-4F);
  fast({1, 1, 2, 260, 9, true}, 1.5, 1e-5F, true);
  fast({1, 1, 30, 129, 10, false}, 1, 1e-4F);
}

// Queries far from their middle, and beyond what a product can tell.
void fasts_far() {
  fast({1, 1, 3, 200, 5, true}, 7, 0);
  fast({1, 1, 3, 200, 1, true}, 500, 0);
  fast({1, 1, 30, 150, 8, true}, 300, 1e-4F);
  fast({2, 1, 5, 140, 2, true}, 1e30, 0, true);
}

// Most pairs are left out.
void fast_areas() { fast({1, 1, 5, 1000, 2, true}, 40, 1e-4F); }

// ---- what is asked of memory -------------------------------------------------------------------
// The work is in proportion to the pairs of points.

constexpr int64_t kPoints = 512;
constexpr double kPairs = (321.0 * 481) * (321.0 * 481) / (kPoints * kPoints);

// Smaller pictures, which are cut into more parts than those here.
double more_parts(size_t here, double parts) {
  return 21 * 64 * 64 * (parts + 1) / static_cast<double>(here);
}

void count(const char* shape, const char* sum_shape, int64_t channels, int64_t dims) {
  const Case c = {1, 1, channels, kPoints, dims, true};
  Array<float> features(1, dims, kPoints, false, "features");
  Array<float> values(1, channels, kPoints, false, "values");
  simt::fill(features.memory, 1);
  simt::fill(values.memory, 2);
  simt::Buffer<float> out(static_cast<size_t>(channels * kPoints), "out");
  const ExactFilterArgs<float> args = arguments(c, features, values, out.data());
  simt::Buffer<float> workspace(pydense::exact_filter_workspace(args) / sizeof(float), "workspace");
  simt::Limits pass{.kernel = "exact_filter_kernel",
                    .minimum_bytes = 4.0 * kPoints * static_cast<double>(dims + 2 * channels)};
  pass.moved = 8;
  pass.reason = "parts of the segments, which larger pictures do not have";
  pass.shape = shape;
  pass.scale = kPairs;
  const double parts = static_cast<double>(workspace.size());
  simt::Limits sum{.kernel = "exact_sum_kernel",
                   .minimum_bytes = 4 * (parts + static_cast<double>(channels * kPoints))};
  sum.shape = sum_shape;
  sum.scale = more_parts(workspace.size() + out.size(), 32);
  simt::counted({pass, sum},
                [&] { pydense::exact_filter_cuda(args, workspace.data(), 0, nullptr); });
}

// Of a pair of runs that is not left out, in a picture of which 29 % of all pairs are not: so many
// were counted of a photo with the bilateral kernel 80, 13 in runs of 64 by 64 points.
constexpr double kNear = 0.29;
constexpr const char* kFastShape = "1x21x321x481, bilateral 80, 13, 29 % of pairs";
constexpr const char* kTwinShape = "1x21x321x481, bilateral 80, 13, 29 % of pairs, sm_90a";
constexpr const char* kScattered = "points are read or written where they are in the picture";

void count_fast() {
  constexpr int64_t kFewer = 1024;
  constexpr double kMore = 321.0 * 481 / kFewer;
  constexpr double kLevels = 13.0 / 5;
  const Case c = {1, 1, 21, kFewer, 5, true};
  Array<float> features(1, c.dims, c.points, false, "features");
  Array<float> values(1, c.channels, c.points, false, "values");
  simt::fill(features.memory, 1);
  simt::fill(values.memory, 2);
  const auto limits_of = [](const char* kernel, double bytes, double scale,
                            const char* shape = kFastShape) {
    simt::Limits limits{.kernel = kernel, .minimum_bytes = bytes};
    limits.shape = shape;
    limits.scale = scale;
    return limits;
  };
  simt::Limits sides = limits_of("order_sides_kernel", 5 * 24.0 * kFewer, kMore * kLevels);
  sides.sectors = 8;
  sides.reason = kScattered;
  simt::Limits keys = limits_of("order_keys_kernel", 5 * 16.0 * kFewer, kMore * kLevels);
  keys.moved = 1.4;
  keys.sectors = 6;
  keys.reason = kScattered;
  simt::Limits finish = limits_of("order_finish_kernel", 45.5 * kFewer, kMore);
  finish.sectors = 8;
  finish.reason = kScattered;
  std::unique_ptr<Ordered> built;
  simt::counted({limits_of("order_begin_kernel", 4.0 * kFewer, kMore), sides, keys, finish},
                [&] { built = std::make_unique<Ordered>(c, features); });
  simt::Buffer<float> out(static_cast<size_t>(c.channels * c.points), "out");
  pydense::ExactFastArgs args{built->order, values.memory.data(), {}, out.data(), 1,
                              c.channels,   c.self_term,          0};
  std::copy_n(values.strides, 3, args.value_strides);
  simt::Buffer<uint32_t> workspace(pydense::exact_fast_workspace(args) / 4, "workspace");
  for (const bool twin : {false, true}) {
    choose_twin(twin);
    const char* const shape = twin ? kTwinShape : kFastShape;
    simt::Limits pack = limits_of("fast_pack_kernel", 4.0 * kFewer * (1 + 21 + 24), kMore, shape);
    simt::Limits pass = limits_of(twin ? "exact_wgmma_kernel" : "exact_fast_kernel",
                                  4.0 * kFewer * (6 + 24 + 2 * 21), kNear * kMore * kMore, shape);
    pass.moved = 4;
    pack.sectors = pass.sectors = 8;
    pack.reason = pass.reason = kScattered;
    simt::Limits sum = limits_of("exact_sum_kernel", 4.0 * kFewer * 21 * 3, 1,
                                 twin ? "1x21x64x64, 8 parts, sm_90a" : "1x21x64x64, 8 parts");
    sum.scale = more_parts(3 * out.size(), 8);
    simt::counted({pack, pass, sum},
                  [&] { pydense::exact_fast_cuda(args, workspace.data(), 0, nullptr); });
  }
  choose_twin(false);
}

void counters() {
  count_fast();
  count("1x21x321x481, 5 features", "1x21x64x64, 5 features, 32 parts", 21, 5);
  count("1x21x321x481, 2 features", "1x21x64x64, 2 features, 32 parts", 21, 2);
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"filters, float", filters<float>},
                             {"filters, double", filters<double>},
                             {"blocks", blocks},
                             {"orders", orders},
                             {"fast", fasts},
                             {"fast, far apart", fasts_far},
                             {"fast, of areas", fast_areas},
                             {"counters", counters, simt::kTrace},
                         });
}
