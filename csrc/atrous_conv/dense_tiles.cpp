// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/dense_tiles.h"

#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"

namespace pydense {
namespace {

// Of an H200, which all cards take: results do not depend on the card.
constexpr int64_t kBlocksAtOnce = 132;
// What a block costs besides its steps, and a part besides its sums, in steps of 128 pixels.
constexpr double kBlockSteps = 6;
constexpr double kPartSteps = 0.1;
constexpr double kSumLaunchSteps = 4;
constexpr int64_t kMaxSplits = 32;
constexpr int64_t kLeastSteps = 8;  // of a part

struct Candidate {
  DenseClass own;
  int64_t tiles;  // with those of outputs
  int64_t steps;

  int64_t splits(int64_t most) const {
    const int64_t parts = std::clamp<int64_t>(ceil_div(steps, most), 1, kMaxSplits);
    return steps == 0 ? 1 : ceil_div(steps, ceil_div(steps, parts));
  }
  // In steps of a full tile.
  double work(int64_t parts) const {
    return (static_cast<double>(ceil_div(steps, parts)) + kBlockSteps) *
           static_cast<double>(own.tile_pixels) / kDenseRows;
  }
};

std::vector<Candidate> candidates_of(const char* op, const DenseConvArgs* branches, int count,
                                     int64_t columns, int64_t depth) {
  std::vector<Candidate> found;
  for (int b = 0; b < count; ++b) {
    const DenseConvShape& s = branches[b].shape;
    PYDENSE_CHECK(s.kernel_height <= UINT16_MAX && s.kernel_width <= UINT16_MAX, op,
                  ": kernel size must be below 65536 on CUDA, got (", s.kernel_height, ", ",
                  s.kernel_width, ")");
    const auto rows = tap_segments(s.kernel_height, s.dilation_y, s.top, s.height, s.out_height);
    const auto across = tap_segments(s.kernel_width, s.dilation_x, s.left, s.width, s.out_width);
    const int64_t chunks = ceil_div(s.channels, depth);
    for (const TapSegment& row : rows) {
      for (const TapSegment& column : across) {
        const int64_t height = row.end - row.begin;
        const int64_t width = column.end - column.begin;
        const int64_t taps = (row.last - row.first) * (column.last - column.first);
        PYDENSE_CHECK(height * width <= INT32_MAX / std::max<int64_t>(s.batches, 1), op,
                      ": x must have less than 2^31 pixels on CUDA, got ", s.batches, " x ",
                      s.out_height, " x ", s.out_width);
        const int64_t pixels = s.batches * height * width;
        const int64_t even = ceil_div(pixels, ceil_div(pixels, int64_t{kDenseRows}));
        const int64_t of_tile = ceil_div(even, int64_t{kDenseGroup}) * kDenseGroup;
        DenseClass own = {};
        own.pixels = static_cast<uint32_t>(pixels);
        own.y = static_cast<int32_t>(row.begin);
        own.x = static_cast<int32_t>(column.begin);
        own.height = static_cast<int32_t>(height);
        own.width = static_cast<int32_t>(width);
        own.tile_pixels = static_cast<uint16_t>(of_tile);
        own.first_row = static_cast<uint16_t>(row.first);
        own.num_rows = static_cast<uint16_t>(taps == 0 ? 0 : row.last - row.first);
        own.first_column = static_cast<uint16_t>(column.first);
        own.num_columns = static_cast<uint16_t>(taps == 0 ? 0 : column.last - column.first);
        own.branch = static_cast<uint16_t>(b);
        own.rate = 1;
        found.push_back(
            {own, ceil_div(pixels, of_tile) * ceil_div(s.outputs, columns), taps * chunks});
      }
    }
  }
  return found;
}

// Steps of a part, at most: of few even cuts of the longest sum, that with the least time.
int64_t most_steps(const std::vector<Candidate>& candidates) {
  int64_t longest = 1;
  for (const Candidate& c : candidates) {
    longest = std::max(longest, c.steps);
  }
  int64_t best = longest;
  double least = 0;
  for (int64_t cuts = 1; cuts <= kMaxSplits && (cuts == 1 || cuts * kLeastSteps <= longest);
       ++cuts) {
    const int64_t most = ceil_div(longest, cuts);
    double total = 0;
    double slowest = 0;
    double adding = 0;
    for (const Candidate& c : candidates) {
      const int64_t parts = c.splits(most);
      total += static_cast<double>(c.tiles * parts) * c.work(parts);
      slowest = std::max(slowest, c.work(parts));
      if (parts > 1) {
        adding +=
            kPartSteps * static_cast<double>(c.tiles * parts * c.own.tile_pixels) / kDenseRows;
      }
    }
    // The last blocks leave half of the card idle, as long as one of them takes.
    const double time = std::max(slowest, total / kBlocksAtOnce + slowest / 2) + adding +
                        (adding > 0 ? kSumLaunchSteps : 0);
    if (cuts == 1 || time < least) {
      least = time;
      best = most;
    }
  }
  return best;
}

}  // namespace

std::vector<DenseLaunch> dense_launches(const char* op, const DenseConvArgs* branches, int count,
                                        int64_t columns, int64_t depth) {
  std::vector<Candidate> candidates = candidates_of(op, branches, count, columns, depth);
  const int64_t most = most_steps(candidates);
  // Blocks start in order: the last ones are the shortest.
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](const Candidate& a, const Candidate& b) {
                     return a.work(a.splits(most)) > b.work(b.splits(most));
                   });
  std::vector<DenseLaunch> launches;
  for (Candidate& c : candidates) {
    if (launches.empty() || launches.back().classes.size() == kMaxDenseClasses) {
      launches.emplace_back();
    }
    DenseLaunch& launch = launches.back();
    const int64_t splits = c.splits(most);
    c.own.splits = static_cast<uint16_t>(splits);
    c.own.first_item = static_cast<uint32_t>(launch.items);
    c.own.first_sum = static_cast<uint32_t>(launch.sums);
    c.own.first_part = static_cast<uint32_t>(launch.parts);
    launch.classes.push_back(c.own);
    launch.items += c.tiles * splits;
    if (splits > 1) {
      launch.sums += c.tiles;
      launch.parts += c.tiles * splits;
    }
    PYDENSE_CHECK(launch.items <= INT32_MAX, op, ": x must have less than 2^31 tiles, got ",
                  launch.items);
  }
  return launches;
}

}  // namespace pydense
