// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/carver.h"
#include "common/device_sort.h"
#include "dense_crf/lattice_build_kernels.cuh"
#include "dense_crf/lattice_filter_launch.cuh"
#include "dense_crf/lattice_link_kernels.cuh"

namespace pydense {
namespace {

constexpr int64_t kMostBoundsBlocks = 2 * kMultiprocessors;

// What counting leaves for building, and its own temporaries.
template <class T>
struct CountSpace {
  DeviceKeys* layout;
  uint64_t* keys;
  T* weights;
  int32_t* order[2];  // the sorted order is in order[words % 2]
  int32_t* ranks;
  int32_t* heads;
  uint64_t* gathered;
  uint64_t* sorted;
  double* bounds;
  char* sort;
  size_t sort_bytes;
  size_t bytes;

  CountSpace(const DeviceLatticeShape& shape, int words, void* memory) {
    const int64_t entries = shape.entries();
    Carver carver(memory);
    layout = carver.take<DeviceKeys>(1);
    keys = carver.take<uint64_t>(words * entries);
    weights = carver.take<T>(entries);
    order[0] = carver.take<int32_t>(entries);
    order[1] = carver.take<int32_t>(entries);
    ranks = carver.take<int32_t>(entries);
    heads = carver.take<int32_t>(entries);
    gathered = carver.take<uint64_t>(words > 1 ? entries : 0);
    sorted = carver.take<uint64_t>(entries);
    bounds = carver.take<double>(kMostBoundsBlocks * 2 * (shape.dims + 1));
    sort_bytes = device_sort_bytes(entries);
    sort = carver.take<char>(static_cast<int64_t>(sort_bytes));
    bytes = carver.used();
  }
};

template <class T>
struct BuildSpace {
  uint64_t* vertex_keys;
  int32_t* entry_starts;
  int32_t* chunk_counts;
  int32_t* chunk_sums;
  char* sort;
  size_t sort_bytes;
  FilterSpace<T> filter;
  size_t bytes;

  BuildSpace(const DeviceLatticeShape& shape, const VertexCount& count, void* memory) {
    const int64_t capacity = vertex_capacity(count.vertices);
    Carver carver(memory);
    vertex_keys = carver.take<uint64_t>(count.words * capacity);
    entry_starts = carver.take<int32_t>(count.vertices + 1);
    chunk_counts = carver.take<int32_t>(capacity);
    chunk_sums = carver.take<int32_t>(capacity);
    sort_bytes = device_sort_bytes(capacity);
    sort = carver.take<char>(static_cast<int64_t>(sort_bytes));
    const int64_t width = device_row_width(1, sizeof(T));
    filter.rows = carver.take<T>(capacity * width);
    filter.other = carver.take<T>(capacity * width);
    filter.parts = carver.take<T>(chunk_capacity(shape, capacity) * width);
    bytes = carver.used();
  }
};

LaunchConfig over(int64_t items, int device, void* stream) {
  return {dim3(static_cast<unsigned>(ceil_div(items, kBuildThreads))), dim3(kBuildThreads), 0,
          device, stream};
}

int bits_of(int64_t n) {
  int bits = 0;
  while ((n >> bits) != 0) {
    ++bits;
  }
  return bits;
}

template <class T>
T* writable(const T* data) {
  return const_cast<T*>(data);
}

}  // namespace

size_t count_workspace(const DeviceLatticeShape& shape, int words, size_t scalar_bytes) {
  return scalar_bytes == sizeof(double) ? CountSpace<double>(shape, words, nullptr).bytes
                                        : CountSpace<float>(shape, words, nullptr).bytes;
}

template <class T>
VertexCount count_vertices_cuda(const DeviceFeatures<T>& features, int words, void* workspace,
                                int device, void* stream) {
  const DeviceLatticeShape& shape = features.shape;
  const int64_t entries = shape.entries();
  PYDENSE_CHECK(entries < INT32_MAX - kBuildThreads,
                "permutohedral_lattice: features must have fewer than 2^31 / (d + 1) points, got ",
                shape.all_points(), " with d = ", shape.dims);
  const CountSpace<T> space(shape, words, workspace);
  EmbedParams<T> embed{};
  embed.data = features.data;
  std::copy_n(features.strides, 3, embed.strides);
  embed.points = shape.points;
  embed.all_points = shape.all_points();
  embed.dims = shape.dims;
  embed.words = words;
  portable::lattice_scale(shape.dims, embed.scale);
  embed.bounds = space.bounds;
  embed.keys_layout = space.layout;
  embed.keys = space.keys;
  embed.entries = space.order[0];
  embed.weights = space.weights;

  const LaunchConfig points = {
      dim3(static_cast<unsigned>(ceil_div(embed.all_points, kEmbedThreads<T>))),
      dim3(kEmbedThreads<T>), embed_bytes<T>(shape.dims), device, stream};
  LaunchConfig bounds = points;
  bounds.grid.x = static_cast<unsigned>(std::min<int64_t>(points.grid.x, kMostBoundsBlocks));
  PYDENSE_LAUNCH(lattice_bounds_kernel<T>, bounds, embed);
  const PlanParams plan = {space.bounds, static_cast<int>(bounds.grid.x), shape.dims,
                           bits_of(shape.images - 1), space.layout};
  const LaunchConfig one = {dim3(1), dim3(kPlanThreads), 0, device, stream};
  PYDENSE_LAUNCH(lattice_plan_kernel, one, plan);
  PYDENSE_LAUNCH(lattice_embed_kernel<T>, points, embed);

  const LaunchConfig corners = over(entries, device, stream);
  for (int w = 0; w < words; ++w) {
    const uint64_t* keys = space.keys + w * entries;
    if (w > 0) {
      const GatherKeysParams gather = {keys, space.order[w % 2], space.gathered, entries};
      PYDENSE_LAUNCH(lattice_gather_keys_kernel, corners, gather);
      keys = space.gathered;
    }
    sort_pairs_cuda({keys, space.sorted, space.order[w % 2], space.order[(w + 1) % 2], entries},
                    space.sort, space.sort_bytes, device, stream);
  }
  const HeadParams heads = {space.keys, space.order[words % 2], words, entries, space.heads};
  PYDENSE_LAUNCH(lattice_heads_kernel, corners, heads);
  inclusive_sum_cuda({space.heads, space.ranks, entries}, space.sort, space.sort_bytes, device,
                     stream);
  DeviceKeys layout;
  int32_t vertices = 0;
  read_back_cuda({{&layout, space.layout, sizeof(layout)},
                  {&vertices, space.ranks + entries - 1, sizeof(vertices)}},
                 device, stream);
  if (layout.status != 0) {
    refuse_coordinate(layout.coordinate, shape.dims);
  }
  return {vertices, layout.layout.words};
}

size_t build_workspace(const DeviceLatticeShape& shape, const VertexCount& count,
                       size_t scalar_bytes) {
  return scalar_bytes == sizeof(double) ? BuildSpace<double>(shape, count, nullptr).bytes
                                        : BuildSpace<float>(shape, count, nullptr).bytes;
}

template <class T>
void build_lattice_cuda(const DeviceLatticeShape& shape, Normalization normalization,
                        const VertexCount& count, void* counted, void* workspace, void* bytes,
                        int device, void* stream) {
  const CountSpace<T> from(shape, count.words, counted);
  const BuildSpace<T> space(shape, count, workspace);
  const DeviceLattice<T> lattice = device_lattice_at<T>(shape, count.vertices, bytes);
  const int64_t entries = shape.entries();
  const NumberParams<T> number = {from.keys,
                                  from.order[count.words % 2],
                                  from.ranks,
                                  from.weights,
                                  count.words,
                                  entries,
                                  shape.all_points(),
                                  lattice.capacity,
                                  space.vertex_keys,
                                  space.entry_starts,
                                  writable(lattice.weights),
                                  writable(lattice.ids),
                                  writable(lattice.entry_points),
                                  writable(lattice.entry_weights)};
  PYDENSE_LAUNCH(lattice_number_kernel<T>, over(entries, device, stream), number);
  const LinkParams link = {
      from.layout,       space.vertex_keys, space.entry_starts, count.words,
      shape.dims,        count.vertices,    lattice.capacity,   writable(lattice.neighbours),
      space.chunk_counts};
  LaunchConfig vertices = over(lattice.capacity, device, stream);
  vertices.grid.y = static_cast<unsigned>(shape.dims + 1);
  PYDENSE_LAUNCH(lattice_link_kernel, vertices, link);
  inclusive_sum_cuda({space.chunk_counts, space.chunk_sums, lattice.capacity}, space.sort,
                     space.sort_bytes, device, stream);
  const ChunkParams chunk = {space.entry_starts,       space.chunk_sums,
                             count.vertices,           lattice.capacity,
                             lattice.chunk_capacity,   entries,
                             writable(lattice.counts), writable(lattice.chunk_starts),
                             writable(lattice.chunks)};
  PYDENSE_LAUNCH(lattice_chunk_kernel, over(lattice.chunk_capacity + 1, device, stream), chunk);

  const bool normalized = normalization != Normalization::kNone;
  if (!normalized && !shape.self) {
    return;
  }
  const int64_t width = device_row_width(1, sizeof(T));
  if (normalized) {
    splat_and_blur<T>({lattice, nullptr, nullptr, 1, width, false}, space.filter, device, stream);
  }
  NormParams<T> norm{};
  norm.lattice = lattice;
  norm.rows = normalized ? space.filter.rows : nullptr;
  norm.width = width;
  norm.alpha = portable::lattice_alpha<T>(shape.dims);
  norm.symmetric = normalization == Normalization::kSymmetric;
  norm.norm = writable(lattice.splat_norm != nullptr ? lattice.splat_norm : lattice.slice_norm);
  norm.self = writable(lattice.self);
  PYDENSE_LAUNCH(lattice_norm_kernel<T>, over(shape.all_points(), device, stream), norm);
}

#define PYDENSE_INSTANTIATE(T)                                                                \
  template VertexCount count_vertices_cuda(const DeviceFeatures<T>&, int, void*, int, void*); \
  template void build_lattice_cuda<T>(const DeviceLatticeShape&, Normalization,               \
                                      const VertexCount&, void*, void*, void*, int, void*);
PYDENSE_INSTANTIATE(float)
PYDENSE_INSTANTIATE(double)
#undef PYDENSE_INSTANTIATE

}  // namespace pydense
