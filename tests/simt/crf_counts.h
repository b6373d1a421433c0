// SPDX-License-Identifier: Apache-2.0
// A part of a picture whose colours are smooth but for noise, which stands for all of it where is
// counted what is asked of memory.
#pragma once

#include <cmath>
#include <vector>

#include "crf_lattices.h"

namespace crf_lattices {

constexpr int64_t kHeight = 40;
constexpr int64_t kWidth = 64;
constexpr int64_t kLabels = 21;
constexpr const char* kGather = "corners are read or written where their points are";
constexpr double kScale = 321.0 * 481 / (kHeight * kWidth);

inline void fill_picture(Points<float>& to) {
  const std::vector<double> noise =
      simt::random_values(static_cast<size_t>(3 * kHeight * kWidth), 8);
  for (int64_t y = 0; y < kHeight; ++y) {
    for (int64_t x = 0; x < kWidth; ++x) {
      float* const at = to.features.data() + y * kWidth + x;
      at[0] = static_cast<float>(x) / 80;
      at[to.points] = static_cast<float>(y) / 80;
      for (int64_t c = 0; c < 3; ++c) {
        const double pixel = 100 + 40 * std::sin(0.05 * static_cast<double>(x + c * y)) +
                             6 * noise[static_cast<size_t>((c * kHeight + y) * kWidth + x)];
        at[(2 + c) * to.points] = static_cast<float>(pixel / 13);
      }
    }
  }
}

// Bytes of inputs and results; what of a lattice goes elsewhere than to the next place has a
// reason.
inline simt::Limits limits_of(const char* shape, const char* kernel, double bytes,
                              double moved = 1.2, double sectors = 1.3, const char* reason = "",
                              double wavefronts = 1.05) {
  simt::Limits limits{.kernel = kernel, .minimum_bytes = bytes};
  limits.moved = moved;
  limits.sectors = sectors;
  limits.wavefronts = wavefronts;
  limits.reason = reason;
  limits.shape = shape;
  limits.scale = kScale;
  return limits;
}

// Limits of splatting and blurring rows of so many numbers, each so often.
inline std::vector<simt::Limits> filter_limits(const char* shape, double width, double vertices,
                                               double filters = 1) {
  const double points = kHeight * kWidth;
  const double corners = 6 * points;
  const double row = 4 * width;
  const bool values = width > 4;  // else all are 1
  return {
      limits_of(shape, "lattice_splat_kernel",
                filters * ((values ? 8 : 4) * corners + row * ((values ? points : 0) + vertices)),
                1.4, 6, kGather),
      limits_of(shape, "lattice_splat_long_kernel", filters * 4 * vertices, 12, 1.3,
                "parts of the vertices with several chunks, of which there are few"),
      limits_of(shape, "lattice_blur_kernel", filters * 6 * (8 * vertices + 2 * row * vertices)),
  };
}

}  // namespace crf_lattices
