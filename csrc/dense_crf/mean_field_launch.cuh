// SPDX-License-Identifier: Apache-2.0
// Launches over the points that inference and its gradient share.
#pragma once

#include <algorithm>
#include <limits>

#include "dense_crf/label_kernels.cuh"
#include "dense_crf/lattice_filter_launch.cuh"
#include "dense_crf/mean_field_kernels.cuh"

namespace pydense {

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

inline LaunchConfig tiles_config(int64_t images, int64_t point_tiles, int64_t width, int device,
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
void store_rows(const DeviceArray<T>& to, int64_t batch, int64_t channels, int64_t points, T factor,
                T* rows, int64_t width, int device, void* stream) {
  RowsParams<T> p = rows_of(to.data, to.strides, channels, points, rows, width);
  p.factor = factor;
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

// Lanes of a warp that a row is given to.
inline int lanes_of(int vectors) {
  int lanes = 1;
  while (lanes < std::min(vectors, 32)) {
    lanes *= 2;
  }
  return lanes;
}

// Threads of blocks of kFieldThreads.
inline LaunchConfig lanes_config(int64_t points, int lanes, int device, void* stream) {
  const int64_t blocks = ceil_div(points * lanes, int64_t{kFieldThreads});
  PYDENSE_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                "mean_field: a batch must have fewer than 2^33 points");
  return {dim3(static_cast<unsigned>(blocks)), dim3(kFieldThreads), 0, device, stream};
}

template <class T>
void launch_update(FieldParams<T> p, int device, void* stream) {
  const bool few = p.vectors <= 32;
  p.lanes = lanes_of(p.vectors);
  const LaunchConfig config = lanes_config(p.points, p.lanes, device, stream);
  if (few) {
    PYDENSE_LAUNCH((mean_field_update_kernel<T, true>), config, p);
  } else {
    PYDENSE_LAUNCH((mean_field_update_kernel<T, false>), config, p);
  }
}

// out = what a filter brings to the points. `q` are the rows that it was given.
template <class T>
void slice_rows(const FieldTerm<T>& term, const T* q, int64_t points, int64_t labels, int64_t width,
                T* out, int device, void* stream) {
  FieldParams<T> slice{};
  slice.terms[0] = term;
  slice.num_terms = 1;
  slice.kind = MeanFieldOutput::kLogits;
  slice.vectors = static_cast<int>(width / kRowVector<T>);
  slice.labels = labels;
  slice.points = points;
  slice.q = q;
  slice.z = out;
  slice.out = out;
  launch_update(slice, device, stream);
}

template <class T>
void launch_product(const LabelProductParams<T>& p, int device, void* stream) {
  const int64_t blocks = ceil_div(p.points, int64_t{kProductPoints});
  PYDENSE_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                "mean_field: a batch must have fewer than 2^37 points");
  const LaunchConfig config = {
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.vectors, kTileVectors))),
      dim3(kProductThreads), 0, device, stream};
  PYDENSE_LAUNCH(label_product_kernel<T>, config, p);
}

// The rows of steps, which kernels may work on in place where they have one image and rows as wide
// as theirs.
template <class T>
struct StepRows {
  DeviceSteps<T> steps;
  int64_t batch;
  int64_t points;
  int64_t width;  // of the kernels' rows

  // The rows themselves, or null.
  T* in_place(int64_t step) const {
    return batch == 1 && steps.width == width ? at(step) : nullptr;
  }
  template <class E>
  DeviceArray<E> array(int64_t step) const {
    return {at(step), {steps.steps * points * steps.width, 1, steps.width}};
  }
  void store(int64_t step, T* rows, int device, void* stream) const {
    store_rows(array<T>(step), batch, steps.width, points, T{1}, rows, width, device, stream);
  }
  void load(int64_t step, T* rows, int device, void* stream) const {
    load_rows(array<const T>(step), batch, steps.width, points, T{1}, T{0}, rows, width, device,
              stream);
  }

 private:
  T* at(int64_t step) const { return steps.data + step * points * steps.width; }
};

template <class T>
int64_t training_row_width(int64_t labels) {
  return std::max(step_width(labels), int64_t{kRowVector<T>});
}

}  // namespace pydense
