// SPDX-License-Identifier: Apache-2.0
// Maps of taps: rows of sums stay in the first-level cache while the rows of the maps pass by, each
// of which is read once.
#include "atrous_conv/tap_maps.h"
#include "atrous_conv/tap_rows.h"
#include "common/buffer.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kTileColumns = 512;
constexpr int64_t kTileOutputs = 16;  // where the outputs of a pixel lie side by side
constexpr int64_t kTaskElements = 16384;

template <class T, class M>
void add_row(const M* from, int64_t count, T* to) {
  using V = Vec<T, kNativeLanesOf<T>>;
  constexpr int64_t kLanes = kLanesIn<V>;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(to + i, load<V>(to + i) + load_as<V>(from + i));
  }
  if (i < count) {
    store_part(to + i, load_part<V>(to + i, count - i) + load_part<V>(from + i, count - i),
               count - i);
  }
}

template <class S, class M>
void sum(const TapSumArgs& args, ParallelFor parallel_for) {
  using T = ComputeOf<S>;
  const TapMaps& shape = args.shape;
  const auto* const maps = static_cast<const M*>(args.maps);
  const auto* const bias = static_cast<const T*>(args.bias);
  const int64_t plane = shape.height * shape.width;
  const bool planar = args.out.pixel == 1;
  const int64_t unit = planar ? 1 : smaller(kTileOutputs, shape.outputs);
  const int64_t groups = ceil_div(shape.outputs, unit);
  const int64_t band = larger(1, kTaskElements / (unit * shape.width));
  const int64_t bands = ceil_div(shape.height, band);
  const int64_t tile = smaller(kTileColumns, shape.width);

  parallel_tasks(parallel_for, groups * bands, [&](int64_t task) {
    const Buffer memory = buffer_of<T>(static_cast<size_t>(unit * tile));
    T* const sums = memory.as<T>();  // [unit, tile]
    const int64_t first = task / bands * unit;
    const int64_t count = smaller(unit, shape.outputs - first);
    const int64_t top = task % bands * band;
    const int64_t bottom = smaller(top + band, shape.height);
    const auto sum_row = [&](int64_t o, int64_t y, int64_t left, int64_t right, T* to) {
      const T start = bias == nullptr ? T{} : bias[o];
      for (int64_t x = 0; x < right - left; ++x) {
        to[x] = start;
      }
      for (int64_t t = 0; t < shape.taps; ++t) {
        const Overlap rows = overlap(shape.rows[t], shape.height, y, y + 1);
        const Overlap columns = overlap(shape.columns[t], shape.width, left, right);
        if (rows.begin == y && rows.end > y && columns.end > columns.begin) {
          add_row(maps + (t * shape.outputs + o) * plane + (y + shape.rows[t]) * shape.width +
                      columns.begin + shape.columns[t],
                  columns.end - columns.begin, to + columns.begin - left);
        }
      }
    };
    for (int64_t y = top; y < bottom; ++y) {
      for (int64_t left = 0; left < shape.width; left += tile) {
        const int64_t right = smaller(left + tile, shape.width);
        for (int64_t i = 0; i < count; ++i) {
          sum_row(first + i, y, left, right, sums + i * tile);
        }
        auto* const out = static_cast<S*>(args.out.data) + first * args.out.channel +
                          y * args.out.row + left * args.out.pixel;
        if (planar) {
          using V = Vec<T, kNativeLanesOf<T>>;
          constexpr int64_t kLanes = kLanesIn<V>;
          int64_t x = 0;
          for (; x + kLanes <= right - left; x += kLanes) {
            store_as(out + x, load<V>(sums + x));
          }
          for (; x < right - left; ++x) {
            store_as(out + x, sums[x]);
          }
        } else {
          for (int64_t x = 0; x < right - left; ++x) {
            for (int64_t i = 0; i < count; ++i) {
              store_as(out + x * args.out.pixel + i * args.out.channel, sums[i * tile + x]);
            }
          }
        }
      }
    }
  });
}

template <class S, class M>
void spread(const TapSpreadArgs& args, ParallelFor parallel_for) {
  const TapMaps& shape = args.shape;
  const int64_t planes = shape.taps * shape.outputs;
  const int64_t together = larger(1, kTaskElements / (args.count * shape.width));
  const auto copy_plane = [&](int64_t plane) {
    const int64_t t = plane / shape.outputs;
    const auto* const grad =
        static_cast<const S*>(args.grad) + plane % shape.outputs * shape.height * shape.width;
    M* to = static_cast<M*>(args.maps) + plane * args.count * shape.width;
    // `from` + tap is where a number goes, so what a row reads is the overlap of the shift back.
    const int64_t dy = shift_back(shape.rows[t]);
    const int64_t dx = shift_back(shape.columns[t]);
    for (int64_t y = args.first; y < args.first + args.count; ++y, to += shape.width) {
      copy_shifted(grad, shape.height, shape.width, dy, dx, y, 0, shape.width, to);
    }
  };
  parallel_tasks(parallel_for, ceil_div(planes, together), [&](int64_t task) {
    for (int64_t i = task * together; i < smaller((task + 1) * together, planes); ++i) {
      copy_plane(i);
    }
  });
}

template <class S>
void sum_any(const TapSumArgs& args, ParallelFor parallel_for) {
  args.shape.wide ? sum<S, ComputeOf<S>>(args, parallel_for) : sum<S, S>(args, parallel_for);
}
template <class S>
void spread_any(const TapSpreadArgs& args, ParallelFor parallel_for) {
  args.shape.wide ? spread<S, ComputeOf<S>>(args, parallel_for) : spread<S, S>(args, parallel_for);
}

}  // namespace

extern const TapMapsTable kTapMapsTable;
const TapMapsTable kTapMapsTable = {
    {sum_any<float>, sum_any<double>, sum_any<BFloat16>, sum_any<Half>},
    {spread_any<float>, spread_any<double>, spread_any<BFloat16>, spread_any<Half>}};

}  // namespace pydense::PYDENSE_ISA
