// SPDX-License-Identifier: Apache-2.0
// Depthwise atrous convolution. Contiguous: lanes are columns, rows of x are converted once and
// stay in a ring. channels_last: lanes are channels, and a few pixels share what is read of the
// weight.
#include "atrous_conv/depthwise_rows.h"
#include "common/with_constant.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kTaskElements = 65536;
constexpr int64_t kBandElements = 1 << 18;
constexpr int kColumns = 4;  // vectors of a row at work
constexpr int kPixels = 4;   // of a channels_last row at work

template <class V>
PYDENSE_HD V relu_of(const V& v, bool relu) {
  return relu ? (v < V{} ? V{} : v) : v;
}

template <class S, class T>
void store_row(const T* from, int64_t count, bool relu, S* to) {
  using V = RowVec<T>;
  constexpr int64_t kLanes = kLanesIn<V>;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_as(to + i, relu_of(load<V>(from + i), relu));
  }
  for (; i < count; ++i) {
    store_as(to + i, relu_of(from[i], relu));
  }
}

// A row of the kernel, and the row of x that it meets.
template <class T>
struct KernelRow {
  const T* x;
  const T* weight;
};

// N vectors of sums, of the taps [first, last) of each row; tap j reads from column + j * dilation.
template <class T, int N>
PYDENSE_HD void sum_columns(const KernelRow<T>* rows, int64_t count, int64_t first, int64_t last,
                            int64_t column, int64_t dilation, T start, T* to) {
  using V = RowVec<T>;
  constexpr int64_t kLanes = kLanesIn<V>;
  V sum[N];
  for (int k = 0; k < N; ++k) {
    sum[k] = broadcast<V>(start);
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = first; j < last; ++j) {
      const V weight = broadcast<V>(rows[i].weight[j]);
      const T* const x = rows[i].x + column + j * dilation;
      for (int k = 0; k < N; ++k) {
        sum[k] = fma(weight, load<V>(x + k * kLanes), sum[k]);
      }
    }
  }
  for (int k = 0; k < N; ++k) {
    store(to + k * kLanes, sum[k]);
  }
}

template <class S>
void contiguous(const DepthwiseArgs& args, const DepthwisePlan& plan, ParallelFor parallel_for) {
  using T = ComputeOf<S>;
  constexpr int64_t kLanes = kLanesIn<RowVec<T>>;
  const DepthwiseShape& shape = args.shape;
  const int64_t taps = shape.kernel_height * shape.kernel_width;
  const int64_t plane = shape.out_height * shape.out_width;
  const int64_t planes = shape.batches * shape.channels;
  const int64_t reach = (shape.kernel_height - 1) * shape.dilation_y;
  const int64_t band =
      smaller(shape.out_height, larger(2 * reach + 1, kBandElements / shape.out_width));
  const int64_t bands = ceil_div(shape.out_height, band);
  const int64_t together = bands > 1 ? 1 : larger(1, kTaskElements / plane);

  parallel_tasks(parallel_for, ceil_div(planes, together) * bands, [&](int64_t task) {
    RowRing<S> ring(shape);
    const Buffer kernel = buffer_of<T>(static_cast<size_t>(taps));
    const Buffer sums = buffer_of<T>(static_cast<size_t>(shape.out_width + kLanes));
    const Buffer memory = buffer_of<KernelRow<T>>(static_cast<size_t>(shape.kernel_height));
    auto* const rows = memory.as<KernelRow<T>>();
    auto* const weight = kernel.as<T>();
    T* const to = sums.as<T>();
    const int64_t top = task % bands * band;
    const int64_t bottom = smaller(top + band, shape.out_height);
    const int64_t begin = task / bands * together;
    for (int64_t p = begin; p < smaller(begin + together, planes); ++p) {
      const int64_t c = p % shape.channels;
      const auto* const own = static_cast<const S*>(args.weight) + c * taps;
      for (int64_t k = 0; k < taps; ++k) {
        weight[k] = load_as<T>(own + (args.flipped ? taps - 1 - k : k));
      }
      const T start = args.bias == nullptr ? T{} : load_as<T>(static_cast<const S*>(args.bias) + c);
      ring.start(static_cast<const S*>(args.x.data) + p / shape.channels * args.x.batch +
                     c * args.x.channel,
                 args.x.row, top);
      for (int64_t y = top; y < bottom; ++y) {
        ring.advance(y);
        int64_t count = 0;
        for (int64_t i = 0; i < shape.kernel_height; ++i) {
          if (const T* x = ring.read(y, i); x != nullptr) {
            rows[count++] = {x, weight + i * shape.kernel_width};
          }
        }
        // Segment by segment: what a vector writes behind one's end, the next writes again.
        for (int64_t s = 0; s < plan.num_segments; ++s) {
          const TapSegment& segment = plan.segments[s];
          for (int64_t x = segment.begin; x < segment.end; x += kColumns * kLanes) {
            with_constant<kColumns>(ceil_div(segment.end - x, kLanes), [&](auto n) {
              sum_columns<T, decltype(n)::value>(rows, count, segment.first, segment.last,
                                                 x - shape.left, shape.dilation_x, start, to + x);
            });
          }
        }
        store_row(to, shape.out_width, args.relu,
                  static_cast<S*>(args.out) + p * plane + y * shape.out_width);
      }
    }
  });
}

// Sums of N pixels side by side, `count` channels from c on, a vector or a part of one.
template <class S, class T, int N>
PYDENSE_HD void sum_pixels(const PixelTap<S, const T>* taps, int64_t num_taps, int64_t channels,
                           int64_t c, int64_t count, const T* bias, bool relu, S* to) {
  using V = RowVec<T>;
  const bool whole = count == kLanesIn<V>;
  const auto read = [&](const auto* from) {
    return whole ? load_as<V>(from) : load_part<V>(from, count);
  };
  const V start = bias == nullptr ? V{} : read(bias + c);
  V sum[N];
  for (int k = 0; k < N; ++k) {
    sum[k] = start;
  }
  for (int64_t t = 0; t < num_taps; ++t) {
    const V weight = read(taps[t].weight + c);
    for (int k = 0; k < N; ++k) {
      sum[k] = fma(weight, read(taps[t].x + k * channels + c), sum[k]);
    }
  }
  for (int k = 0; k < N; ++k) {
    const V result = relu_of(sum[k], relu);
    if (whole) {
      store_as(to + k * channels + c, result);
    } else {
      store_part(to + k * channels + c, result, count);
    }
  }
}

template <class S>
void channels_last(const DepthwiseArgs& args, const DepthwisePlan& plan, ParallelFor parallel_for) {
  using T = ComputeOf<S>;
  constexpr int64_t kLanes = kLanesIn<RowVec<T>>;
  const DepthwiseShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const int64_t num_taps = shape.kernel_height * shape.kernel_width;
  const Buffer packed =  // [taps, channels], then the bias
      buffer_of<T>(checked_bytes(static_cast<size_t>(num_taps + 1), static_cast<size_t>(channels)));
  T* const weight = packed.as<T>();
  for (int64_t c = 0; c < channels; ++c) {
    const auto* const own = static_cast<const S*>(args.weight) + c * num_taps;
    for (int64_t k = 0; k < num_taps; ++k) {
      weight[k * channels + c] = load_as<T>(own + (args.flipped ? num_taps - 1 - k : k));
    }
  }
  T* const bias = args.bias == nullptr ? nullptr : weight + num_taps * channels;
  if (bias != nullptr) {
    convert_row(static_cast<const S*>(args.bias), channels, bias);
  }
  const int64_t together = larger(1, kTaskElements / (shape.out_width * channels));
  const int64_t tasks = ceil_div(shape.out_height, together);

  parallel_tasks(parallel_for, shape.batches * tasks, [&](int64_t task) {
    const Buffer memory = buffer_of<PixelTap<S, const T>>(static_cast<size_t>(num_taps));
    auto* const taps = memory.as<PixelTap<S, const T>>();
    const int64_t image = task / tasks;
    const auto* const x_image = static_cast<const S*>(args.x.data) + image * args.x.batch;
    const auto run_row = [&](int64_t y) {
      S* const to =
          static_cast<S*>(args.out) + (image * shape.out_height + y) * shape.out_width * channels;
      const auto run_pixels = [&](const TapSegment& segment, int64_t x, auto pixels) {
        const int64_t count =
            taps_at<S, const T>(shape, segment, y, x, x_image, args.x.row, weight, taps);
        for (int64_t c = 0; c < channels; c += kLanes) {
          sum_pixels<S, T, decltype(pixels)::value>(taps, count, channels, c,
                                                    smaller(kLanes, channels - c), bias, args.relu,
                                                    to + x * channels);
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
    const int64_t first = task % tasks * together;
    for (int64_t k = first; k < smaller(first + together, shape.out_height); ++k) {
      run_row(plan.rows[k]);
    }
  });
}

template <class S>
void forward(const DepthwiseArgs& args, const DepthwisePlan& plan, ParallelFor parallel_for) {
  args.shape.channels_last ? channels_last<S>(args, plan, parallel_for)
                           : contiguous<S>(args, plan, parallel_for);
}

}  // namespace

extern const DepthwiseTable kDepthwiseTable;
const DepthwiseTable kDepthwiseTable = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Half>}};

}  // namespace pydense::PYDENSE_ISA
