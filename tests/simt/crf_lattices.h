// SPDX-License-Identifier: Apache-2.0
// Points and their lattices, by the CUDA kernels and by the CPU's.
#pragma once

#include <memory>

#include "common/parallel.h"
#include "dense_crf/device_lattice.h"
#include "dense_crf/lattice_bytes.h"
#include "driver.h"

namespace crf_lattices {

using pydense::Compatibility;
using pydense::DeviceArray;
using pydense::DeviceLattice;
using pydense::DeviceLatticeShape;
using pydense::MeanFieldOutput;
using pydense::Normalization;
using Bytes = simt::Buffer<uint32_t>;

inline std::unique_ptr<Bytes> bytes_of(size_t size, const char* name) {
  return std::make_unique<Bytes>((size + 3) / 4, name);
}

template <class T>
struct Points {
  int64_t images;
  int64_t points;
  int dims;
  simt::Buffer<T> features;  // [images, dims, points]

  Points(int64_t n, int64_t count, int d, double scale, uint64_t seed = 1)
      : images(n),
        points(count),
        dims(d),
        features(static_cast<size_t>(n * d * count), "features") {
    simt::fill(features, seed, scale);
  }
};

template <class T>
struct Built {
  size_t size = 0;
  std::unique_ptr<Bytes> memory;
  int words = 0;

  DeviceLattice<T> view(int64_t batch, int64_t points) const {
    return pydense::read_device_lattice<T>("test", memory->data(), size, batch, points);
  }
};

template <class T>
Built<T> build(const Points<T>& from, Normalization kind, bool self_term) {
  const bool both = kind == Normalization::kSymmetric;
  const DeviceLatticeShape shape = {from.images,
                                    from.points,
                                    from.dims,
                                    both || kind == Normalization::kBefore,
                                    both || kind == Normalization::kAfter,
                                    !self_term};
  const pydense::DeviceFeatures<T> features = {
      from.features.data(), shape, {from.dims * from.points, from.points, 1}};
  pydense::VertexCount count = {0, 1};
  std::unique_ptr<Bytes> counted;
  for (int words = 0; words < count.words;) {
    words = count.words;
    counted = bytes_of(pydense::count_workspace(shape, words, sizeof(T)), "counted");
    count = pydense::count_vertices_cuda(features, words, counted->data(), 0, nullptr);
  }
  Built<T> built;
  built.words = count.words;
  built.size = pydense::device_lattice_bytes(shape, count.vertices, sizeof(T));
  built.memory = bytes_of(built.size, "lattice");
  const auto workspace =
      bytes_of(pydense::build_workspace(shape, count, sizeof(T)), "build workspace");
  pydense::build_lattice_cuda<T>(shape, kind, count, counted->data(), workspace->data(),
                                 built.memory->data(), 0, nullptr);
  return built;
}

template <class T>
pydense::Buffer build_on_cpu(const Points<T>& from, int64_t image, Normalization kind,
                             bool self_term) {
  pydense::Buffer bytes;
  const pydense::ByteSink sink = {&bytes, [](void* context, size_t size) {
                                    auto* to = static_cast<pydense::Buffer*>(context);
                                    *to = pydense::Buffer(size);
                                    return to->data();
                                  }};
  pydense::build_lattice<T>({from.features.data() + image * from.dims * from.points,
                             {1, from.points},
                             from.dims,
                             from.points,
                             1},
                            {kind, self_term}, sink, pydense::serial_for);
  return bytes;
}

}  // namespace crf_lattices
