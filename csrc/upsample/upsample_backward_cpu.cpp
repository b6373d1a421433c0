// SPDX-License-Identifier: Apache-2.0
// Backward of all inputs at once: a few rows of the output's gradient are made ready (the ReLU's
// mask), then every input gathers what is its share of them while they are in the cache.
#include <memory>

#include "upsample/upsample_gather_pixels.h"
#include "upsample/upsample_gather_rows.h"

namespace pydense::PYDENSE_ISA {
namespace {

constexpr int64_t kTaskElements = 262144;  // of the output's gradient
// Large enough that few cells are cut, and in the second-level cache.
constexpr int64_t kChunkElements = 65536;
constexpr int64_t kBandRows = 16;  // of the input, at least: a band reads a cell of the one before
constexpr int64_t kChannels = 32;  // of a channels_last picture, in a task
constexpr int64_t kMaxChannels = 256;

// [begin, end) of outputs that touch the inputs [first, end).
template <class T>
AxisRange outputs_of(const AxisTable<T>& axis, int64_t first, int64_t end) {
  const auto lower_bound = [&](const int32_t* values, int64_t wanted) {
    int64_t low = axis.begin;
    int64_t high = axis.end;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (values[middle] < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  return {lower_bound(axis.i1, first), lower_bound(axis.i0, end)};
}

template <class S>
class Backward {
  using T = ComputeOf<S>;
  static constexpr int kLanes = kNativeLanesOf<T>;
  using V = Vec<T, kLanes>;

  struct Input {
    const UpsampleInput* to;
    AxisTable<T> y;
    AxisTable<T> x;
  };

 public:
  explicit Backward(const UpsampleBackwardArgs& args)
      : args_(args), shape_(args.shape), grad_(static_cast<const S*>(args.grad)) {
    for (int k = 0; k < args.num_inputs; ++k) {
      if (args.inputs[k].same_size) {
        same_ = static_cast<S*>(args.inputs[k].data);
      } else {
        Input& input = inputs_[num_inputs_++];
        input.to = args.inputs + k;
        input.y = AxisTable<T>(input.to->y);
        input.x = AxisTable<T>(input.to->x);
      }
    }
    // Bands of one input know which rows they read; several inputs go down a whole picture.
    alone_ = num_inputs_ == 1 && same_ == nullptr && args.out == nullptr;
  }

  void run(ParallelFor parallel_for) const {
    const bool last = shape_.channels_last;
    const int64_t planes = shape_.batches * (last ? 1 : shape_.channels);
    const int64_t row = shape_.width * (last ? shape_.channels : 1);
    const int64_t block = alone_ ? kMaxChannels : kChannels;
    const int64_t parts = last ? ceil_div(shape_.channels, block) : 1;
    int64_t bands = 1;
    if (alone_) {
      const int64_t height = inputs_[0].to->y.in_size;
      const int64_t wanted = ceil_div(shape_.height * (row / parts), kTaskElements);
      bands = larger(smaller(wanted, height / kBandRows), 1);
    }
    const int64_t group =
        last || bands > 1 ? 1 : larger(kTaskElements / (shape_.height * row * 4), 1);
    parallel_tasks(parallel_for, ceil_div(planes, group) * parts * bands, [&](int64_t task) {
      const Job job = {task / (parts * bands) * group, task % bands, bands};
      const int64_t part = task / bands % parts;
      if (last) {
        pixels(job, part * block, smaller((part + 1) * block, shape_.channels));
      } else {
        rows(job, smaller(job.plane + group, planes));
      }
    });
  }

 private:
  struct Job {
    int64_t plane;
    int64_t band;
    int64_t bands;
  };

  // The rows of input k that a job makes.
  AxisRange input_rows(const Job& job, int k) const {
    const int64_t height = inputs_[k].to->y.in_size;
    return {height * job.band / job.bands, height * (job.band + 1) / job.bands};
  }
  // The rows of the output's gradient it goes through.
  AxisRange output_rows(const Job& job) const {
    if (!alone_) {
      return {0, shape_.height};
    }
    const AxisRange own = input_rows(job, 0);
    return outputs_of(inputs_[0].y, own.begin, own.end);
  }
  int64_t chunk_rows(int64_t row) const {
    return alone_ ? shape_.height : larger(kChunkElements / row, 1);
  }

  void rows(const Job& job, int64_t end_plane) const {
    std::unique_ptr<GatherRows<S>> gathers[kMaxUpsampleInputs];
    for (int k = 0; k < num_inputs_; ++k) {
      gathers[k] = std::make_unique<GatherRows<S>>(inputs_[k].y, inputs_[k].x,
                                                   inputs_[k].to->x.in_size, shape_.width);
    }
    const AxisRange range = output_rows(job);
    const int64_t chunk = chunk_rows(shape_.width);
    const Buffer masked =
        alone_ ? Buffer() : buffer_of<S>(static_cast<size_t>(chunk * shape_.width));
    for (int64_t plane = job.plane; plane < end_plane; ++plane) {
      const int64_t batch = plane / shape_.channels;
      const int64_t channel = plane % shape_.channels;
      const S* const grad =
          grad_ + batch * args_.grad_strides.batch + channel * args_.grad_strides.channel;
      for (int k = 0; k < num_inputs_; ++k) {
        const UpsampleInput& to = *inputs_[k].to;
        const AxisRange own = input_rows(job, k);
        gathers[k]->begin(static_cast<S*>(to.data) + plane * to.y.in_size * to.x.in_size, own.begin,
                          own.end, range.begin);
      }
      for (int64_t y = range.begin; y < range.end; y += chunk) {
        const int64_t end = smaller(y + chunk, range.end);
        const S* from = grad + y * args_.grad_strides.row;
        int64_t stride = args_.grad_strides.row;
        if (!alone_) {
          const int64_t at = (plane * shape_.height + y) * shape_.width;
          S* const to = same_ != nullptr ? same_ + at : masked.as<S>();
          for (int64_t i = 0; i < end - y; ++i) {
            mask(from + i * stride, at + i * shape_.width, shape_.width, to + i * shape_.width, 1);
          }
          from = to;
          stride = shape_.width;
        }
        for (int k = 0; k < num_inputs_; ++k) {
          gathers[k]->add(from, stride, y, end);
        }
      }
      for (int k = 0; k < num_inputs_; ++k) {
        gathers[k]->end();
      }
    }
    for (int k = 0; k < num_inputs_; ++k) {
      gathers[k]->flush();
    }
  }

  // Channels [first, end) of a channels_last picture.
  void pixels(const Job& job, int64_t first, int64_t end) const {
    const int64_t channels = shape_.channels;
    std::unique_ptr<GatherPixels<S>> gathers[kMaxUpsampleInputs];
    const AxisRange range = output_rows(job);
    for (int k = 0; k < num_inputs_; ++k) {
      const UpsampleInput& to = *inputs_[k].to;
      const AxisRange own = input_rows(job, k);
      gathers[k] = std::make_unique<GatherPixels<S>>(inputs_[k].y, inputs_[k].x, to.x.in_size,
                                                     channels, end - first);
      gathers[k]->begin(
          static_cast<S*>(to.data) + job.plane * to.y.in_size * to.x.in_size * channels + first,
          own.begin, own.end, range.begin);
    }
    const int64_t count = end - first;
    const int64_t chunk = chunk_rows(shape_.width * count);
    const bool scratch = !alone_ && same_ == nullptr;
    const Buffer masked =
        scratch ? buffer_of<S>(static_cast<size_t>(chunk * shape_.width * count)) : Buffer();
    for (int64_t y = range.begin; y < range.end; y += chunk) {
      const int64_t end_y = smaller(y + chunk, range.end);
      PixelRows<S> from = {
          grad_ + job.plane * args_.grad_strides.batch + y * args_.grad_strides.row + first,
          args_.grad_strides.row, channels, shape_.width * channels - first};
      if (!alone_) {
        const int64_t at = (job.plane * shape_.height + y) * shape_.width * channels + first;
        PixelRows<S> to = {masked.as<S>(), shape_.width * count, count, shape_.width * count};
        if (!scratch) {
          // What lies between the channels of this task, others are writing.
          const bool shared = count < channels && count % kLanes != 0;
          to = {same_ + at, shape_.width * channels, channels, shared ? 0 : from.readable};
        }
        for (int64_t i = 0; i < end_y - y; ++i) {
          for (int64_t x = 0; x < shape_.width; ++x) {
            mask(from.data + i * from.row_stride + x * channels,
                 at + (i * shape_.width + x) * channels, count,
                 const_cast<S*>(to.data) + i * to.row_stride + x * to.pixel_stride, channels);
          }
        }
        from = to;
      }
      for (int k = 0; k < num_inputs_; ++k) {
        gathers[k]->add(from, y, end_y);
      }
    }
    for (int k = 0; k < num_inputs_; ++k) {
      gathers[k]->end();
    }
  }

  // to[i] = out[at + i] <= 0 ? 0 : grad[i], where the next count follow after `pitch` elements.
  void mask(const S* grad, int64_t at, int64_t count, S* to, int64_t pitch) const {
    if (args_.out == nullptr) {
      std::memcpy(to, grad, static_cast<size_t>(count) * sizeof(S));
      return;
    }
    const S* const out = static_cast<const S*>(args_.out) + at;
    const int64_t ahead = elements_ahead<S>(pitch);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      __builtin_prefetch(grad + i + ahead);
      __builtin_prefetch(out + i + ahead);
      __builtin_prefetch(to + i + ahead, 1);
      const V value = load_as<V>(grad + i);
      store_as(to + i, load_as<V>(out + i) <= 0 ? V{} : value);
    }
    if (i < count) {
      const V value = load_part<V>(grad + i, count - i);
      store_part(to + i, load_part<V>(out + i, count - i) <= 0 ? V{} : value, count - i);
    }
  }

  const UpsampleBackwardArgs& args_;
  const UpsampleShape& shape_;
  const S* grad_;
  Input inputs_[kMaxUpsampleInputs] = {};
  int num_inputs_ = 0;
  S* same_ = nullptr;
  bool alone_ = false;
};

}  // namespace

template <class S>
void upsample_backward_cpu(const UpsampleBackwardArgs& args, ParallelFor parallel_for) {
  Backward<S>(args).run(parallel_for);
}

template void upsample_backward_cpu<float>(const UpsampleBackwardArgs&, ParallelFor);
template void upsample_backward_cpu<double>(const UpsampleBackwardArgs&, ParallelFor);
template void upsample_backward_cpu<BFloat16>(const UpsampleBackwardArgs&, ParallelFor);
template void upsample_backward_cpu<Half>(const UpsampleBackwardArgs&, ParallelFor);

}  // namespace pydense::PYDENSE_ISA
