// SPDX-License-Identifier: Apache-2.0
// As on the CPU: a few channels at a time, filter b ahead and a back, put together at the points
// what came back; the normaliser n = K 1 follows as one more channel.
#include <algorithm>

#include "common/carver.h"
#include "dense_crf/device_gradient.h"
#include "dense_crf/feature_gradient_kernels.cuh"
#include "dense_crf/mean_field_launch.cuh"

namespace pydense {
namespace {

constexpr int kRowNumbers = 64;  // of the rows that are filtered, at most; or of one channel

template <class T>
struct FeatureSpace {
  int per_channel;
  int group;  // channels at a time
  int64_t width;
  int64_t by;  // sums of a point
  T* a;        // [batch, points, width]
  T* b;
  T* ahead;  // [copies, capacity, width]
  T* back;
  T* other;
  T* parts;
  T* sums;     // [batch, points, by]
  T* norms;    // [2, batch, points], or null
  T* rows;     // [batch, points, row of the channels] a, or null
  T* through;  // as many: C^T a
  size_t bytes;

  FeatureSpace(const DeviceFeatureGradientArgs<T>& args, void* memory) {
    const DeviceLattice<T>& lattice = args.lattice;
    const int dims = lattice.shape.dims;
    per_channel = args.of_lattice ? 1 : dims + 1;
    group = static_cast<int>(
        std::clamp<int64_t>(args.channels, 1, std::max(1, kRowNumbers / per_channel)));
    width = device_row_width(int64_t{group} * per_channel, sizeof(T));
    by = args.of_lattice ? dims + 1 : dims;
    const int64_t points = args.batch * lattice.shape.points;
    const int64_t copies = copies_of(lattice, args.batch);
    Carver carver(memory);
    a = carver.take<T>(points * width);
    b = carver.take<T>(points * width);
    ahead = carver.take<T>(copies * lattice.capacity * width);
    back = carver.take<T>(copies * lattice.capacity * width);
    other = carver.take<T>(copies * lattice.capacity * width);
    parts = carver.take<T>(copies * lattice.chunk_capacity * width);
    sums = carver.take<T>(points * by);
    const bool normalized = lattice.splat_norm != nullptr || lattice.slice_norm != nullptr;
    T* const memory_of_norms = carver.take<T>(normalized ? 2 * points : 0);
    norms = normalized ? memory_of_norms : nullptr;
    const bool matrix = args.compat != nullptr && args.kind == Compatibility::kMatrix;
    const int64_t row = matrix ? device_row_width(args.channels, sizeof(T)) : 0;
    rows = carver.take<T>(points * row);
    through = carver.take<T>(points * row);
    bytes = carver.used();
  }
};

template <class T>
class FeatureGradient {
 public:
  FeatureGradient(const DeviceFeatureGradientArgs<T>& args, void* workspace, int device,
                  void* stream)
      : args_(args),
        space_(args, workspace),
        points_(args.batch * args.lattice.shape.points),
        device_(device),
        stream_(stream) {}

  void run() {
    const DeviceLattice<T>& lattice = args_.lattice;
    const int64_t points = lattice.shape.points;
    DeviceArray<const T> a = args_.a;
    const T* compat = args_.compat;
    if (compat != nullptr && args_.kind == Compatibility::kMatrix) {
      a = through_matrix();
      compat = nullptr;
    }
    const int stride = args_.kind == Compatibility::kDiagonal ? 1 : 0;
    for (int64_t first = 0; first < args_.channels; first += space_.group) {
      const auto channels =
          static_cast<int>(std::min<int64_t>(space_.group, args_.channels - first));
      DeviceArray<const T> one = a;
      DeviceArray<const T> other = args_.b;
      one.data += first * one.strides[1];
      other.data += first * other.strides[1];
      const T* const factors = compat == nullptr ? nullptr : compat + first * stride;
      filter(channels, one, other, factors, stride, first == 0, space_.norms);
    }
    if (space_.norms != nullptr) {
      const FeatureNormParams<T> p = {lattice.splat_norm, lattice.slice_norm,
                                      lattice.shape.all_points(), points_, space_.norms};
      PYDENSE_LAUNCH(feature_norm_kernel<T>, over(points_), p);
      filter(1, {space_.norms, {points, 0, 1}}, {space_.norms + points_, {points, 0, 1}}, nullptr,
             0, false, nullptr);
    }
    write();
  }

 private:
  LaunchConfig over(int64_t items) const {
    const int64_t blocks = ceil_div(items, int64_t{kFeatureThreads});
    PYDENSE_CHECK(blocks <= INT32_MAX,
                  "feature_gradient: a batch must have fewer than 2^33 points");
    return {dim3(static_cast<unsigned>(blocks)), dim3(kFeatureThreads), 0, device_, stream_};
  }

  DeviceArray<const T> through_matrix() const {
    const int64_t points = args_.lattice.shape.points;
    const int64_t row = device_row_width(args_.channels, sizeof(T));
    load_rows(args_.a, args_.batch, args_.channels, points, T{1}, T{0}, space_.rows, row, device_,
              stream_);
    launch_product<T>({space_.rows, args_.compat, true, nullptr, space_.through, points_,
                       args_.channels, static_cast<int>(row / kRowVector<T>)},
                      device_, stream_);
    return {space_.through, {points * row, 1, row}};
  }

  FeaturePoints<T> features() const {
    const DeviceLatticeShape& shape = args_.lattice.shape;
    FeaturePoints<T> points{};
    points.data = args_.features.data;
    std::copy_n(args_.features.strides, 3, points.strides);
    points.images = shape.images;
    points.points = shape.points;
    points.dims = shape.dims;
    return points;
  }

  void load(const DeviceArray<const T>& values, const T* compat, int stride, int channels,
            int64_t width, T* rows) const {
    FeatureLoadParams<T> p{};
    p.features = features();
    p.per_channel = space_.per_channel;
    p.values = values.data;
    std::copy_n(values.strides, 3, p.strides);
    p.compat = compat;
    p.compat_stride = stride;
    p.channels = channels;
    p.point_tiles = ceil_div(p.features.points, int64_t{kFeatureTile});
    p.width = width;
    p.rows = rows;
    const int64_t blocks = args_.batch * p.point_tiles;
    PYDENSE_CHECK(blocks <= INT32_MAX,
                  "feature_gradient: a batch must have fewer than 2^36 points");
    const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), dim3(kFeatureThreads),
                                 feature_load_numbers(channels, p.features.dims) * sizeof(T),
                                 device_, stream_};
    PYDENSE_LAUNCH(feature_load_kernel<T>, config, p);
  }

  void filter(int channels, const DeviceArray<const T>& a, const DeviceArray<const T>& b,
              const T* compat, int stride, bool first, T* norms) const {
    const DeviceLattice<T>& lattice = args_.lattice;
    const int64_t width = device_row_width(int64_t{channels} * space_.per_channel, sizeof(T));
    const int64_t copies = copies_of(lattice, args_.batch);
    load(a, compat, stride, channels, width, space_.a);
    load(b, nullptr, 0, channels, width, space_.b);
    splat_and_blur<T>({lattice, space_.b, lattice.splat_norm, copies, width, false},
                      {space_.ahead, space_.other, space_.parts}, device_, stream_);
    splat_and_blur<T>({lattice, space_.a, lattice.slice_norm, copies, width, true},
                      {space_.back, space_.other, space_.parts}, device_, stream_);
    FeatureSumParams<T> p{};
    p.ahead = term_of<T>(lattice, space_.ahead, lattice.slice_norm);
    p.back = term_of<T>(lattice, space_.back, lattice.splat_norm);
    p.ahead.self = nullptr;
    p.back.self = nullptr;
    p.self = lattice.self;
    p.features = features();
    p.a = space_.a;
    p.b = space_.b;
    p.channels = channels;
    p.vectors = static_cast<int>(width / kRowVector<T>);
    p.lanes = lanes_of(p.vectors);
    p.points = points_;
    p.first = first;
    p.sums = space_.sums;
    p.norms = norms;
    if (args_.of_lattice) {
      PYDENSE_LAUNCH(feature_corner_kernel<T>, over(points_), p);
    } else {
      PYDENSE_LAUNCH(feature_difference_kernel<T>, over(points_ * p.lanes), p);
    }
  }

  void write() const {
    const DeviceLatticeShape& shape = args_.lattice.shape;
    const auto copies = static_cast<int>(copies_of(args_.lattice, args_.batch));
    if (!args_.of_lattice) {
      const FeatureStoreParams<T> p = {space_.sums, shape.all_points(), shape.points, shape.dims,
                                       copies,      args_.out};
      PYDENSE_LAUNCH(feature_store_kernel<T>, over(shape.all_points()), p);
      return;
    }
    FeatureSimplexParams<T> p{};
    p.embed.data = args_.features.data;
    std::copy_n(args_.features.strides, 3, p.embed.strides);
    p.embed.points = shape.points;
    p.embed.all_points = shape.all_points();
    p.embed.dims = shape.dims;
    portable::lattice_scale(shape.dims, p.embed.scale);
    p.sums = space_.sums;
    p.copies = copies;
    p.out = args_.out;
    const LaunchConfig config = {
        dim3(static_cast<unsigned>(ceil_div(shape.all_points(), kEmbedThreads<T>))),
        dim3(kEmbedThreads<T>), embed_bytes<T>(shape.dims), device_, stream_};
    PYDENSE_LAUNCH(feature_simplex_kernel<T>, config, p);
  }

  const DeviceFeatureGradientArgs<T>& args_;
  const FeatureSpace<T> space_;
  const int64_t points_;
  const int device_;
  void* const stream_;
};

}  // namespace

template <class T>
size_t feature_gradient_workspace(const DeviceFeatureGradientArgs<T>& args) {
  return FeatureSpace<T>(args, nullptr).bytes;
}

template <class T>
void feature_gradient_cuda(const DeviceFeatureGradientArgs<T>& args, void* workspace, int device,
                           void* stream) {
  PYDENSE_CHECK(
      !args.of_lattice || args.lattice.self == nullptr,
      "dense_crf_feature_gradient: the derivative of the lattice itself must be asked for "
      "with self_term=True");
  FeatureGradient<T>(args, workspace, device, stream).run();
}

#define PYDENSE_INSTANTIATE(T)                                                     \
  template size_t feature_gradient_workspace(const DeviceFeatureGradientArgs<T>&); \
  template void feature_gradient_cuda(const DeviceFeatureGradientArgs<T>&, void*, int, void*);
PYDENSE_INSTANTIATE(float)
PYDENSE_INSTANTIATE(double)
#undef PYDENSE_INSTANTIATE

}  // namespace pydense
