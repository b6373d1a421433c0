// SPDX-License-Identifier: Apache-2.0
// Max pooling forward and backward: how the work is cut into tasks.
#include "chained_residual_pool/max_pool_gather.h"

namespace pydense::PYDENSE_ISA {
namespace {

// Elements of a row at work, and channels of a channels_last tile.
constexpr int64_t kForwardElements = 2048;
constexpr int64_t kForwardUnit = 256;
constexpr int64_t kBackwardElements = 8192;
constexpr int64_t kBackwardUnit = 512;
constexpr int64_t kTaskElements = 65536;
constexpr int64_t kTaskRows = 32;  // at least: every task reduces the rows around it again

// How the work is cut: an image into groups of channels that lie side by side, those into bands of
// rows, those into tiles of columns.
class Cut {
 public:
  Cut(const PoolShape& shape, int64_t max_unit, int64_t elements)
      : shape_(shape),
        unit_(shape.channels_last ? smaller(max_unit, shape.channels) : 1),
        groups_(ceil_div(shape.channels, unit_)) {
    const int64_t row = shape.width * unit_;
    bands_ = larger(1, shape.height / larger(kTaskRows, ceil_div(kTaskElements, row)));
    together_ = bands_ > 1 ? 1 : larger(1, kTaskElements / (shape.height * row));
    columns_ = ceil_div(shape.width, ceil_div(row, elements));
  }

  int64_t unit() const { return unit_; }
  int64_t columns() const { return columns_; }
  int64_t tasks() const { return ceil_div(shape_.batches * groups_, together_) * bands_; }

  // Calls fn(image, first channel, channels, tile) for the tiles of a task.
  template <class Fn>
  void run(int64_t task, const Fn& fn) const {
    const int64_t band = task % bands_;
    const int64_t first = task / bands_ * together_;
    const int64_t end = smaller(first + together_, shape_.batches * groups_);
    for (int64_t i = first; i < end; ++i) {
      const int64_t channel = i % groups_ * unit_;
      const int64_t channels = smaller(unit_, shape_.channels - channel);
      for (int64_t x = 0; x < shape_.width; x += columns_) {
        fn(i / groups_, channel, channels,
           PoolTile{shape_.height * band / bands_, shape_.height * (band + 1) / bands_, x,
                    smaller(x + columns_, shape_.width)});
      }
    }
  }

 private:
  const PoolShape& shape_;
  int64_t unit_;
  int64_t groups_;
  int64_t bands_;
  int64_t together_;  // groups of channels in a task
  int64_t columns_;
};

// Elements of a dense picture before (image, channel, y, x).
int64_t dense_index(const PoolShape& shape, int64_t image, int64_t channel, int64_t y, int64_t x) {
  return shape.channels_last
             ? ((image * shape.height + y) * shape.width + x) * shape.channels + channel
             : ((image * shape.channels + channel) * shape.height + y) * shape.width + x;
}

template <class S>
PoolPicture<S> picture_of(const PoolShape& shape, const PoolSource& source, int64_t image,
                          int64_t channel, int64_t channels) {
  const auto* const data = static_cast<const S*>(source.data);
  return {data + image * source.batch + channel * (shape.channels_last ? 1 : source.channel),
          source.row,
          shape.channels_last ? shape.channels : 1,
          shape.height,
          shape.width,
          channels};
}

template <class S>
void forward(const MaxPoolArgs& args, ParallelFor parallel_for) {
  const PoolShape& shape = args.shape;
  const Cut cut(shape, kForwardUnit, kForwardElements);
  const int64_t pixel = shape.channels_last ? shape.channels : 1;
  parallel_tasks(parallel_for, cut.tasks(), [&](int64_t task) {
    TilePool<S, S> pool(shape.size, args.offsets != nullptr, cut.columns(), cut.unit());
    cut.run(task, [&](int64_t image, int64_t channel, int64_t channels, const PoolTile& tile) {
      const int64_t count = (tile.right - tile.left) * channels;
      pool.run(picture_of<S>(shape, args.x, image, channel, channels), tile, [&](int64_t y) {
        const int64_t at = dense_index(shape, image, channel, y, tile.left);
        return PoolSink<S>{static_cast<S*>(args.out) + at,
                           args.offsets == nullptr ? nullptr : args.offsets + at,
                           channels == pixel ? count : channels,
                           0,
                           pixel,
                           pixel};
      });
    });
  });
}

template <class S>
void backward(const MaxPoolBackwardArgs& args, ParallelFor parallel_for) {
  const PoolShape& shape = args.shape;
  const Cut cut(shape, kBackwardUnit, kBackwardElements);
  parallel_tasks(parallel_for, cut.tasks(), [&](int64_t task) {
    PoolGather<S> work(args, cut.columns(), cut.unit());
    cut.run(task, [&](int64_t image, int64_t channel, int64_t channels, const PoolTile& tile) {
      work.run(picture_of<S>(shape, args.grad, image, channel, channels),
               dense_index(shape, image, channel, 0, 0), tile);
    });
  });
}

}  // namespace

extern const MaxPoolTable kMaxPoolTable;
const MaxPoolTable kMaxPoolTable = {
    {forward<float>, forward<double>, forward<BFloat16>, forward<Half>},
    {backward<float>, backward<double>, backward<BFloat16>, backward<Half>}};

}  // namespace pydense::PYDENSE_ISA
