// SPDX-License-Identifier: Apache-2.0
// The gradient of a depthwise convolution's weight. Contiguous: a channel is a task, and a tap sums
// products of rows. channels_last: slabs of rows have sums of their own, added in their order.
#include "atrous_conv/depthwise_rows.h"
#include "common/with_constant.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kMaxSlabs = 64;
constexpr int64_t kTaskChannels = 64;
constexpr int kPixels = 8;  // of a channels_last row at work

// sum += a * b over `count` columns, a vector of sums.
template <class T>
PYDENSE_HD RowVec<T> add_products(const T* a, const T* b, int64_t count, RowVec<T> sum) {
  using V = RowVec<T>;
  constexpr int64_t kLanes = kLanesIn<V>;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    sum = fma(load<V>(a + i), load<V>(b + i), sum);
  }
  if (i < count) {
    sum = fma(load_part<V>(a + i, count - i), load_part<V>(b + i, count - i), sum);
  }
  return sum;
}

template <class S>
void contiguous(const DepthwiseGradientArgs& args, ParallelFor parallel_for) {
  using T = ComputeOf<S>;
  using V = RowVec<T>;
  const DepthwiseShape& shape = args.shape;
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  parallel_tasks(parallel_for, shape.channels, [&](int64_t c) {
    RowRing<S> ring(shape);
    const Buffer row = buffer_of<T>(static_cast<size_t>(shape.out_width));
    const Buffer memory = buffer_of<V>(static_cast<size_t>(taps));
    T* const grad = row.as<T>();
    V* const sums = memory.as<V>();
    for (int64_t k = 0; k < taps; ++k) {
      sums[k] = V{};
    }
    for (int64_t n = 0; n < shape.batches; ++n) {
      ring.start(static_cast<const S*>(args.x.data) + n * args.x.batch + c * args.x.channel,
                 args.x.row, 0);
      for (int64_t y = 0; y < shape.out_height; ++y) {
        ring.advance(y);
        convert_row(static_cast<const S*>(args.grad.data) + n * args.grad.batch +
                        c * args.grad.channel + y * args.grad.row,
                    shape.out_width, grad);
        for (int64_t i = 0; i < shape.kernel_height; ++i) {
          const T* const x = ring.read(y, i);
          if (x == nullptr) {
            continue;
          }
          for (int64_t j = 0; j < shape.kernel_width; ++j) {
            const int64_t shift = j * shape.dilation_x - shape.left;
            const int64_t begin = larger(0, -shift);
            const int64_t end = smaller(shape.out_width, shape.width - shift);
            if (begin < end) {
              V& sum = sums[i * shape.kernel_width + j];
              sum = add_products(grad + begin, x + begin + shift, end - begin, sum);
            }
          }
        }
      }
    }
    for (int64_t k = 0; k < taps; ++k) {
      store_as(static_cast<S*>(args.weight) + c * taps + k, lane_sum<kLanesIn<V>>(sums[k]));
    }
  });
}

// Adds what N pixels side by side give, for `count` channels from c on.
template <class S, class T, int N>
PYDENSE_HD void add_pixels(const S* grad, const PixelTap<S, T>* taps, int64_t num_taps,
                           int64_t channels, int64_t c, int64_t count) {
  using V = RowVec<T>;
  const bool whole = count == kLanesIn<V>;
  const auto read = [&](const auto* from) {
    return whole ? load_as<V>(from) : load_part<V>(from, count);
  };
  V own[N];
  for (int k = 0; k < N; ++k) {
    own[k] = read(grad + k * channels + c);
  }
  for (int64_t t = 0; t < num_taps; ++t) {
    V sum = read(taps[t].weight + c);
    for (int k = 0; k < N; ++k) {
      sum = fma(own[k], read(taps[t].x + k * channels + c), sum);
    }
    if (whole) {
      store(taps[t].weight + c, sum);
    } else {
      store_part(taps[t].weight + c, sum, count);
    }
  }
}

template <class S>
void channels_last(const DepthwiseGradientArgs& args, const DepthwisePlan& plan,
                   ParallelFor parallel_for) {
  using T = ComputeOf<S>;
  constexpr int64_t kLanes = kLanesIn<RowVec<T>>;
  const DepthwiseShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const int64_t num_taps = shape.kernel_height * shape.kernel_width;
  const int64_t rows = shape.batches * shape.out_height;
  const int64_t slabs = smaller(rows, kMaxSlabs);
  const int64_t slab_sums = num_taps * channels;
  const Buffer partial = buffer_of<T>(
      checked_bytes(static_cast<size_t>(larger(1, slabs)), static_cast<size_t>(slab_sums)));
  T* const sums = partial.as<T>();  // [slabs, taps, channels]

  parallel_tasks(parallel_for, slabs, [&](int64_t slab) {
    const Buffer memory = buffer_of<PixelTap<S, T>>(static_cast<size_t>(num_taps));
    auto* const taps = memory.as<PixelTap<S, T>>();
    T* const own = sums + slab * slab_sums;
    for (int64_t i = 0; i < slab_sums; ++i) {
      own[i] = T{};
    }
    const auto run_row = [&](int64_t image, int64_t y) {
      const auto* const x_image = static_cast<const S*>(args.x.data) + image * args.x.batch;
      const auto* const grad =
          static_cast<const S*>(args.grad.data) + image * args.grad.batch + y * args.grad.row;
      const auto run_pixels = [&](const TapSegment& segment, int64_t x, auto pixels) {
        const int64_t count = taps_at<S, T>(shape, segment, y, x, x_image, args.x.row, own, taps);
        for (int64_t c = 0; c < channels; c += kLanes) {
          add_pixels<S, T, decltype(pixels)::value>(grad + x * channels, taps, count, channels, c,
                                                    smaller(kLanes, channels - c));
        }
      };
      for (int64_t s = 0; s < plan.num_segments; ++s) {
        const TapSegment& segment = plan.segments[s];
        for (int64_t x = segment.begin; x < segment.end; x += kPixels) {
          with_constant<kPixels>(segment.end - x,
                                 [&](auto pixels) { run_pixels(segment, x, pixels); });
        }
      }
    };
    for (int64_t k = rows * slab / slabs; k < rows * (slab + 1) / slabs; ++k) {
      run_row(k / shape.out_height, plan.rows[k % shape.out_height]);
    }
  });
  parallel_tasks(parallel_for, ceil_div(channels, kTaskChannels), [&](int64_t task) {
    const int64_t begin = task * kTaskChannels;
    for (int64_t c = begin; c < smaller(begin + kTaskChannels, channels); ++c) {
      for (int64_t k = 0; k < num_taps; ++k) {
        T sum = T{};
        for (int64_t slab = 0; slab < slabs; ++slab) {
          sum += sums[slab * slab_sums + k * channels + c];
        }
        store_as(static_cast<S*>(args.weight) + c * num_taps + k, sum);
      }
    }
  });
}

template <class S>
void run(const DepthwiseGradientArgs& args, const DepthwisePlan& plan, ParallelFor parallel_for) {
  args.shape.channels_last ? channels_last<S>(args, plan, parallel_for)
                           : contiguous<S>(args, parallel_for);
}

}  // namespace

extern const DepthwiseGradientTable kDepthwiseGradientTable;
const DepthwiseGradientTable kDepthwiseGradientTable = {
    {run<float>, run<double>, run<BFloat16>, run<Half>}};

}  // namespace pydense::PYDENSE_ISA
