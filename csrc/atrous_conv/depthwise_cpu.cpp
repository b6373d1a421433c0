// SPDX-License-Identifier: Apache-2.0
// Depthwise atrous convolution. Contiguous: lanes are columns, rows of x are converted once and
// stay in a ring. channels_last: lanes are channels, and a few pixels share what is read of the
// weight.
#include "atrous_conv/depthwise_sums.h"
#include "common/with_constant.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kTaskElements = 65536;
constexpr int64_t kBandElements = 1 << 18;

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
          for (int64_t x = segment.begin; x < segment.end; x += kRowVectors * kLanes) {
            with_constant<kRowVectors>(ceil_div(segment.end - x, kLanes), [&](auto n) {
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
                                                    to + x * channels, channels);
        }
      };
      for (int64_t s = 0; s < plan.num_segments; ++s) {
        const TapSegment& segment = plan.segments[s];
        for (int64_t x = segment.begin; x < segment.end; x += kRowPixels) {
          with_constant<kRowPixels>(segment.end - x,
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
