// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/device_lattice.h"

#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "dense_crf/permutohedral_math.h"

namespace pydense {
namespace {

constexpr int64_t kUnit = 1024;  // bytes
static_assert(kVertexUnit * int64_t{sizeof(int32_t)} == kUnit);

// What the number of bytes says beside the number of vertices.
constexpr int kSplatNorm = 1 << 5;
constexpr int kSliceNorm = 1 << 6;
constexpr int kSelf = 1 << 7;
constexpr int kBatched = 1 << 8;
constexpr int kDouble = 1 << 9;

constexpr int64_t padded(int64_t bytes) { return ceil_div(bytes, kUnit) * kUnit; }

int code_of(const DeviceLatticeShape& shape, size_t scalar_bytes) {
  return (shape.dims - 1) | (shape.splat_norm ? kSplatNorm : 0) |
         (shape.slice_norm ? kSliceNorm : 0) | (shape.self ? kSelf : 0) |
         (shape.images > 1 ? kBatched : 0) | (scalar_bytes == sizeof(double) ? kDouble : 0);
}

// Walks over the arrays in their order in memory: place(pointer in the view, number of elements).
template <class T, class Place>
void for_each_array(DeviceLattice<T>* view, const Place& place) {
  const DeviceLatticeShape& shape = view->shape;
  const int64_t entries = shape.entries();
  place(view->counts, 2);
  place(view->weights, entries);
  place(view->ids, entries);
  place(view->entry_points, entries);
  place(view->entry_weights, entries);
  if (shape.splat_norm) {
    place(view->splat_norm, shape.all_points());
  }
  if (shape.slice_norm && !shape.splat_norm) {
    place(view->slice_norm, shape.all_points());
  } else if (shape.slice_norm) {
    view->slice_norm = view->splat_norm;
  }
  if (shape.self) {
    place(view->self, shape.all_points());
  }
  // From here on, whole units for every unit of vertices, and a rest that the shape decides.
  place(view->neighbours, int64_t{2} * (shape.dims + 1) * view->capacity);
  place(view->chunk_starts, view->capacity + kVertexUnit);
  place(view->chunks, 2 * (view->chunk_capacity + 1));
}

template <class T>
DeviceLattice<T> view_of(const DeviceLatticeShape& shape, int64_t capacity, const char* bytes,
                         int64_t* size) {
  DeviceLattice<T> view{};
  view.shape = shape;
  view.capacity = capacity;
  view.chunk_capacity = chunk_capacity(shape, capacity);
  view.scale =
      shape.splat_norm || shape.slice_norm ? T{1} : PYDENSE_ISA::lattice_alpha<T>(shape.dims);
  int64_t at = 0;
  for_each_array(&view, [&]<class E>(const E*& array, int64_t count) {
    array = bytes == nullptr ? nullptr : reinterpret_cast<const E*>(bytes + at);
    at += padded(count * static_cast<int64_t>(sizeof(E)));
  });
  *size = at;
  return view;
}

template <class T>
int64_t payload(const DeviceLatticeShape& shape, int64_t capacity) {
  int64_t size = 0;
  view_of<T>(shape, capacity, nullptr, &size);
  return size;
}

}  // namespace

int64_t vertex_capacity(int64_t vertices) { return ceil_div(vertices, kVertexUnit) * kVertexUnit; }

int64_t chunk_capacity(const DeviceLatticeShape& shape, int64_t capacity) {
  return capacity + shape.entries() / kChunkEntries;
}

size_t device_lattice_bytes(const DeviceLatticeShape& shape, int64_t vertices,
                            size_t scalar_bytes) {
  const int64_t capacity = vertex_capacity(vertices);
  const int64_t size = scalar_bytes == sizeof(double) ? payload<double>(shape, capacity)
                                                      : payload<float>(shape, capacity);
  return static_cast<size_t>(size + code_of(shape, scalar_bytes));
}

template <class T>
DeviceLattice<T> device_lattice_at(const DeviceLatticeShape& shape, int64_t vertices,
                                   const void* bytes) {
  int64_t size = 0;
  return view_of<T>(shape, vertex_capacity(vertices), static_cast<const char*>(bytes), &size);
}

template <class T>
DeviceLattice<T> read_device_lattice(const char* op, const void* bytes, size_t size, int64_t batch,
                                     int64_t points) {
  const auto all = static_cast<int64_t>(size);
  const auto code = static_cast<int>(all % kUnit);
  PYDENSE_CHECK((code & kDouble) == (sizeof(T) == sizeof(double) ? kDouble : 0), op,
                ": lattice must be of dtype float", 8 * sizeof(T), ", got float",
                (code & kDouble) != 0 ? 64 : 32);
  DeviceLatticeShape shape{};
  shape.images = (code & kBatched) != 0 ? batch : 1;
  shape.points = points;
  shape.dims = code % kMaxLatticeDims + 1;
  shape.splat_norm = (code & kSplatNorm) != 0;
  shape.slice_norm = (code & kSliceNorm) != 0;
  shape.self = (code & kSelf) != 0;
  const int64_t fixed = payload<T>(shape, 0);
  const int64_t unit = payload<T>(shape, kVertexUnit) - fixed;
  const int64_t left = all - code - fixed;
  PYDENSE_CHECK(left >= unit && left % unit == 0, op,
                ": lattice must come from dense_crf_lattice of this version, on this device, for ",
                batch, " images of ", points, " points, got ", size, " bytes");
  int64_t found = 0;
  return view_of<T>(shape, left / unit * kVertexUnit, static_cast<const char*>(bytes), &found);
}

int64_t device_row_width(int64_t channels, size_t scalar_bytes) {
  const auto scalar = static_cast<int64_t>(scalar_bytes);
  const int64_t bytes = channels * scalar;
  return bytes <= 16 ? 16 / scalar : ceil_div(bytes, int64_t{32}) * 32 / scalar;
}

int64_t step_width(int64_t labels) {
  return std::max(2, row_width(static_cast<int>(labels)));  // as that of the CPU
}

template DeviceLattice<float> device_lattice_at(const DeviceLatticeShape&, int64_t, const void*);
template DeviceLattice<double> device_lattice_at(const DeviceLatticeShape&, int64_t, const void*);
template DeviceLattice<float> read_device_lattice(const char*, const void*, size_t, int64_t,
                                                  int64_t);
template DeviceLattice<double> read_device_lattice(const char*, const void*, size_t, int64_t,
                                                   int64_t);

}  // namespace pydense
