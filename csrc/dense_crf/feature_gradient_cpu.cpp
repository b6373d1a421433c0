// SPDX-License-Identifier: Apache-2.0
// A few channels at a time: splat b and a (with their products with the features), blur one in the
// order of the axes and the other against it, and put together at every point what comes back. The
// normaliser n = K 1 follows as one more channel.
#include <algorithm>
#include <cstring>

#include "common/simd.h"
#include "dense_crf/feature_gradient.h"
#include "dense_crf/feature_gradient_math.h"
#include "dense_crf/lattice_rows.h"
#include "dense_crf/permutohedral_math.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int kMaxCorners = kMaxLatticeDims + 1;

template <class T, bool OfLattice>
class FeatureGradient {
 public:
  FeatureGradient(const FeatureGradientArgs<T>& args, ParallelFor parallel_for)
      : args_(args),
        lattice_(*args.lattice),
        parallel_for_(parallel_for),
        dims_(lattice_.dims),
        per_channel_(OfLattice ? 1 : dims_ + 1),
        points_(lattice_.num_points()),
        group_(std::max(1, std::min(args.channels, kRowValues / per_channel_))),
        width_(row_width(group_ * per_channel_)),
        through_compat_(apply_compat()),
        forward_(new_rows()),
        backward_(new_rows()),
        sums_(zeros(points_ * (OfLattice ? dims_ + 1 : dims_))),
        norms_(zeros(lattice_.splat_norm || lattice_.slice_norm ? 4 * points_ : 0)) {}

  void run() {
    for (int first = 0; first < args_.channels; first += group_) {
      run_group(
          std::min(group_, args_.channels - first),
          [&](int64_t pixel, int64_t, int c) { return a_at(pixel, first + c); },
          [&](int64_t pixel, int64_t, int c) {
            return args_.b.data[(first + c) * args_.b.label_stride + pixel * args_.b.point_stride];
          },
          true);
    }
    if (norms_.data() != nullptr) {
      normalizer();
      const T* a = norms_.template as<T>() + 2 * points_;
      run_group(
          1, [&](int64_t, int64_t p, int) { return a[p]; },
          [&](int64_t, int64_t p, int) { return a[points_ + p]; }, false);
    }
    write();
  }

 private:
  static constexpr int kRowValues = sizeof(T) == sizeof(float) ? 32 : 16;

  Buffer new_rows() const {
    return buffer_of<T>(
        checked_bytes(static_cast<size_t>(lattice_.num_rows), static_cast<size_t>(width_)));
  }
  static Buffer zeros(int64_t count) {
    Buffer buffer = buffer_of<T>(static_cast<size_t>(count));
    if (count > 0) {
      std::fill(buffer.as<T>(), buffer.as<T>() + count, T{0});
    }
    return buffer;
  }

  // C^T a for a matrix, [pixels, channels].
  Buffer apply_compat() const {
    if (args_.compat == nullptr || args_.kind != Compatibility::kMatrix) {
      return Buffer();
    }
    const int64_t channels = args_.channels;
    Buffer buffer =
        buffer_of<T>(checked_bytes(static_cast<size_t>(points_), static_cast<size_t>(channels)));
    T* const rows = buffer.as<T>();
    parallel_tasks(parallel_for_, ceil_div(points_, kVertexChunk), [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kVertexChunk, points_);
      for (int64_t pixel = task * kVertexChunk; pixel < end; ++pixel) {
        T* row = rows + pixel * channels;
        std::fill(row, row + channels, T{0});
        for (int64_t l = 0; l < channels; ++l) {
          const T a = args_.a.data[l * args_.a.label_stride + pixel * args_.a.point_stride];
          for (int64_t m = 0; m < channels; ++m) {
            row[m] += args_.compat[l * channels + m] * a;
          }
        }
      }
    });
    return buffer;
  }

  PYDENSE_HD T a_at(int64_t pixel, int64_t c) const {
    if (through_compat_.data() != nullptr) {
      return through_compat_.template as<T>()[pixel * args_.channels + c];
    }
    const T a = args_.a.data[c * args_.a.label_stride + pixel * args_.a.point_stride];
    if (args_.compat == nullptr) {
      return a;
    }
    return a * args_.compat[args_.kind == Compatibility::kDiagonal ? c : 0];
  }

  PYDENSE_HD void load_features(int64_t pixel, T* f) const {
    for (int m = 0; m < dims_; ++m) {
      f[m] = args_.features[m * args_.dim_stride + pixel * args_.point_stride];
    }
  }

  // Calls work(band index, run of one point, corners) for all points, bands in parallel.
  template <class Begin, class Work>
  void for_each_point(const Begin& begin, const Work& work) const {
    const BandGrid bands(lattice_.grid);
    with_corners(lattice_.dims, [&](auto corners) {
      const BandCorners<T, decltype(corners)::value> points(lattice_);
      parallel_tasks(parallel_for_, bands.count(), [&](int64_t b) {
        begin(b);
        for_each_run(bands.at(b), 1, [&](const Run& run) { work(b, run, points); });
      });
    });
  }

  template <class A, class B>
  void run_group(int channels, const A& a, const B& b, bool normalize) {
    const int width = row_width(channels * per_channel_);
    with_piece<T, 1>(width, [&](auto piece) {
      splat<decltype(piece)::value>(channels, width, a, b);
      const LatticeRows<T> forward = {lattice_, width, forward_.template as<T>()};
      const LatticeRows<T> backward = {lattice_, width, backward_.template as<T>()};
      merge_and_blur_cpu(forward, false, parallel_for_);
      merge_and_blur_cpu(backward, true, parallel_for_);
      if constexpr (OfLattice) {
        add_corners(channels, width, a, b, normalize);
      } else {
        add_differences<decltype(piece)::value>(channels, width, a, b, normalize);
      }
    });
  }

  template <int Piece, class A, class B>
  void splat(int channels, int width, const A& a, const B& b) const {
    const auto clear = [&](int64_t band) {
      clear_band<T>({lattice_, width, forward_.template as<T>()}, band);
      clear_band<T>({lattice_, width, backward_.template as<T>()}, band);
    };
    for_each_point(clear, [&](int64_t band, const Run& run, const auto& corners) {
      const int64_t p = run.point;
      const int64_t at = lattice_.band_rows[band] * width;
      T f[kMaxLatticeDims];
      load_features(run.pixel, f);
      const auto add = [&](const auto& value, const T* norm, T* rows) {
        alignas(64) T row[kMaxRow] = {};
        for (int c = 0; c < channels; ++c) {
          const T v = value(run.pixel, p, c) * (norm == nullptr ? T{1} : norm[p]);
          T* to = row + c * per_channel_;
          to[0] = v;
          for (int m = 1; m < per_channel_; ++m) {
            to[m] = v * f[m - 1];
          }
        }
        for (int c = 0; c < width; c += Piece) {
          corners.template splat<Piece>(p, Row<T, Piece>::load_from(row + c), width, rows + at + c);
        }
      };
      add(b, lattice_.splat_norm, forward_.template as<T>());
      add(a, lattice_.slice_norm, backward_.template as<T>());
    });
  }

  // sums_ += a (K(b f) - f K b) + b (K^T(a f) - f K^T a), [points, dims].
  template <int Piece, class A, class B>
  void add_differences(int channels, int width, const A& a, const B& b, bool normalize) const {
    for_each_point(
        [](int64_t) {},
        [&](int64_t band, const Run& run, const auto& corners) {
          const int64_t p = run.point;
          const int64_t at = lattice_.band_rows[band] * width;
          T f[kMaxLatticeDims];
          load_features(run.pixel, f);
          alignas(64) T ahead[kMaxRow];
          alignas(64) T back[kMaxRow];
          for (int c = 0; c < width; c += Piece) {
            (corners.template slice<Piece>(p, width, forward_.template as<T>() + at + c) *
             factor(lattice_.slice_norm, p))
                .store_to(ahead + c);
            (corners.template slice<Piece>(p, width, backward_.template as<T>() + at + c) *
             factor(lattice_.splat_norm, p))
                .store_to(back + c);
          }
          T* sum = sums_.template as<T>() + p * dims_;
          for (int c = 0; c < channels; ++c) {
            const T* one = ahead + c * per_channel_;
            const T* other = back + c * per_channel_;
            const T av = a(run.pixel, p, c);
            const T bv = b(run.pixel, p, c);
            for (int m = 0; m < dims_; ++m) {
              sum[m] += av * (one[m + 1] - f[m] * one[0]) + bv * (other[m + 1] - f[m] * other[0]);
            }
            if (normalize) {
              add_to_norm(p, av, bv, one[0], other[0]);
            }
          }
        });
  }

  // sums_ += dL/dweight, [points, dims + 1].
  template <class A, class B>
  void add_corners(int channels, int width, const A& a, const B& b, bool normalize) const {
    for_each_point([](int64_t) {},
                   [&](int64_t band, const Run& run, const auto& corners) {
                     const int64_t p = run.point;
                     const int n = corners.corners();
                     const int64_t at = lattice_.band_rows[band] * width;
                     const T ahead = factor(lattice_.slice_norm, p);
                     const T back = factor(lattice_.splat_norm, p);
                     T* sum = sums_.template as<T>() + p * n;
                     for (int c = 0; c < channels; ++c) {
                       const T av = a(run.pixel, p, c);
                       const T bv = b(run.pixel, p, c);
                       T one{};
                       T other{};
                       for (int r = 0; r < n; ++r) {
                         const int64_t row = at + corners.ids[p * n + r] * int64_t{width} + c;
                         const T forward = forward_.template as<T>()[row] * ahead;
                         const T backward = backward_.template as<T>()[row] * back;
                         sum[r] += av * forward + bv * backward;
                         one += corners.weights[p * n + r] * forward;
                         other += corners.weights[p * n + r] * backward;
                       }
                       if (normalize) {
                         add_to_norm(p, av, bv, one, other);
                       }
                     }
                   });
  }

  PYDENSE_HD T factor(const T* norm, int64_t p) const {
    return norm == nullptr ? lattice_.scale : lattice_.scale * norm[p];
  }

  // Sums over channels of a (K b) and b (K^T a).
  PYDENSE_HD void add_to_norm(int64_t p, T a, T b, T ahead, T back) const {
    if (norms_.data() == nullptr) {
      return;
    }
    const T self = lattice_.self == nullptr ? T{0} : lattice_.self[p];
    norms_.template as<T>()[p] += a * (ahead - self * b);
    norms_.template as<T>()[points_ + p] += b * (back - self * a);
  }

  // dL/dn, as a bilinear form of the same normalised kernel: a' and b' with a'^T K b' = dL/dn^T n.
  void normalizer() const {
    const T* ahead = norms_.template as<T>();
    const T* back = ahead + points_;
    T* a = norms_.template as<T>() + 2 * points_;
    T* b = a + points_;
    parallel_tasks(parallel_for_, ceil_div(points_, kVertexChunk), [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kVertexChunk, points_);
      for (int64_t p = task * kVertexChunk; p < end; ++p) {
        if (lattice_.slice_norm == nullptr) {  // K n^-1
          a[p] = -back[p] * lattice_.splat_norm[p];
          b[p] = T{1} / lattice_.splat_norm[p];
        } else if (lattice_.splat_norm == nullptr) {  // n^-1 K
          a[p] = -ahead[p];
          b[p] = T{1};
        } else {
          a[p] = static_cast<T>(-0.5) * lattice_.slice_norm[p] * (ahead[p] + back[p]);
          b[p] = T{1} / lattice_.splat_norm[p];
        }
      }
    });
  }

  void write() const {
    T scale[kMaxLatticeDims];
    lattice_scale(dims_, scale);
    for_each_point([](int64_t) {},
                   [&](int64_t, const Run& run, const auto&) {
                     T gradient[kMaxLatticeDims];
                     if constexpr (OfLattice) {
                       through_simplex(run, scale, gradient);
                     } else {
                       std::copy_n(sums_.template as<T>() + run.point * dims_, dims_, gradient);
                     }
                     for (int m = 0; m < dims_; ++m) {
                       args_.out[m * points_ + run.pixel] = gradient[m];
                     }
                   });
  }

  // From the weights of a point's corners to its features.
  PYDENSE_HD void through_simplex(const Run& run, const T* scale, T* gradient) const {
    T f[kMaxLatticeDims];
    T e[kMaxCorners];
    T work[kMaxCorners];
    T weight[kMaxCorners];
    IntOf<T> base[kMaxCorners];
    IntOf<T> rank[kMaxCorners];
    load_features(run.pixel, f);
    elevate(f, scale, dims_, e);
    enclosing_simplex<T>(e, dims_, base, rank, weight, work);
    weights_to_features(sums_.template as<T>() + run.point * (dims_ + 1), rank, scale, dims_, e,
                        gradient);
  }

  static constexpr int kMaxRow = 48;
  static_assert(row_width(kMaxCorners) <= kMaxRow && kRowValues <= kMaxRow);

  const FeatureGradientArgs<T>& args_;
  const LatticeView<T>& lattice_;
  const ParallelFor parallel_for_;
  const int dims_;
  const int per_channel_;
  const int64_t points_;
  const int group_;  // channels at a time
  const int width_;
  const Buffer through_compat_;
  const Buffer forward_;   // [num_rows, width_]
  const Buffer backward_;  // [num_rows, width_]
  const Buffer sums_;
  const Buffer norms_;  // [4, points]: sums of a (K b), of b (K^T a); then a' and b'
};

template <class T>
void run(const FeatureGradientArgs<T>& args, ParallelFor parallel_for) {
  if (args.of_lattice) {
    FeatureGradient<T, true>(args, parallel_for).run();
  } else {
    FeatureGradient<T, false>(args, parallel_for).run();
  }
}

}  // namespace

extern const FeatureGradientTable<float> kFeatureGradientTable;
const FeatureGradientTable<float> kFeatureGradientTable = {run<float>};
extern const FeatureGradientTable<double> kFeatureGradientTable64;
const FeatureGradientTable<double> kFeatureGradientTable64 = {run<double>};

}  // namespace pydense::PYDENSE_ISA
