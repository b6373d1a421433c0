// SPDX-License-Identifier: Apache-2.0
#include "dense_crf/exact_filter.h"

#include <algorithm>
#include <type_traits>

#include "common/check.h"

namespace pydense {

template <class T>
void check_exact_filter(const ExactFilterArgs<T>& args) {
  constexpr const char* kOp = "exact_gaussian_filter";
  PYDENSE_CHECK(args.dims >= 1 && args.dims <= kMaxExactDims, kOp, ": features must have 1 to ",
                kMaxExactDims, " dimensions, got ", args.dims);
  PYDENSE_CHECK(args.batches >= 0 && args.channels >= 0 && args.points >= 0, kOp,
                ": sizes must not be negative, got ", args.batches, " x ", args.channels, " x ",
                args.points);
  PYDENSE_CHECK(args.feature_batches == args.batches || args.feature_batches == 1, kOp,
                ": features must have 1 or ", args.batches, " images, got ", args.feature_batches);
}

template <class T>
void exact_filter(const ExactFilterArgs<T>& args, ParallelFor parallel_for) {
  check_exact_filter(args);
  if (args.batches == 0 || args.channels == 0 || args.points == 0) {
    return;
  }
  // Tiles have sizes of their own, whatever the number of threads.
  const int64_t images = args.feature_batches;
  const int64_t rows = args.batches / images * args.channels;
  const int64_t row_tiles = ceil_div(rows, kExactRows);
  const int64_t query_tiles = ceil_div(args.points, kExactQueries);
  const ExactFilterTable& table =
      select_cpu_table<ExactFilterTable>(PYDENSE_CPU_TABLES(kExactFilterTable));
  parallel_tasks(parallel_for, images * row_tiles * query_tiles, [&](int64_t task) {
    const int64_t row_tile = task / query_tiles % row_tiles;
    const int64_t first_row = rows * row_tile / row_tiles;
    const int64_t first_query = task % query_tiles * kExactQueries;
    const ExactFilterTile tile = {task / query_tiles / row_tiles, first_row,
                                  rows * (row_tile + 1) / row_tiles - first_row, first_query,
                                  std::min(kExactQueries, args.points - first_query)};
    if constexpr (std::is_same_v<T, float>) {
      table.tile_f32(args, tile);
    } else {
      table.tile_f64(args, tile);
    }
  });
}

template void check_exact_filter(const ExactFilterArgs<float>&);
template void check_exact_filter(const ExactFilterArgs<double>&);
template void exact_filter(const ExactFilterArgs<float>&, ParallelFor);
template void exact_filter(const ExactFilterArgs<double>&, ParallelFor);

}  // namespace pydense
