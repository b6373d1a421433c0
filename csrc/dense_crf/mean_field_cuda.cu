// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/carver.h"
#include "dense_crf/lattice_filter_launch.cuh"
#include "dense_crf/mean_field_kernels.cuh"

namespace pydense {
namespace {

constexpr int64_t kFilterChannels = 64;  // at a time

template <class T>
int64_t copies_of(const DeviceLattice<T>& lattice, int64_t batch) {
  return batch / lattice.shape.images;
}

template <class T>
RowsParams<T> rows_of(T* array, const int64_t* strides, int64_t channels, int64_t points, T* rows,
                      int64_t width) {
  RowsParams<T> p{};
  p.array = array;
  std::copy_n(strides, 3, p.strides);
  p.rows = rows;
  p.points = points;
  p.point_tiles = ceil_div(points, int64_t{kRowsTile});
  p.channels = channels;
  p.width = width;
  p.factor = 1;
  return p;
}

LaunchConfig tiles_config(int64_t images, int64_t point_tiles, int64_t width, int device,
                          void* stream) {
  PYDENSE_CHECK(images <= std::numeric_limits<int32_t>::max() / point_tiles,
                "mean_field: a batch must have fewer than 2^36 points");
  return {dim3(static_cast<unsigned>(images * point_tiles),
               static_cast<unsigned>(ceil_div(width, int64_t{kRowsTile}))),
          dim3(kRowsTile, kRowsThreads), 0, device, stream};
}

template <class T>
void load_rows(const DeviceArray<const T>& from, int64_t batch, int64_t channels, int64_t points,
               T factor, T padding, T* rows, int64_t width, int device, void* stream) {
  RowsParams<T> p = rows_of(const_cast<T*>(from.data), from.strides, channels, points, rows, width);
  p.factor = factor;
  p.padding = padding;
  PYDENSE_LAUNCH(rows_load_kernel<T>, tiles_config(batch, p.point_tiles, width, device, stream), p);
}

template <class T>
void store_rows(const DeviceArray<T>& to, int64_t batch, int64_t channels, int64_t points, T* rows,
                int64_t width, int device, void* stream) {
  const RowsParams<T> p = rows_of(to.data, to.strides, channels, points, rows, width);
  PYDENSE_LAUNCH(rows_store_kernel<T>, tiles_config(batch, p.point_tiles, width, device, stream),
                 p);
}

// The term that slices `rows`; the norm is that of the side, before or after the filter.
template <class T>
FieldTerm<T> term_of(const DeviceLattice<T>& lattice, const T* rows, const T* norm) {
  FieldTerm<T> term{};
  term.rows = rows;
  term.ids = lattice.ids;
  term.weights = lattice.weights;
  term.norm = norm;
  term.self = lattice.self;
  term.scale = lattice.scale;
  term.corners = lattice.shape.dims + 1;
  term.all_points = lattice.shape.all_points();
  term.capacity = lattice.capacity;
  return term;
}

template <class T>
void launch_update(FieldParams<T> p, int device, void* stream) {
  const bool few = p.vectors <= 32;
  p.lanes = 1;
  while (p.lanes < std::min(p.vectors, 32)) {
    p.lanes *= 2;
  }
  const int64_t blocks = ceil_div(p.points * p.lanes, int64_t{kFieldThreads});
  PYDENSE_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                "mean_field: a batch must have fewer than 2^33 points");
  const LaunchConfig config = {dim3(static_cast<unsigned>(blocks)), dim3(kFieldThreads), 0, device,
                               stream};
  if (few) {
    PYDENSE_LAUNCH((mean_field_update_kernel<T, true>), config, p);
  } else {
    PYDENSE_LAUNCH((mean_field_update_kernel<T, false>), config, p);
  }
}

template <class T>
struct FieldSpace {
  int64_t width;
  T* logits;   // [batch, points, width]
  T* q;        // as many
  T* message;  // as many, or null
  T* z;        // as many, or null
  T* other;
  T* parts;
  std::vector<T*> rows;  // of each term
  size_t bytes;

  FieldSpace(const DeviceMeanFieldArgs<T>& args, void* memory) {
    width = device_row_width(args.labels, sizeof(T));
    const int64_t points = args.batch * args.points * width;
    bool matrix = false;
    int64_t vertices = 0;
    int64_t chunks = 0;
    Carver carver(memory);
    logits = carver.take<T>(points);
    q = carver.take<T>(points);
    for (int k = 0; args.iterations > 0 && k < args.num_terms; ++k) {
      const DeviceLattice<T>& lattice = args.terms[k].lattice;
      const int64_t copies = copies_of(lattice, args.batch);
      matrix = matrix || args.terms[k].kind == Compatibility::kMatrix;
      vertices = std::max(vertices, copies * lattice.capacity);
      chunks = std::max(chunks, copies * lattice.chunk_capacity);
      rows.push_back(carver.take<T>(copies * lattice.capacity * width));
    }
    other = carver.take<T>(vertices * width);
    parts = carver.take<T>(chunks * width);
    message = matrix ? carver.take<T>(points) : nullptr;
    const bool long_rows = width / kRowVector<T> > 32;
    z = long_rows || args.num_terms > kFieldTerms ? carver.take<T>(points) : nullptr;
    bytes = carver.used();
  }
};

}  // namespace

template <class T>
size_t mean_field_workspace(const DeviceMeanFieldArgs<T>& args) {
  return FieldSpace<T>(args, nullptr).bytes;
}

template <class T>
void mean_field_cuda(const DeviceMeanFieldArgs<T>& args, void* workspace, int device,
                     void* stream) {
  const int least = args.q.data == nullptr ? 0 : 1;
  PYDENSE_CHECK(args.iterations >= least, "mean_field: iterations must be at least ", least,
                ", got ", args.iterations);
  const FieldSpace<T> space(args, workspace);
  load_rows(args.unary, args.batch, args.labels, args.points, args.energies ? T{-1} : T{1},
            -std::numeric_limits<T>::infinity(), space.logits, space.width, device, stream);
  if (args.q.data != nullptr) {
    load_rows(args.q, args.batch, args.labels, args.points, T{1}, T{0}, space.q, space.width,
              device, stream);
  }
  FieldParams<T> update{};
  update.vectors = static_cast<int>(space.width / kRowVector<T>);
  update.labels = args.labels;
  update.points = args.batch * args.points;
  update.q = space.q;
  update.message = space.message;
  update.z = space.z;
  update.labels_out = args.out_labels;
  for (int i = least; i <= args.iterations; ++i) {
    const int terms = i > 0 ? args.num_terms : 0;
    for (int k = 0; k < terms; ++k) {
      const DeviceLattice<T>& lattice = args.terms[k].lattice;
      splat_and_blur<T>({lattice, space.q, lattice.splat_norm, copies_of(lattice, args.batch),
                         space.width, false},
                        {space.rows[static_cast<size_t>(k)], space.other, space.parts}, device,
                        stream);
    }
    update.base = space.logits;
    for (int first = 0; first == 0 || first < terms; first += kFieldTerms) {
      update.num_terms = std::min(terms - first, kFieldTerms);
      for (int k = 0; k < update.num_terms; ++k) {
        const DeviceTerm<T>& term = args.terms[first + k];
        update.terms[k] = term_of(term.lattice, space.rows[static_cast<size_t>(first + k)],
                                  term.lattice.slice_norm);
        update.terms[k].kind = term.kind;
        update.terms[k].compat = term.compat;
      }
      const bool through = first + kFieldTerms >= terms;
      update.kind = !through              ? MeanFieldOutput::kLogits
                    : i < args.iterations ? MeanFieldOutput::kProbabilities
                                          : args.kind;
      update.out = through ? space.q : space.z;
      launch_update(update, device, stream);
      update.base = space.z;
    }
  }
  if (args.kind != MeanFieldOutput::kLabels) {
    store_rows(args.out, args.batch, args.labels, args.points, space.q, space.width, device,
               stream);
  }
}

namespace {

template <class T>
struct ChannelSpace {
  int64_t width;
  T* values;
  T* filtered;
  FilterSpace<T> vertices;
  size_t bytes;

  ChannelSpace(const DeviceFilterArgs<T>& args, void* memory) {
    width = device_row_width(std::min(args.channels, kFilterChannels), sizeof(T));
    const int64_t copies = copies_of(args.lattice, args.batch);
    const int64_t points = args.batch * args.lattice.shape.points * width;
    Carver carver(memory);
    values = carver.take<T>(points);
    filtered = carver.take<T>(points);
    vertices.rows = carver.take<T>(copies * args.lattice.capacity * width);
    vertices.other = carver.take<T>(copies * args.lattice.capacity * width);
    vertices.parts = carver.take<T>(copies * args.lattice.chunk_capacity * width);
    bytes = carver.used();
  }
};

}  // namespace

template <class T>
size_t filter_workspace(const DeviceFilterArgs<T>& args) {
  return ChannelSpace<T>(args, nullptr).bytes;
}

template <class T>
void filter_lattice_cuda(const DeviceFilterArgs<T>& args, void* workspace, int device,
                         void* stream) {
  const ChannelSpace<T> space(args, workspace);
  const DeviceLattice<T>& lattice = args.lattice;
  // The transposed filter has the factors of the other side.
  const T* before = args.reverse ? lattice.slice_norm : lattice.splat_norm;
  const T* after = args.reverse ? lattice.splat_norm : lattice.slice_norm;
  const int64_t points = lattice.shape.points;
  for (int64_t first = 0; first < args.channels; first += kFilterChannels) {
    const int64_t channels = std::min(kFilterChannels, args.channels - first);
    const int64_t width = device_row_width(channels, sizeof(T));
    DeviceArray<const T> values = args.values;
    values.data += first * values.strides[1];
    DeviceArray<T> out = args.out;
    out.data += first * out.strides[1];
    load_rows(values, args.batch, channels, points, T{1}, T{0}, space.values, width, device,
              stream);
    splat_and_blur<T>(
        {lattice, space.values, before, copies_of(lattice, args.batch), width, args.reverse},
        space.vertices, device, stream);
    FieldParams<T> slice{};
    slice.terms[0] = term_of(lattice, space.vertices.rows, after);
    slice.num_terms = 1;
    slice.kind = MeanFieldOutput::kLogits;
    slice.vectors = static_cast<int>(width / kRowVector<T>);
    slice.labels = channels;
    slice.points = args.batch * points;
    slice.q = space.values;
    slice.out = space.filtered;
    launch_update(slice, device, stream);
    store_rows(out, args.batch, channels, points, space.filtered, width, device, stream);
  }
}

#define PYDENSE_INSTANTIATE(T)                                                     \
  template size_t mean_field_workspace(const DeviceMeanFieldArgs<T>&);             \
  template void mean_field_cuda(const DeviceMeanFieldArgs<T>&, void*, int, void*); \
  template size_t filter_workspace(const DeviceFilterArgs<T>&);                    \
  template void filter_lattice_cuda(const DeviceFilterArgs<T>&, void*, int, void*);
PYDENSE_INSTANTIATE(float)
PYDENSE_INSTANTIATE(double)
#undef PYDENSE_INSTANTIATE

}  // namespace pydense
