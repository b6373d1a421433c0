// SPDX-License-Identifier: Apache-2.0
// The lattice on a GPU against that of the CPU: the same simplices and weights bit for bit, filters
// and mean-field updates to rounding.
#include <map>

#include "crf_counts.h"

namespace {

using namespace crf_lattices;  // NOLINT(google-build-using-namespace)

// Simplices are the same where corners share vertices in both lattices or in neither.
template <class T>
void geometry_of(const Points<T>& from, int words) {
  const Built<T> built = build(from, Normalization::kNone, true);
  SIMT_EXPECT(built.words == words || words == 0);
  const DeviceLattice<T> ours = built.view(from.images, from.points);
  SIMT_EXPECT(ours.shape.images == from.images && ours.shape.dims == from.dims);
  int64_t vertices = 0;
  std::map<int64_t, int64_t> owner;  // of our vertices, the CPU's
  for (int64_t image = 0; image < from.images; ++image) {
    const pydense::Buffer bytes = build_on_cpu(from, image, Normalization::kNone, true);
    const pydense::LatticeView<T> theirs = pydense::lattice_at<T>(bytes.data(), 0);
    for (int64_t p = 0; p < from.points; ++p) {
      for (int64_t r = 0; r <= from.dims; ++r) {
        const int64_t at = r * from.images * from.points + image * from.points + p;
        const int64_t corner = p * (from.dims + 1) + r;
        const int64_t id = pydense::has_short_ids(from.dims)
                               ? static_cast<const uint16_t*>(theirs.ids)[corner]
                               : static_cast<const int32_t*>(theirs.ids)[corner];
        SIMT_EXPECT(std::memcmp(&ours.weights[at], &theirs.weights[corner], sizeof(T)) == 0);
        const auto known = owner.emplace(ours.ids[at], vertices + id);
        SIMT_EXPECT(known.first->second == vertices + id);
      }
    }
    vertices += theirs.num_vertices;
  }
  SIMT_EXPECT(ours.counts[0] == vertices && static_cast<int64_t>(owner.size()) == vertices);
}

template <class T>
void geometry() {
  geometry_of(Points<T>(2, 90, 1, 3), 1);
  geometry_of(Points<T>(1, 90, 2, 30), 1);
  geometry_of(Points<T>(3, 150, 5, 1), 1);
  geometry_of(Points<T>(1, 40, 9, 2), 0);
  geometry_of(Points<T>(2, 40, 4, 50000), 2);
  geometry_of(Points<T>(2, 20, 32, 0.5), 0);
}

void refuses() {
  for (const float bad : {NAN, INFINITY, -INFINITY, 1e9F}) {
    Points<float> points(2, 300, 3, 1);
    points.features[1700] = bad;
    bool refused = false;
    try {
      build(points, Normalization::kNone, true);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    SIMT_EXPECT(refused);
  }
}

template <class T>
constexpr double kTolerance = sizeof(T) == 8 ? 1e-11 : 1e-5;

// values: [batch, channels, points], channels last where `last`.
template <class T>
void filter_of(const Points<T>& from, int64_t batch, int64_t channels, Normalization kind,
               bool self_term, bool reverse, bool last = false) {
  const Built<T> built = build(from, kind, self_term);
  const int64_t all = batch * channels * from.points;
  simt::Buffer<T> values(static_cast<size_t>(all), "values");
  simt::Buffer<T> out(static_cast<size_t>(all), "out");
  simt::fill(values, 3);
  const int64_t image = channels * from.points;
  const int64_t channel = last ? 1 : from.points;
  const int64_t point = last ? channels : 1;
  pydense::DeviceFilterArgs<T> args = {built.view(batch, from.points),
                                       batch,
                                       channels,
                                       {values.data(), {image, channel, point}},
                                       {out.data(), {image, channel, point}},
                                       reverse};
  const auto workspace = bytes_of(pydense::filter_workspace(args), "workspace");
  pydense::filter_lattice_cuda(args, workspace->data(), 0, nullptr);
  std::vector<T> expected(static_cast<size_t>(image));
  for (int64_t b = 0; b < batch; ++b) {
    const pydense::Buffer bytes = build_on_cpu(from, from.images == 1 ? 0 : b, kind, self_term);
    const pydense::LatticeView<T> lattice = pydense::lattice_at<T>(bytes.data(), 0);
    pydense::filter_lattice<T>(
        {&lattice, values.data() + b * image, expected.data(), static_cast<int>(channels), channel,
         point, channel, point, reverse},
        pydense::serial_for);
    for (int64_t i = 0; i < image; ++i) {
      const auto want = static_cast<double>(expected[static_cast<size_t>(i)]);
      simt::expect_close_at(__FILE__, __LINE__,
                            static_cast<double>(out[static_cast<size_t>(b * image + i)]), want,
                            kTolerance<T>, kTolerance<T> * 10, static_cast<size_t>(i));
    }
  }
}

template <class T>
void filters() {
  using enum Normalization;
  filter_of(Points<T>(2, 70, 5, 1), 2, 21, kSymmetric, true, false);
  filter_of(Points<T>(1, 70, 2, 3), 3, 3, kBefore, false, true, true);
  filter_of(Points<T>(2, 50, 3, 2), 2, 1, kAfter, false, false);
  filter_of(Points<T>(1, 60, 9, 0.5), 1, 9, kNone, false, true);
  filter_of(Points<T>(1, 33, 1, 2), 2, 130, kNone, true, false);
}

// All points in one place: the chunks of a vertex, thousands of corners.
void long_vertices() {
  Points<float> points(1, 9000, 2, 0);
  filter_of(points, 1, 3, Normalization::kAfter, true, false);
  filter_of(Points<float>(1, 700, 2, 1), 2, 300, Normalization::kSymmetric, true, false);
}

template <class T>
void field_of(int64_t batch, int64_t labels, int64_t points, int iterations, int copies,
              MeanFieldOutput kind, bool self_term, bool start) {
  const Points<T> bilateral(batch, points, 5, 1);
  const Points<T> gaussian(1, points, 2, 2, 5);
  const Built<T> one = build(bilateral, Normalization::kSymmetric, self_term);
  const Built<T> other = build(gaussian, Normalization::kAfter, true);
  const auto image = static_cast<size_t>(labels * points);
  const auto all = static_cast<size_t>(batch) * image;
  simt::Buffer<T> unary(all, "unary");
  simt::Buffer<T> q(start ? all : 0, "q");
  simt::Buffer<T> out(kind == MeanFieldOutput::kLabels ? 0 : all, "out");
  simt::Buffer<int64_t> out_labels(
      kind == MeanFieldOutput::kLabels ? static_cast<size_t>(batch * points) : 0, "labels");
  simt::fill(unary, 4, 2);
  for (T& x : q) {
    x = T{1} / static_cast<T>(labels);
  }
  simt::Buffer<T> compat(static_cast<size_t>(labels * labels), "compat");
  simt::fill(compat, 6);
  std::vector<pydense::DeviceTerm<T>> terms;
  for (int k = 0; k < copies; ++k) {
    terms.push_back({one.view(batch, points), Compatibility::kMatrix, compat.data()});
    terms.push_back({other.view(batch, points), Compatibility::kDiagonal, compat.data()});
    terms.push_back({other.view(batch, points), Compatibility::kPotts, compat.data() + 1});
  }
  const int64_t size = labels * points;
  const pydense::DeviceMeanFieldArgs<T> args = {batch,
                                                labels,
                                                points,
                                                terms.data(),
                                                static_cast<int>(terms.size()),
                                                {unary.data(), {size, points, 1}},
                                                true,
                                                {start ? q.data() : nullptr, {size, points, 1}},
                                                iterations,
                                                kind,
                                                {out.data(), {size, 1, labels}},
                                                out_labels.data()};
  const auto workspace = bytes_of(pydense::mean_field_workspace(args), "workspace");
  pydense::mean_field_cuda(args, workspace->data(), 0, nullptr);
  std::vector<T> expected(image);
  std::vector<int64_t> expected_labels(static_cast<size_t>(points));
  for (int64_t b = 0; b < batch; ++b) {
    const pydense::Buffer first = build_on_cpu(bilateral, b, Normalization::kSymmetric, self_term);
    const pydense::Buffer second = build_on_cpu(gaussian, 0, Normalization::kAfter, true);
    pydense::MeanField<T> field({1, points}, static_cast<int>(labels), pydense::serial_for);
    field.set_unary({unary.data() + b * size, points, 1}, true);
    for (int k = 0; k < copies; ++k) {
      field.add_pairwise(pydense::lattice_at<T>(first.data(), 0), Compatibility::kMatrix,
                         compat.data());
      field.add_pairwise(pydense::lattice_at<T>(second.data(), 0), Compatibility::kDiagonal,
                         compat.data());
      field.add_pairwise(pydense::lattice_at<T>(second.data(), 0), Compatibility::kPotts,
                         compat.data() + 1);
    }
    field.run(iterations, {start ? q.data() + b * size : nullptr, points, 1},
              {kind, {expected.data(), 1, labels}, expected_labels.data()});
    for (size_t i = 0; kind != MeanFieldOutput::kLabels && i < image; ++i) {
      simt::expect_close_at(__FILE__, __LINE__,
                            static_cast<double>(out[static_cast<size_t>(b) * image + i]),
                            static_cast<double>(expected[i]), kTolerance<T>, kTolerance<T>, i);
    }
    for (int64_t p = 0; kind == MeanFieldOutput::kLabels && p < points; ++p) {
      SIMT_EXPECT(out_labels[static_cast<size_t>(b * points + p)] ==
                  expected_labels[static_cast<size_t>(p)]);
    }
  }
}

template <class T>
void fields() {
  using enum MeanFieldOutput;
  field_of<T>(2, 21, 50, 2, 1, kProbabilities, true, false);
  field_of<T>(1, 2, 60, 1, 2, kLogits, false, false);
  field_of<T>(2, 5, 37, 1, 1, kLabels, false, true);
  field_of<T>(1, 140, 20, 1, 2, kProbabilities, false, false);
  field_of<T>(1, 1, 20, 0, 1, kProbabilities, true, false);
}

// ---- what is asked of memory -------------------------------------------------------------------

constexpr const char* kBuildShape = "1x5x321x481, bilateral 80, 13";
constexpr const char* kKeysShape = "1x9x321x481, keys of two words";
constexpr const char* kFieldShape = "1x21x321x481, bilateral 80, 13, 1 iteration";
constexpr const char* kShared = "wavefronts: a thread indexes its ranks and coordinates";

// Counting the vertices with keys of two words.
void count_keys(const Points<float>& picture) {
  Points<float> wide(1, picture.points, 9, 0);
  for (int64_t i = 0; i < 9 * picture.points; ++i) {
    const int64_t from = i % (5 * picture.points);
    const float factor = i < 5 * picture.points ? 1 : 40;
    wide.features[static_cast<size_t>(i)] = factor * picture.features[static_cast<size_t>(from)];
  }
  const double points = kHeight * kWidth;
  const double corners = 10 * points;
  const DeviceLatticeShape shape = {1, wide.points, 9, false, false, false};
  const auto memory = bytes_of(pydense::count_workspace(shape, 2, sizeof(float)), "counted");
  simt::counted(
      {
          limits_of(kKeysShape, "lattice_bounds_kernel", 36 * points),
          limits_of(kKeysShape, "lattice_plan_kernel", 20 * 160),
          limits_of(kKeysShape, "lattice_embed_kernel", 36 * points + 24 * corners, 1.2, 1.3,
                    kShared, 1.2),
          limits_of(kKeysShape, "lattice_gather_keys_kernel", 20 * corners, 1.2, 2.2, kGather),
          limits_of(kKeysShape, "lattice_heads_kernel", 16 * corners, 1.2, 2.8, kGather),
      },
      [&] {
        const pydense::VertexCount count = pydense::count_vertices_cuda<float>(
            {wide.features.data(), shape, {9 * wide.points, wide.points, 1}}, 2, memory->data(), 0,
            nullptr);
        SIMT_EXPECT(count.words == 2);
      });
}

void count_field(const Built<float>& built, std::vector<simt::Limits> limits) {
  const int64_t points = kHeight * kWidth;
  simt::Buffer<float> unary(static_cast<size_t>(kLabels * points), "unary");
  simt::Buffer<float> out(static_cast<size_t>(kLabels * points), "out");
  simt::Buffer<float> compat(std::vector<double>{10}, "compat");
  simt::fill(unary, 9);
  const DeviceLattice<float> lattice = built.view(1, points);
  const pydense::DeviceTerm<float> term = {lattice, Compatibility::kPotts, compat.data()};
  const pydense::DeviceMeanFieldArgs<float> args = {1,
                                                    kLabels,
                                                    points,
                                                    &term,
                                                    1,
                                                    {unary.data(), {kLabels * points, points, 1}},
                                                    false,
                                                    {nullptr, {0, 0, 0}},
                                                    1,
                                                    MeanFieldOutput::kProbabilities,
                                                    {out.data(), {kLabels * points, points, 1}},
                                                    nullptr};
  const auto workspace = bytes_of(pydense::mean_field_workspace(args), "workspace");
  const auto vertices = static_cast<double>(lattice.counts[0]);
  const double all = static_cast<double>(points);
  const double row = 96;
  // Two updates: the first is the softmax of the unary alone.
  limits.push_back(
      limits_of(kFieldShape, "mean_field_update_kernel", all * (4 * row + 52) + vertices * row));
  limits.push_back(limits_of(kFieldShape, "rows_load_kernel", all * (row + 4 * kLabels)));
  limits.push_back(limits_of(kFieldShape, "rows_store_kernel", all * (row + 4 * kLabels)));
  simt::counted(limits, [&] { pydense::mean_field_cuda(args, workspace->data(), 0, nullptr); });
}

void counters() {
  if (simt::config().order != simt::Order::kForward) {
    return;  // nothing is counted then
  }
  Points<float> picture(1, kHeight * kWidth, 5, 0);
  fill_picture(picture);
  const double points = kHeight * kWidth;
  const double corners = 6 * points;
  Built<float> built = build(picture, Normalization::kSymmetric, true);
  const auto vertices = static_cast<double>(built.view(1, kHeight * kWidth).counts[0]);
  std::vector<simt::Limits> building = filter_limits(kBuildShape, 4, vertices);
  for (const simt::Limits& limits : {
           limits_of(kBuildShape, "lattice_bounds_kernel", 20 * points),
           limits_of(kBuildShape, "lattice_plan_kernel", 20 * 96),
           limits_of(kBuildShape, "lattice_embed_kernel", 20 * points + 16 * corners, 1.2, 1.3,
                     kShared, 1.2),
           limits_of(kBuildShape, "lattice_heads_kernel", 16 * corners, 1.2, 2, kGather),
           limits_of(kBuildShape, "lattice_number_kernel", 28 * corners, 1.2, 1.7, kGather),
           limits_of(kBuildShape, "lattice_link_kernel", 60 * vertices, 1.5, 1.5,
                     "bisection in the sorted keys; vertices with the padding"),
           limits_of(kBuildShape, "lattice_chunk_kernel", 20 * vertices, 1.3, 1.5,
                     "bisection among the vertices"),
           limits_of(kBuildShape, "lattice_norm_kernel", 8 * corners + 4 * points, 1.2, 1.8,
                     kGather),
       }) {
    building.push_back(limits);
  }
  simt::counted(building, [&] { built = build(picture, Normalization::kSymmetric, true); });
  count_keys(picture);
  count_field(built, filter_limits(kFieldShape, 24, vertices));
}

}  // namespace

int main(int argc, char** argv) {
  return simt::run_cases(argc, argv,
                         {
                             {"geometry, float", geometry<float>},
                             {"geometry, double", geometry<double>},
                             {"features that are refused", refuses},
                             {"filters, float", filters<float>},
                             {"filters, double", filters<double>},
                             {"long vertices", long_vertices},
                             {"mean fields, float", fields<float>},
                             {"mean fields, double", fields<double>},
                             {"counters", counters, simt::kTrace},
                         });
}
