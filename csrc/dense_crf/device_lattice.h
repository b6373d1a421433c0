// SPDX-License-Identifier: Apache-2.0
// The lattice of a batch of images on a GPU, and the launchers that build it and filter with it.
//
// The images of a batch share one lattice: the number of the image is part of a vertex's key. Its
// bytes are read by kernels alone. The host knows from their number what it has to: that is padded
// to 1024 bytes, plus a code below 1024 for dimensions, normalisation and type.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dense_crf/mean_field.h"
#include "dense_crf/permutohedral.h"

namespace pydense {

constexpr int64_t kVertexUnit = 256;   // arrays over vertices have a multiple of this
constexpr int64_t kChunkEntries = 64;  // of a vertex, that one thread sums up

struct DeviceLatticeShape {
  int64_t images;  // that the lattice has points of: the batch, or 1 for all of it
  int64_t points;  // of an image
  int dims;
  bool splat_norm;
  bool slice_norm;
  bool self;

  PYDENSE_HD int64_t all_points() const { return images * points; }
  PYDENSE_HD int64_t entries() const { return all_points() * (dims + 1); }  // corners of points
};

// Vertices with the padding.
int64_t vertex_capacity(int64_t vertices);
int64_t chunk_capacity(const DeviceLatticeShape& shape, int64_t capacity);

// All arrays are read-only. A point is image * points + pixel.
template <class T>
struct DeviceLattice {
  DeviceLatticeShape shape;
  int64_t capacity;  // of vertices
  int64_t chunk_capacity;
  T scale;                      // what is left to multiply the filter with
  const int64_t* counts;        // vertices, chunks
  const T* weights;             // [d + 1, all points] barycentric
  const int32_t* ids;           // [d + 1, all points] vertices
  const int32_t* entry_points;  // [entries] points, vertex after vertex
  const T* entry_weights;       // [entries]
  const T* splat_norm;          // [all points], null for 1
  const T* slice_norm;          // [all points], null for 1
  const T* self;                // [all points] what is to be taken out, or null
  const int32_t* neighbours;    // [d + 1, capacity, 2] vertex a step back and ahead, or -1
  const int32_t* chunk_starts;  // [capacity + 1] first chunk of each vertex
  // [chunk_capacity + 1, 2] first entry and vertex; ~vertex where it has several chunks. The
  // entries go on to the next chunk's.
  const int32_t* chunks;
};

size_t device_lattice_bytes(const DeviceLatticeShape& shape, int64_t vertices, size_t scalar_bytes);
template <class T>
DeviceLattice<T> device_lattice_at(const DeviceLatticeShape& shape, int64_t vertices,
                                   const void* bytes);

// The lattice in a block of bytes, for images with so many points; of 1 or `batch` images. Throws
// std::invalid_argument where their number cannot be that of such a lattice.
template <class T>
DeviceLattice<T> read_device_lattice(const char* op, const void* bytes, size_t size, int64_t batch,
                                     int64_t points);

// ---- building ----

// features[image * strides[0] + i * strides[1] + pixel * strides[2]], divided by the deviations.
template <class T>
struct DeviceFeatures {
  const T* data;
  DeviceLatticeShape shape;
  int64_t strides[3];
};

// First: embeds all points and counts the vertices, with keys of so many words. Synchronises.
// Throws std::invalid_argument for features that are not finite or too large. Returns the number of
// words that keys need: where that is more, the workspace holds nothing and it has to be done again
// with as many.
struct VertexCount {
  int64_t vertices;
  int words;
};
size_t count_workspace(const DeviceLatticeShape& shape, int words, size_t scalar_bytes);
template <class T>
VertexCount count_vertices_cuda(const DeviceFeatures<T>& features, int words, void* workspace,
                                int device, void* stream);

// Then: from what that left in its workspace to the lattice. Does not synchronise.
size_t build_workspace(const DeviceLatticeShape& shape, const VertexCount& count,
                       size_t scalar_bytes);
template <class T>
void build_lattice_cuda(const DeviceLatticeShape& shape, Normalization normalization,
                        const VertexCount& count, void* counted, void* workspace, void* bytes,
                        int device, void* stream);

// ---- filtering ----

// Numbers in a row of channels: a multiple of 32 bytes, or 16 bytes where they hold all.
int64_t device_row_width(int64_t channels, size_t scalar_bytes);

// [batch, channels, points] by strides.
template <class T>
struct DeviceArray {
  T* data;
  int64_t strides[3];
};

// The filter, or its transpose. Some channels at a time, so the workspace has a bound in them.
template <class T>
struct DeviceFilterArgs {
  DeviceLattice<T> lattice;
  int64_t batch;
  int64_t channels;
  DeviceArray<const T> values;
  DeviceArray<T> out;
  bool reverse;
};
template <class T>
size_t filter_workspace(const DeviceFilterArgs<T>& args);
template <class T>
void filter_lattice_cuda(const DeviceFilterArgs<T>& args, void* workspace, int device,
                         void* stream);

// Rows of several steps, for training: [batch, steps, points, width].
template <class T>
struct DeviceSteps {
  T* data;  // null: none
  int64_t steps;
  int64_t width;
};
int64_t step_width(int64_t labels);

// Mean-field inference as in mean_field.h. Nothing is checked that only the numbers show: a point
// whose energies are no distribution gets NaN, or the label -1, and so does what it reaches.
template <class T>
struct DeviceTerm {
  DeviceLattice<T> lattice;
  Compatibility kind;
  const T* compat;  // on the device, contiguous
};
template <class T>
struct DeviceMeanFieldArgs {
  int64_t batch;
  int64_t labels;
  int64_t points;
  const DeviceTerm<T>* terms;
  int num_terms;
  DeviceArray<const T> unary;
  bool energies;
  DeviceArray<const T> q;  // data null: starts from the unary
  int iterations;
  MeanFieldOutput kind;
  DeviceArray<T> out;                     // data null: the result is not stored
  int64_t* out_labels;                    // [batch, points]
  DeviceSteps<T> kept = {nullptr, 0, 0};  // gets Q_0 to Q_(steps - 1)
};
template <class T>
size_t mean_field_workspace(const DeviceMeanFieldArgs<T>& args);
template <class T>
void mean_field_cuda(const DeviceMeanFieldArgs<T>& args, void* workspace, int device, void* stream);

}  // namespace pydense
