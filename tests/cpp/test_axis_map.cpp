// SPDX-License-Identifier: Apache-2.0
// Axis maps and their inverses against their definition, and the tables made of them.
#include <algorithm>
#include <cmath>
#include <utility>

#include "axis_weights.h"
#include "testing.h"
#include "upsample/axis_table.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)
using testing::weight_of;

namespace {

template <class T>
void check_axis_map(const AxisMap<T>& map, const AxisSpec& spec) {
  AxisTaps<T> before = {-1, -1, 0, 0};
  for (int64_t y = 0; y < map.out_size; ++y) {
    const AxisTaps<T> taps = portable::axis_taps(map, y);
    EXPECT(taps.i0 >= before.i0 && taps.i1 >= before.i1);
    EXPECT(taps.i1 == taps.i0 || taps.i1 == taps.i0 + 1);
    before = taps;
    const bool inside = portable::is_inside(map, taps);
    EXPECT(inside == (taps.i1 >= 0 && taps.i1 < map.in_size));
    for (int64_t i = 0; i < map.in_size; ++i) {
      const double wanted = weight_of(spec, y, i);
      const double got = inside ? static_cast<double>(portable::tap_weight(taps, i)) : 0;
      EXPECT(std::fabs(got - wanted) < (sizeof(T) == 4 ? 2e-5 : 1e-12));
    }
  }
  for (int64_t i = 0; i < map.in_size; ++i) {
    const AxisRange range = portable::outputs_of_input(map, i);
    for (int64_t y = 0; y < map.out_size; ++y) {
      const AxisTaps<T> taps = portable::axis_taps(map, y);
      EXPECT((taps.i0 == i || taps.i1 == i) == (y >= range.begin && y < range.end));
    }
  }
}

template <class T>
void test_axis_maps() {
  for (int64_t in = 1; in < 20; in += 3) {
    for (int64_t out = 1; out < 70; out += 4) {
      for (const bool corners : {false, true}) {
        const AxisGrid grid = corners ? AxisGrid::kAlignCorners : AxisGrid::kHalfPixel;
        check_axis_map(portable::interpolate_axis<T>(in, out, corners, 0),
                       {grid, AxisBorder::kClamp, in, out, 0, 1, 0});
      }
      for (const double factor : {0.3, 1.1, 7.0}) {
        check_axis_map(portable::interpolate_axis<T>(in, out, false, factor),
                       {AxisGrid::kHalfPixel, AxisBorder::kClamp, in, out, factor, 1, 0});
      }
      for (const int64_t stride : {1, 2, 3, 8}) {
        for (const double offset : {-100.0, -17.25, -2.5, -1.0, 0.0, 0.5, 3.0, 7.25, 300.0}) {
          for (const AxisBorder border : {AxisBorder::kZeros, AxisBorder::kClamp}) {
            check_axis_map(portable::crop_axis<T>(in, out, stride, offset, border),
                           {AxisGrid::kCrop, border, in, out, 0, stride, offset});
          }
        }
      }
    }
  }
  // Nothing overflows on the way to the ends of the earth.
  const AxisMap<T> tiny = portable::interpolate_axis<T>(7, 3, false, 1e-300);
  EXPECT(portable::axis_taps(tiny, 2).i1 == 6);
  const AxisMap<T> far = portable::crop_axis<T>(5, 9, 3, -1e12, AxisBorder::kZeros);
  EXPECT(portable::axis_taps(far, 8).i0 == -1 && portable::outputs_of_input(far, 4).end == 9);
  // A fraction that rounds to 1 is the next whole number.
  const AxisMap<T> near = portable::crop_axis<T>(5, 9, 1, 2 - 1e-17, AxisBorder::kZeros);
  EXPECT(near.start == 2 && near.fraction == 0);
}
template <class T>
void test_axis_table() {
  const AxisSpec spec = {AxisGrid::kCrop, AxisBorder::kZeros, 3, 40, 0, 4, -9.5};
  const AxisMap<T> map = portable::crop_axis<T>(3, 40, 4, -9.5, AxisBorder::kZeros);
  AxisTable<T> made(spec);
  const AxisTable<T> table = std::move(made);
  EXPECT(table.in_size == 3 && table.size == 40);
  for (int64_t y = 0; y < table.size + AxisTable<T>::kPadding; ++y) {
    const AxisTaps<T> taps = portable::axis_taps(map, std::min(y, table.size - 1));
    EXPECT(table.i0[y] == taps.i0 && table.i1[y] == taps.i1);
    EXPECT(table.w0[y] == taps.w0 && table.w1[y] == taps.w1);
    if (y < table.size) {
      EXPECT(portable::is_inside(map, taps) ? y >= table.begin - 1 && y <= table.end
                                            : y < table.begin || y >= table.end);
    }
  }
  EXPECT_THROWS(AxisTable<T>(interpolation_axis(0, 4, false)),
                "sizes must be in [1, 2147483583], got 0 to 4");
}

}  // namespace

int main() {
  test_axis_maps<float>();
  test_axis_maps<double>();
  test_axis_table<float>();
  test_axis_table<double>();
  return testing::report("axis_map");
}
