// SPDX-License-Identifier: Apache-2.0
// Gradients of the dense CRF on a GPU against those of the CPU.
#include "crf_counts.h"
#include "crf_training.h"
#include "dense_crf/feature_gradient.h"

namespace {

using namespace crf_lattices;  // NOLINT(google-build-using-namespace)

template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 1e-10 : 2e-5;

template <class T>
void expect_near(int line, const simt::Buffer<T>& found, const std::vector<T>& expected) {
  double largest = 0;
  for (const T value : expected) {
    largest = std::max(largest, std::fabs(static_cast<double>(value)));
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    simt::expect_close_at(__FILE__, line, static_cast<double>(found[i]),
                          static_cast<double>(expected[i]), 0, kTolerance<T> * (1 + largest), i);
  }
}

template <class T>
void gradient_of(int64_t batch, int64_t labels, int64_t points, int iterations, bool self_term,
                 bool logits, bool start) {
  using enum Normalization;
  const Points<T> bilateral(batch, points, 5, 1);
  const Points<T> gaussian(1, points, 2, 2, 5);
  const Built<T> one = build(bilateral, kSymmetric, self_term);
  const Built<T> other = build(gaussian, kAfter, true);
  Training<T> training(batch, labels, points, iterations, logits, start);
  simt::Buffer<T> compat(static_cast<size_t>(labels * labels), "compat");
  simt::fill(compat, 6, 0.3);
  const std::vector<pydense::DeviceTerm<T>> terms = {
      {one.view(batch, points), Compatibility::kMatrix, compat.data()},
      {other.view(batch, points), Compatibility::kDiagonal, compat.data()},
      {other.view(batch, points), Compatibility::kPotts, compat.data()}};
  simt::Buffer<T> by_matrix(static_cast<size_t>(labels * labels), "gradient by a matrix");
  simt::Buffer<T> by_diagonal(static_cast<size_t>(labels), "gradient by a diagonal");
  simt::Buffer<T> by_weight(1, "gradient by a weight");
  T* const by_compat[] = {by_matrix.data(), by_diagonal.data(), by_weight.data()};
  training.forward(terms);
  training.backward(terms, by_compat, true);

  const int64_t row = pydense::step_width(labels);
  const int64_t image = labels * points;
  const int64_t image_rows = iterations * points * row;
  std::vector<T> unary(training.all());
  std::vector<T> q(training.q.size());
  std::vector<T> kept(training.rows());
  std::vector<T> steps(training.rows());
  std::vector<std::vector<T>> sums(3);
  for (int64_t b = 0; b < batch; ++b) {
    const pydense::Buffer first = build_on_cpu(bilateral, b, kSymmetric, self_term);
    const pydense::Buffer second = build_on_cpu(gaussian, 0, kAfter, true);
    pydense::MeanField<T> field({1, points}, static_cast<int>(labels), pydense::serial_for);
    field.set_unary({training.unary.data() + b * image, points, 1}, true);
    const pydense::LatticeView<T> views[] = {pydense::lattice_at<T>(first.data(), 0),
                                             pydense::lattice_at<T>(second.data(), 0)};
    field.add_pairwise(views[0], Compatibility::kMatrix, compat.data());
    field.add_pairwise(views[1], Compatibility::kDiagonal, compat.data());
    field.add_pairwise(views[1], Compatibility::kPotts, compat.data());
    SIMT_EXPECT(field.row_values() == row);
    std::vector<T> result(static_cast<size_t>(image));
    field.run(iterations, {start ? training.q.data() + b * image : nullptr, points, 1},
              {logits ? MeanFieldOutput::kLogits : MeanFieldOutput::kProbabilities,
               {result.data(), points, 1},
               nullptr},
              kept.data() + b * image_rows);
    std::vector<std::vector<T>> parts = {std::vector<T>(static_cast<size_t>(labels * labels)),
                                         std::vector<T>(static_cast<size_t>(labels)),
                                         std::vector<T>(1)};
    T* const to[] = {parts[0].data(), parts[1].data(), parts[2].data()};
    pydense::MeanFieldGradient<T> gradient{};
    gradient.iterations = iterations;
    gradient.grad = {training.grad.data() + b * image, points, 1};
    if (!logits) {
      gradient.result = {result.data(), points, 1};
    }
    gradient.kept = kept.data() + b * image_rows;
    gradient.unary = {unary.data() + b * image, 1, labels};
    if (start) {
      gradient.q = {q.data() + b * image, 1, labels};
    }
    gradient.steps = steps.data() + b * image_rows;
    gradient.compats = to;
    field.backward(gradient);
    for (size_t k = 0; k < 3; ++k) {
      sums[k].resize(parts[k].size());
      for (size_t i = 0; i < parts[k].size(); ++i) {
        sums[k][i] += parts[k][i];
      }
    }
  }
  expect_near(__LINE__, training.kept, kept);
  expect_near(__LINE__, training.steps, steps);
  expect_near(__LINE__, training.by_unary, unary);
  expect_near(__LINE__, training.by_q, q);
  expect_near(__LINE__, by_matrix, sums[0]);
  expect_near(__LINE__, by_diagonal, sums[1]);
  expect_near(__LINE__, by_weight, sums[2]);
}

template <class T>
void gradients() {
  gradient_of<T>(2, 21, 50, 2, true, false, false);
  gradient_of<T>(1, 2, 60, 2, false, true, false);
  gradient_of<T>(1, 5, 300, 1, false, false, true);
  gradient_of<T>(1, 140, 20, 1, true, false, false);
}

template <class T>
void features_of(int64_t images, int64_t batch, int dims, double scale, int64_t points,
                 int64_t channels, Normalization kind, bool self_term, bool of_lattice,
                 Compatibility compatibility) {
  const Points<T> from(images, points, dims, scale);
  const Built<T> built = build(from, kind, self_term);
  const int64_t image = channels * points;
  const int64_t values = dims * points;
  simt::Buffer<T> a(static_cast<size_t>(batch * image), "a");
  simt::Buffer<T> b(static_cast<size_t>(batch * image), "b");
  simt::Buffer<T> compat(static_cast<size_t>(channels * channels), "compat");
  simt::Buffer<T> out(static_cast<size_t>(images * values), "out");
  simt::fill(a, 11);
  simt::fill(b, 12);
  simt::fill(compat, 13);
  pydense::DeviceFeatureGradientArgs<T> args{};
  args.lattice = built.view(batch, points);
  args.batch = batch;
  args.channels = channels;
  args.features = {from.features.data(), {values, points, 1}};
  args.a = {a.data(), {image, 1, channels}};
  args.b = {b.data(), {image, points, 1}};
  args.compat = compat.data();
  args.kind = compatibility;
  args.of_lattice = of_lattice;
  args.out = out.data();
  const auto workspace = bytes_of(pydense::feature_gradient_workspace(args), "workspace");
  pydense::feature_gradient_cuda(args, workspace->data(), 0, nullptr);
  std::vector<T> expected(out.size());
  std::vector<T> one(static_cast<size_t>(values));
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t own = images == 1 ? 0 : i;
    const pydense::Buffer bytes = build_on_cpu(from, own, kind, self_term);
    const pydense::LatticeView<T> lattice = pydense::lattice_at<T>(bytes.data(), 0);
    pydense::feature_gradient<T>({&lattice,
                                  from.features.data() + own * values,
                                  points,
                                  1,
                                  {a.data() + i * image, 1, channels},
                                  {b.data() + i * image, points, 1},
                                  static_cast<int>(channels),
                                  compat.data(),
                                  compatibility,
                                  of_lattice,
                                  one.data()},
                                 pydense::serial_for);
    for (size_t v = 0; v < one.size(); ++v) {
      expected[static_cast<size_t>(own * values) + v] += one[v];
    }
  }
  expect_near(__LINE__, out, expected);
}

template <class T>
void features() {
  using enum Normalization;
  using enum Compatibility;
  features_of<T>(2, 2, 5, 1, 40, 14, kSymmetric, true, false, kDiagonal);
  features_of<T>(1, 2, 2, 2, 45, 5, kAfter, false, false, kMatrix);
  features_of<T>(1, 1, 9, 0.5, 33, 3, kBefore, true, false, kPotts);
  features_of<T>(1, 1, 32, 0.5, 12, 2, kNone, true, false, kPotts);
  if constexpr (sizeof(T) == sizeof(double)) {  // a check mode
    features_of<T>(2, 2, 5, 1, 40, 7, kSymmetric, true, true, kDiagonal);
    features_of<T>(1, 3, 3, 1, 40, 7, kAfter, true, true, kMatrix);
    features_of<T>(1, 1, 32, 0.5, 12, 2, kBefore, true, true, kPotts);
  }
}

// ---- what is asked of memory -------------------------------------------------------------------

constexpr const char* kPottsShape = "1x21x321x481, bilateral 80, 13, 1 iteration and back";
constexpr const char* kMatrixShape = "1x21x321x481, bilateral 80, 13, matrix, 1 iteration and back";
constexpr const char* kFeatureShape = "1x21x321x481, bilateral 80, 13, features of 1 iteration";
constexpr const char* kCheckShape = "1x21x321x481, bilateral 80, 13, the lattice's own derivative";
constexpr const char* kChunks = "few chunks of the counted part are not whole";

void count_training(const Built<float>& built, Compatibility kind, const char* shape) {
  const int64_t points = kHeight * kWidth;
  Training<float> training(1, kLabels, points, 1, false, false);
  simt::Buffer<float> compat(static_cast<size_t>(kLabels * kLabels), "compat");
  simt::fill(compat, 6);
  simt::Buffer<float> by_compat(static_cast<size_t>(kLabels * kLabels), "gradient");
  const std::vector<pydense::DeviceTerm<float>> terms = {
      {built.view(1, points), kind, compat.data()}};
  const auto vertices = static_cast<double>(terms[0].lattice.counts[0]);
  const auto all = static_cast<double>(points);
  const double row = 96;
  const bool matrix = kind == Compatibility::kMatrix;
  std::vector<simt::Limits> limits = filter_limits(shape, 24, vertices, 2);
  // Backward slices once, and forward where a matrix takes the message from memory; two softmaxes.
  const double slice = all * (row + 52) + vertices * row;
  limits.push_back(limits_of(shape, "mean_field_update_kernel",
                             (matrix ? 2 : 1) * slice + all * (matrix ? 4 : 4 + 52 / row) * row +
                                 (matrix ? 0 : vertices * row)));
  limits.push_back(limits_of(shape, "mean_field_gradient_kernel", all * 8 * row));
  limits.push_back(limits_of(shape, "rows_load_kernel", 3 * all * (row + 4 * kLabels)));
  limits.push_back(limits_of(shape, "rows_store_kernel", 2 * all * (row + 4 * kLabels)));
  limits.push_back(limits_of(shape, "label_chunk_sum_kernel", matrix ? 10 * 8.0 * 441 : 10 * 8, 8,
                             4, "a few numbers for every chunk of points"));
  if (matrix) {
    limits.push_back(limits_of(shape, "label_product_kernel", 5 * all * row, 1.2, 1.3,
                               "wavefronts: a matrix is turned over in shared memory", 1.3));
    limits.push_back(limits_of(shape, "label_outer_kernel", 2 * all * row, 1.3, 1.3, kChunks));
  } else {
    limits.push_back(limits_of(shape, "label_scale_kernel", 3 * all * row));
  }
  float* const to[] = {by_compat.data()};
  simt::counted(limits, [&] {
    training.forward(terms);
    training.backward(terms, to, false);
  });
}

void count_features(const Points<float>& picture, const Built<float>& built, bool of_lattice) {
  const int64_t points = kHeight * kWidth;
  const char* const shape = of_lattice ? kCheckShape : kFeatureShape;
  const auto all = static_cast<double>(points);
  simt::Buffer<float> a(static_cast<size_t>(kLabels * points), "a");
  simt::Buffer<float> b(static_cast<size_t>(kLabels * points), "b");
  simt::Buffer<float> out(static_cast<size_t>(5 * points), "out");
  simt::fill(a, 11);
  simt::fill(b, 12);
  pydense::DeviceFeatureGradientArgs<float> args{};
  args.lattice = built.view(1, points);
  args.batch = 1;
  args.channels = kLabels;
  args.features = {picture.features.data(), {5 * points, points, 1}};
  args.a = {a.data(), {kLabels * points, 1, kLabels}};
  args.b = {b.data(), {kLabels * points, 1, kLabels}};
  args.of_lattice = of_lattice;
  args.out = out.data();
  const auto vertices = static_cast<double>(args.lattice.counts[0]);
  // Rows of 10, 10 and 1 channels and of the norm, each with 5 products; or of 21 and 1.
  const double widths = of_lattice ? 24 + 4 : 64 + 64 + 8 + 8;
  const double groups = of_lattice ? 2 : 4;
  std::vector<simt::Limits> limits = filter_limits(shape, 64, vertices);
  for (simt::Limits& limit : limits) {
    const std::string kernel = limit.kernel;
    const double rows = 2 * 4 * widths;
    limit.moved = kernel == "lattice_splat_long_kernel" ? 25 : limit.moved;
    limit.minimum_bytes = kernel == "lattice_splat_kernel"
                              ? 2 * groups * 48 * all + rows * (all + vertices)
                          : kernel == "lattice_splat_long_kernel"
                              ? 2 * groups * 4 * vertices
                              : 6 * (2 * groups * 8 * vertices + 2 * rows * vertices);
  }
  limits.push_back(limits_of(shape, "feature_load_kernel",
                             2 * all * 4 * (kLabels + 1 + (of_lattice ? 0 : 5 * groups) + widths),
                             1.2, 1.3, "wavefronts: rows of a transposed tile", 3));
  const double sums = 4 * (of_lattice ? 6 : 5);
  const double read = of_lattice ? widths : widths - 16;  // sectors with a or b alone
  const double slices =
      all * (groups * (of_lattice ? 52 : 72) + 8 * (2 * groups - 3)) + 2 * 4 * widths * vertices;
  limits.push_back(
      limits_of(shape, of_lattice ? "feature_corner_kernel" : "feature_difference_kernel",
                slices + all * (2 * 4 * read + (2 * groups - 1) * sums), 1.2, of_lattice ? 8 : 2,
                of_lattice ? "a thread has a row of its own: a check, not made to be fast"
                           : "one number of every channel's row is read again, from the L1 cache",
                of_lattice ? 1.05 : 4));
  limits.push_back(limits_of(shape, "feature_norm_kernel", all * 20));
  if (of_lattice) {
    limits.push_back(limits_of(shape, "feature_simplex_kernel", all * (20 + 20 + sums), 1.2, 6,
                               "a thread reads the sums of its corners; and indexes its ranks",
                               1.3));
  } else {
    limits.push_back(limits_of(shape, "feature_store_kernel", all * (20 + sums), 1.2, 6,
                               "a thread reads the sums of its point"));
  }
  const auto workspace = bytes_of(pydense::feature_gradient_workspace(args), "workspace");
  simt::counted(limits,
                [&] { pydense::feature_gradient_cuda(args, workspace->data(), 0, nullptr); });
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  Points<float> picture(1, kHeight * kWidth, 5, 0);
  fill_picture(picture);
  const Built<float> built = build(picture, Normalization::kSymmetric, true);
  count_training(built, Compatibility::kPotts, kPottsShape);
  count_training(built, Compatibility::kMatrix, kMatrixShape);
  count_features(picture, built, false);
  count_features(picture, built, true);
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"gradients, float", gradients<float>},
                             {"gradients, double", gradients<double>},
                             {"features, float", features<float>},
                             {"features, double", features<double>},
                             {"counters", counters, simt::kTrace},
                         });
}
