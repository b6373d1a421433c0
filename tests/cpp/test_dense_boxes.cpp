// SPDX-License-Identifier: Apache-2.0
// The tiles that tensor copies move, walked on the CPU as a GPU does it: boxes of a picture with
// zeros around it, tap by tap, against plain sums of whole numbers.
#include <cmath>
#include <random>
#include <vector>

#include "atrous_conv/dense_boxes.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)

namespace {

std::vector<double> whole_numbers(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<double> numbers(static_cast<size_t>(count));
  for (double& number : numbers) {
    number = static_cast<double>(generator() % 7) - 3;
  }
  return numbers;
}

struct Picture {
  const std::vector<double>& data;
  const DenseConvShape& s;

  double at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width && c < s.channels;
    return inside ? data[static_cast<size_t>(((n * s.height + y) * s.width + x) * s.channels + c)]
                  : 0;
  }
};

// Each output's number of writers, and its sum.
void check(const std::vector<DenseConvShape>& shapes, bool flipped, int64_t columns,
           int64_t depth) {
  std::vector<DenseConvArgs> branches;
  for (const DenseConvShape& s : shapes) {
    DenseConvArgs args = {};
    args.shape = s;
    branches.push_back(args);
  }
  const auto launches =
      dense_box_launches("op", branches.data(), static_cast<int>(branches.size()), columns);
  for (size_t b = 0; b < shapes.size(); ++b) {
    const DenseConvShape& s = shapes[b];
    const auto x = whole_numbers(s.batches * s.height * s.width * s.channels, 1);
    const auto weight = whole_numbers(s.taps() * s.outputs * s.channels, 2);  // [taps, O, C]
    const Picture picture = {x, s};
    std::vector<double> out(
        static_cast<size_t>(s.batches * s.out_height * s.out_width * s.outputs));
    std::vector<int> writers(out.size());
    const auto place = [&](int64_t n, int64_t y, int64_t u, int64_t o) {
      return static_cast<size_t>(((n * s.out_height + y) * s.out_width + u) * s.outputs + o);
    };
    const DenseBoxSteps steps = {static_cast<int32_t>((s.channels + depth - 1) / depth),
                                 static_cast<int32_t>(s.dilation_y),
                                 static_cast<int32_t>(s.dilation_x),
                                 static_cast<int32_t>(s.top),
                                 static_cast<int32_t>(s.left),
                                 static_cast<int32_t>(s.kernel_width),
                                 flipped ? static_cast<int32_t>(s.taps() - 1) : -1};
    for (const DenseBoxLaunch& launch : launches) {
      EXPECT(launch.classes.size() <= kMaxDenseBoxClasses);
      for (size_t k = 0; k < launch.classes.size(); ++k) {
        const DenseBoxClass& own = launch.classes[k];
        const auto end = k + 1 < launch.classes.size() ? launch.classes[k + 1].first_item
                                                       : static_cast<uint32_t>(launch.items);
        EXPECT(own.first_item < end || s.batches == 0);
        if (own.branch != b) {
          continue;
        }
        const auto tiles = static_cast<uint32_t>((s.outputs + columns - 1) / columns);
        for (uint32_t item = 0; item < end - own.first_item; ++item) {
          const DenseBoxTile tile(own, item, tiles, static_cast<int32_t>(columns));
          for (int32_t r = 0; r < kDenseBoxPixels; ++r) {
            const DenseBoxPixel pixel(own, tile, r);
            if (!pixel.inside) {
              continue;
            }
            for (int64_t o = tile.output; o < std::min(tile.output + columns, s.outputs); ++o) {
              double sum = 0;
              for (int32_t step = 0; step < steps.count(own); ++step) {
                const DenseBoxStep at(steps, own, tile, step);
                const int32_t width = dense_box_width(own.shape);
                for (int64_t c = at.chunk * depth; c < std::min((at.chunk + 1) * depth, s.channels);
                     ++c) {
                  sum += picture.at(tile.image, c, at.y + r / width, at.x + r % width) *
                         weight[static_cast<size_t>((at.tap * s.outputs + o) * s.channels + c)];
                }
              }
              out[place(tile.image, pixel.y, pixel.x, o)] = sum;
              ++writers[place(tile.image, pixel.y, pixel.x, o)];
            }
          }
        }
      }
    }
    for (int64_t n = 0; n < s.batches; ++n) {
      for (int64_t y = 0; y < s.out_height; ++y) {
        for (int64_t u = 0; u < s.out_width; ++u) {
          for (int64_t o = 0; o < s.outputs; ++o) {
            double sum = 0;
            for (int64_t t = 0; t < s.taps(); ++t) {
              const int64_t from_y = y + t / s.kernel_width * s.dilation_y - s.top;
              const int64_t from_x = u + t % s.kernel_width * s.dilation_x - s.left;
              const int64_t tap = flipped ? s.taps() - 1 - t : t;
              for (int64_t c = 0; c < s.channels; ++c) {
                sum += picture.at(n, c, from_y, from_x) *
                       weight[static_cast<size_t>((tap * s.outputs + o) * s.channels + c)];
              }
            }
            EXPECT(writers[place(n, y, u, o)] == 1);
            EXPECT(out[place(n, y, u, o)] == sum);
          }
        }
      }
    }
  }
}

DenseConvShape same(int64_t n, int64_t c, int64_t o, int64_t h, int64_t w, int64_t rate,
                    int64_t kernel = 3) {
  const int64_t reach = kernel / 2 * rate;
  return {n, c, o, h, w, h, w, kernel, kernel, rate, rate, reach, reach};
}

void sums_and_writers() {
  check({same(2, 5, 7, 9, 11, 2)}, false, 4, 2);
  check({same(1, 3, 2, 33, 35, 12), same(1, 3, 5, 33, 35, 1, 1), same(1, 3, 2, 33, 35, 6)}, true, 2,
        2);
  check({same(2, 2, 3, 3, 140, 40)}, false, 4, 4);
  check({same(1, 1, 1, 150, 3, 2)}, true, 1, 1);
  check({{1, 2, 3, 5, 6, 9, 2, 2, 3, 3, 2, 5, 0}}, false, 2, 2);
  check({same(1, 1, 1, 12, 11, 1, 7), same(1, 1, 1, 12, 11, 2, 3)}, false, 1, 1);
  check({same(0, 2, 2, 4, 4, 1)}, false, 2, 2);
}

// The most of a box that its class may leave unused: half, where the class is not tiny.
void waste() {
  for (const int64_t size : {33, 41, 65}) {
    for (const int64_t rate : {6, 12, 18, 24}) {
      DenseConvArgs args = {};
      args.shape = same(1, 64, 128, size, size, rate);
      int64_t tiles = 0;
      for (const DenseBoxLaunch& launch : dense_box_launches("op", &args, 1, 128)) {
        tiles += launch.items;
      }
      EXPECT(tiles * kDenseBoxPixels <= 3 * size * size);
    }
  }
}

}  // namespace

int main() {
  sums_and_writers();
  waste();
  return testing::report("dense_boxes");
}
