// SPDX-License-Identifier: Apache-2.0
// How the points of a picture are cut into bands: tiles of neighbouring pixels, which share many
// vertices of a lattice. Lattices keep what they know of points band by band; pixels are where the
// caller has them, row by row.
#pragma once

#include <cstdint>

#include "common/hd.h"
#include "common/parallel.h"

namespace pydense {

constexpr int64_t kBandPoints = 10240;  // at most
constexpr int64_t kBandWidth = 128;     // pixels, at most, in pictures of several rows

// As ceil_div, for both devices.
PYDENSE_HD int64_t parts_of(int64_t all, int64_t part) { return (all + part - 1) / part; }

struct PointGrid {
  int64_t height;  // 1 for points that have no order
  int64_t width;

  PYDENSE_HD int64_t points() const { return height * width; }
};

struct Band {
  int64_t begin;  // its first point, in the lattice's order
  int64_t pixel;  // the same one in the picture
  int64_t height;
  int64_t width;
  int64_t stride;  // from row to row in the picture

  PYDENSE_HD int64_t end() const { return begin + height * width; }
};

// The bands depend on the size of the picture alone.
class BandGrid {
 public:
  PYDENSE_HD explicit BandGrid(const PointGrid& grid) : height_(grid.height), width_(grid.width) {
    if (width_ < kBandWidth / 2) {  // too narrow for tiles
      width_ *= height_;
      height_ = 1;
    }
    const int64_t most = height_ == 1 ? kBandPoints : kBandWidth;
    const int64_t wanted = width_ < most ? 1 : parts_of(width_, most);
    // Whole blocks of points, so that only the last column of bands has shorter ones.
    band_width_ = parts_of(parts_of(width_, wanted), 16) * 16;
    columns_ = width_ < 1 ? 1 : parts_of(width_, band_width_);
    const int64_t rows = parts_of(height_, kBandPoints / band_width_);
    band_height_ = rows < 1 ? 1 : parts_of(height_, rows);
    rows_ = height_ < 1 ? 1 : parts_of(height_, band_height_);
  }

  PYDENSE_HD int64_t count() const { return rows_ * columns_; }

  PYDENSE_HD Band at(int64_t index) const {
    const int64_t y = index / columns_ * band_height_;
    const int64_t x = index % columns_ * band_width_;
    const int64_t height = height_ - y < band_height_ ? height_ - y : band_height_;
    const int64_t width = width_ - x < band_width_ ? width_ - x : band_width_;
    return {y * width_ + height * x, y * width_ + x, height, width, width_};
  }

 private:
  int64_t height_;
  int64_t width_;
  int64_t band_height_;
  int64_t band_width_;
  int64_t rows_;
  int64_t columns_;
};

// Neighbouring points of a band.
struct Run {
  int64_t point;  // the first, in the lattice's order
  int64_t pixel;
  int count;
  int64_t ahead;  // pixels from here to the run after the next
};

// Calls work(run) for runs of up to `size` pixels beside each other.
template <class Work>
PYDENSE_HD void for_each_run(const Band& band, int size, const Work& work) {
  const int64_t around = band.stride - parts_of(band.width, size) * size;  // to the next row
  for (int64_t y = 0; y < band.height; ++y) {
    for (int64_t x = 0; x < band.width; x += size) {
      const int64_t left = band.width - x;
      work(Run{band.begin + y * band.width + x, band.pixel + y * band.stride + x,
               static_cast<int>(left < size ? left : size),
               int64_t{2} * size + (left > int64_t{2} * size ? 0 : around)});
    }
  }
}

}  // namespace pydense
