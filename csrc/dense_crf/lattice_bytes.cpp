// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/lattice_bytes.h"

#include <cstring>

#include "common/check.h"

namespace pydense {
namespace {

constexpr uint64_t kMagic = 0x31746C64'7970'0003;  // raised with every change of the format
constexpr size_t kAlign = 64;

struct Header {
  uint64_t magic;
  uint64_t bytes;  // with the header, up to the next lattice
  uint32_t scalar_bytes;
  LatticeCounts counts;
  double scale;
};

constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Walks over the arrays in their order in memory: place(pointer in the view, number of elements).
template <class T, class Place>
void for_each_array(const LatticeCounts& c, LatticeView<T>* view, const Place& place) {
  const int64_t corners = c.grid.points() * (c.dims + 1);
  place(view->weights, corners);
  const uint16_t* short_ids = nullptr;
  const int32_t* long_ids = nullptr;
  if (has_short_ids(c.dims)) {
    place(short_ids, corners);
    view->ids = short_ids;
  } else {
    place(long_ids, corners);
    view->ids = long_ids;
  }
  place(view->band_rows, c.bands + 1);
  place(view->shared_starts, c.shared + 1);
  place(view->shared_rows, c.shared_rows);
  if (c.splat_norm) {
    place(view->splat_norm, c.grid.points());
  }
  if (c.slice_norm && !c.splat_norm) {
    place(view->slice_norm, c.grid.points());
  } else if (c.slice_norm) {
    view->slice_norm = view->splat_norm;
  }
  if (c.self) {
    place(view->self, c.grid.points());
  }
  place(view->chains, c.chain_starts[c.dims + 1] + kChainPadding);
}

// The view of a lattice at `bytes`; calls padding(first byte, number of bytes) for what lies
// between the arrays.
template <class T, class Padding>
LatticeView<T> view_of(const Header& header, const char* bytes, size_t* size,
                       const Padding& padding) {
  const LatticeCounts& c = header.counts;
  LatticeView<T> view{};
  view.grid = c.grid;
  view.num_vertices = c.vertices;
  view.num_rows = c.rows;
  view.num_shared = c.shared;
  view.dims = c.dims;
  view.scale = static_cast<T>(header.scale);
  std::memcpy(view.chain_starts, c.chain_starts, sizeof(c.chain_starts));
  size_t at = aligned(sizeof(Header));
  for_each_array(c, &view, [&]<class E>(const E*& array, int64_t count) {
    array = bytes == nullptr ? nullptr : reinterpret_cast<const E*>(bytes + at);
    const size_t used = static_cast<size_t>(count) * sizeof(E);
    padding(at + used, aligned(used) - used);
    at += aligned(used);
  });
  *size = at;
  return view;
}

constexpr auto kLeavePadding = [](size_t, size_t) {};

Header make_header(const LatticeCounts& counts, size_t bytes, size_t scalar_bytes, double scale) {
  Header header;
  std::memset(&header, 0, sizeof(header));  // its padding too: equal lattices have equal bytes
  header.magic = kMagic;
  header.bytes = bytes;
  header.scalar_bytes = static_cast<uint32_t>(scalar_bytes);
  header.counts = counts;
  header.scale = scale;
  return header;
}

// Whether the header belongs to a lattice of T that fits `left` bytes. What the arrays hold is
// trusted.
template <class T>
bool is_sound(const Header& header, size_t left) {
  const LatticeCounts& c = header.counts;
  if (c.dims < 1 || c.dims > kMaxLatticeDims || c.grid.height < 1 || c.grid.width < 1 ||
      c.grid.height > INT64_MAX / 1024 / c.grid.width || c.bands != BandGrid(c.grid).count()) {
    return false;
  }
  for (const int64_t count : {c.vertices, c.rows, c.shared, c.shared_rows, c.chain_starts[0]}) {
    if (count < 0 || count > INT32_MAX) {
      return false;
    }
  }
  for (int j = 0; j <= c.dims; ++j) {
    if (c.chain_starts[j + 1] < c.chain_starts[j]) {
      return false;
    }
  }
  return header.bytes <= left && c.chain_starts[c.dims + 1] <= INT64_MAX / 1024 &&
         header.bytes == lattice_bytes(c, sizeof(T));
}

Header header_at(const char* bytes) {
  Header header;
  std::memcpy(&header, bytes, sizeof(header));
  return header;
}

}  // namespace

size_t lattice_bytes(const LatticeCounts& counts, size_t scalar_bytes) {
  const Header header = make_header(counts, 0, scalar_bytes, 0.0);
  size_t size = 0;
  if (scalar_bytes == sizeof(float)) {
    view_of<float>(header, nullptr, &size, kLeavePadding);
  } else {
    view_of<double>(header, nullptr, &size, kLeavePadding);
  }
  return size;
}

template <class T>
LatticeView<T> begin_lattice(const LatticeCounts& counts, T scale, void* bytes) {
  const Header header =
      make_header(counts, lattice_bytes(counts, sizeof(T)), sizeof(T), static_cast<double>(scale));
  auto* const to = static_cast<char*>(bytes);
  std::memset(to, 0, aligned(sizeof(Header)));
  std::memcpy(to, &header, sizeof(header));
  size_t size = 0;
  return view_of<T>(header, to, &size,
                    [to](size_t at, size_t count) { std::memset(to + at, 0, count); });
}

template <class T>
int64_t count_lattices(const char* op, const void* bytes, size_t size) {
  const auto* at = static_cast<const char*>(bytes);
  const auto* const end = at + size;
  int64_t count = 0;
  while (at < end) {
    PYDENSE_CHECK(reinterpret_cast<uintptr_t>(at) % kAlign == 0, op,
                  ": lattice must lie at an address that is a multiple of ", kAlign);
    const auto left = static_cast<size_t>(end - at);
    const bool whole = left >= sizeof(Header);
    const Header header = whole ? header_at(at) : Header{};
    constexpr const char* kOther =
        ": lattice must come from dense_crf_lattice of this version, got other bytes";
    PYDENSE_CHECK(whole && header.magic == kMagic, op, kOther);
    PYDENSE_CHECK(header.scalar_bytes == sizeof(T), op, ": lattice must be of dtype float",
                  8 * sizeof(T), ", got float", 8 * header.scalar_bytes);
    PYDENSE_CHECK(is_sound<T>(header, left), op, kOther);
    at += header.bytes;
    ++count;
  }
  return count;
}

template <class T>
LatticeView<T> lattice_at(const void* bytes, int64_t index) {
  const auto* at = static_cast<const char*>(bytes);
  for (; index > 0; --index) {
    at += header_at(at).bytes;
  }
  size_t size = 0;
  return view_of<T>(header_at(at), at, &size, kLeavePadding);
}

template LatticeView<float> begin_lattice(const LatticeCounts&, float, void*);
template LatticeView<double> begin_lattice(const LatticeCounts&, double, void*);
template int64_t count_lattices<float>(const char*, const void*, size_t);
template int64_t count_lattices<double>(const char*, const void*, size_t);
template LatticeView<float> lattice_at(const void*, int64_t);
template LatticeView<double> lattice_at(const void*, int64_t);

}  // namespace pydense
