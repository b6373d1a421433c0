// SPDX-License-Identifier: Apache-2.0
// From the last step to the first: filter dL/dZ with the transposed kernels, sum up what that says
// of the compatibilities, go through these and through the softmax.
#include <algorithm>
#include <vector>

#include "common/carver.h"
#include "dense_crf/device_gradient.h"
#include "dense_crf/mean_field_launch.cuh"

namespace pydense {
namespace {

// Points are summed up in chunks, whose size depends on nothing but the problem's.
struct Chunks {
  int64_t points;
  int64_t count;
};

Chunks chunks_of(int64_t points, int64_t values) {
  constexpr int64_t kMostSums = int64_t{1} << 23;
  constexpr int64_t kLeastPoints = 256;
  const int64_t most = std::clamp<int64_t>(kMostSums / values, 1, 1024);
  const int64_t size = std::max(kLeastPoints, ceil_div(points, most));
  const int64_t rounded = ceil_div(size, int64_t{kOuterRound}) * kOuterRound;
  return {rounded, ceil_div(points, rounded)};
}

template <class T>
int64_t values_of(const DeviceTerm<T>& term, int64_t labels) {
  return term.kind == Compatibility::kPotts      ? 1
         : term.kind == Compatibility::kDiagonal ? labels
                                                 : labels * labels;
}

template <class T>
struct GradientSpace {
  int64_t width;
  T* grad;   // [batch, points, width] dL/dQ
  T* q;      // as many
  T* step;   // as many: dL/dZ
  T* total;  // as many
  T* part;   // as many: of one term
  FilterSpace<T> filter{};
  std::vector<double*> sums;  // of each term
  size_t bytes;

  GradientSpace(const DeviceGradientArgs<T>& args, void* memory) {
    width = training_row_width<T>(args.labels);
    const int64_t rows = args.batch * args.points * width;
    Carver carver(memory);
    grad = carver.take<T>(rows);
    q = carver.take<T>(rows);
    total = carver.take<T>(rows);
    const int terms = args.iterations > 0 ? args.num_terms : 0;
    step = carver.take<T>(args.iterations > 0 ? rows : 0);
    part = carver.take<T>(terms > 0 ? rows : 0);
    int64_t vertices = 0;
    int64_t chunks = 0;
    for (int k = 0; k < terms; ++k) {
      const DeviceLattice<T>& lattice = args.terms[k].lattice;
      const int64_t copies = copies_of(lattice, args.batch);
      vertices = std::max(vertices, copies * lattice.capacity);
      chunks = std::max(chunks, copies * lattice.chunk_capacity);
      const int64_t values = values_of(args.terms[k], args.labels);
      sums.push_back(
          carver.take<double>(chunks_of(args.batch * args.points, values).count * values));
    }
    filter.rows = carver.take<T>(vertices * width);
    filter.other = carver.take<T>(vertices * width);
    filter.parts = carver.take<T>(chunks * width);
    bytes = carver.used();
  }
};

template <class T>
class Gradient {
 public:
  Gradient(const DeviceGradientArgs<T>& args, void* workspace, int device, void* stream)
      : args_(args),
        space_(args, workspace),
        kept_{args.kept, args.batch, args.points, space_.width},
        steps_{args.steps, args.batch, args.points, space_.width},
        points_(args.batch * args.points),
        vectors_(static_cast<int>(space_.width / kRowVector<T>)),
        device_(device),
        stream_(stream) {}

  void run() {
    const T* behind = nullptr;  // dL/dZ of the step behind
    for (int t = args_.iterations; t >= 0; --t) {
      const bool last = t == args_.iterations;
      const T* q = nullptr;
      if (last) {
        load(args_.grad, space_.grad);
        if (args_.result.data != nullptr) {
          load(args_.result, space_.q);
          q = space_.q;
        }
      } else {
        q = kept_.in_place(t);
        if (q == nullptr) {
          kept_.load(t, space_.q, device_, stream_);
          q = space_.q;
        }
        messages(behind, q, t == args_.iterations - 1);
      }
      if (t == 0 && args_.q.data != nullptr) {
        store(args_.q, T{1}, space_.grad);  // Q is given: there is no Z behind it
        break;
      }
      T* const to = t == 0 ? nullptr : step_at(t);
      FieldGradientParams<T> p{};
      p.lanes = lanes_of(vectors_);
      p.vectors = vectors_;
      p.points = points_;
      p.grad = space_.grad;
      p.q = q;
      p.first = last;
      p.total = space_.total;
      p.step = to;
      PYDENSE_LAUNCH(mean_field_gradient_kernel<T>,
                     lanes_config(points_, p.lanes, device_, stream_), p);
      if (to != nullptr && to == space_.step && args_.steps.data != nullptr) {
        steps_.store(t - 1, to, device_, stream_);
      }
      behind = to;
    }
    store(args_.unary, args_.energies ? T{-1} : T{1}, space_.total);
    for (int k = 0; args_.iterations > 0 && k < args_.num_terms; ++k) {
      const int64_t values = values_of(args_.terms[k], args_.labels);
      const ChunkSumParams<T> p = {space_.sums[static_cast<size_t>(k)],
                                   chunks_of(points_, values).count, values, args_.compats[k]};
      const LaunchConfig config = {
          dim3(static_cast<unsigned>(ceil_div(values, int64_t{kChunkSumValues}))),
          dim3(kChunkSumValues, kChunkSumSlices), 0, device_, stream_};
      PYDENSE_LAUNCH(label_chunk_sum_kernel<T>, config, p);
    }
  }

 private:
  void load(const DeviceArray<const T>& from, T* rows) const {
    load_rows(from, args_.batch, args_.labels, args_.points, T{1}, T{0}, rows, space_.width,
              device_, stream_);
  }
  void store(const DeviceArray<T>& to, T factor, T* rows) const {
    store_rows(to, args_.batch, args_.labels, args_.points, factor, rows, space_.width, device_,
               stream_);
  }
  // Where dL/dZ of step t goes.
  T* step_at(int t) const {
    T* const rows = args_.steps.data == nullptr ? nullptr : steps_.in_place(t - 1);
    return rows == nullptr ? space_.step : rows;
  }

  // grad = sum_k C_k^T P_k, and the sums of P_k Q^T.
  void messages(const T* behind, const T* q, bool first) const {
    for (int k = 0; k < args_.num_terms; ++k) {
      const DeviceTerm<T>& term = args_.terms[k];
      const DeviceLattice<T>& lattice = term.lattice;
      splat_and_blur<T>({lattice, behind, lattice.slice_norm, copies_of(lattice, args_.batch),
                         space_.width, true},
                        space_.filter, device_, stream_);
      slice_rows(term_of<T>(lattice, space_.filter.rows, lattice.splat_norm), behind, points_,
                 args_.labels, space_.width, space_.part, device_, stream_);
      through(term, q, k == 0 ? nullptr : space_.grad, first, space_.sums[static_cast<size_t>(k)]);
    }
    if (args_.num_terms == 0) {  // zeros
      FieldParams<T> nothing{};
      nothing.kind = MeanFieldOutput::kLogits;
      nothing.vectors = vectors_;
      nothing.labels = args_.labels;
      nothing.points = points_;
      nothing.z = space_.grad;
      nothing.out = space_.grad;
      launch_update(nothing, device_, stream_);
    }
  }

  void through(const DeviceTerm<T>& term, const T* q, const T* base, bool first,
               double* sums) const {
    const Chunks chunks = chunks_of(points_, values_of(term, args_.labels));
    const LabelSumParams<T> sum = {space_.part,  q,        points_, chunks.points,
                                   args_.labels, vectors_, first,   sums};
    LaunchConfig config = {dim3(static_cast<unsigned>(chunks.count)), dim3(kScaleThreads), 0,
                           device_, stream_};
    if (term.kind != Compatibility::kMatrix) {
      const LabelScaleParams<T> p = {sum, term.compat, term.kind == Compatibility::kDiagonal, base,
                                     space_.grad};
      PYDENSE_LAUNCH(label_scale_kernel<T>, config, p);
      return;
    }
    const auto tiles = static_cast<unsigned>(ceil_div(vectors_, kTileVectors));
    config.grid.y = tiles;
    config.grid.z = tiles;
    config.block.x = kOuterThreads;
    PYDENSE_LAUNCH(label_outer_kernel<T>, config, sum);
    launch_product<T>(
        {space_.part, term.compat, true, base, space_.grad, points_, args_.labels, vectors_},
        device_, stream_);
  }

  const DeviceGradientArgs<T>& args_;
  const GradientSpace<T> space_;
  const StepRows<T> kept_;
  const StepRows<T> steps_;
  const int64_t points_;
  const int vectors_;
  const int device_;
  void* const stream_;
};

}  // namespace

template <class T>
size_t mean_field_gradient_workspace(const DeviceGradientArgs<T>& args) {
  return GradientSpace<T>(args, nullptr).bytes;
}

template <class T>
void mean_field_gradient_cuda(const DeviceGradientArgs<T>& args, void* workspace, int device,
                              void* stream) {
  Gradient<T>(args, workspace, device, stream).run();
}

#define PYDENSE_INSTANTIATE(T)                                                 \
  template size_t mean_field_gradient_workspace(const DeviceGradientArgs<T>&); \
  template void mean_field_gradient_cuda(const DeviceGradientArgs<T>&, void*, int, void*);
PYDENSE_INSTANTIATE(float)
PYDENSE_INSTANTIATE(double)
#undef PYDENSE_INSTANTIATE

}  // namespace pydense
