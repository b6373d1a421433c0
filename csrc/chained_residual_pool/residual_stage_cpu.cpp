// SPDX-License-Identifier: Apache-2.0
#include "chained_residual_pool/residual_stage_kernel.h"

namespace pydense::PYDENSE_ISA {
namespace {

template <class S>
void stage(const ResidualStageArgs& args, ParallelFor parallel_for) {
  Stage<S>(args).run(parallel_for);
}

template <class S>
void sum(const ResidualSumArgs& args, ParallelFor parallel_for) {
  const PoolShape& shape = args.shape;
  const int64_t planes = shape.batches * (shape.channels_last ? 1 : shape.channels);
  const int64_t row = shape.width * (shape.channels_last ? shape.channels : 1);
  constexpr int64_t kTaskElements = 65536;
  const int64_t rows = ceil_div(kTaskElements, row);
  parallel_tasks(parallel_for, ceil_div(planes * shape.height, rows), [&](int64_t task) {
    const S* addends[kMaxResidualStages + 1];
    for (int64_t r = task * rows; r < smaller((task + 1) * rows, planes * shape.height); ++r) {
      const int64_t plane = r / shape.height;
      for (int k = 0; k < args.num_addends; ++k) {
        const PoolSource& from = args.addends[k];
        addends[k] = static_cast<const S*>(from.data) + r % shape.height * from.row +
                     (shape.channels_last ? plane * from.batch
                                          : plane / shape.channels * from.batch +
                                                plane % shape.channels * from.channel);
      }
      finish<S, ComputeOf<S>>(nullptr, nullptr, 0, addends, args.num_addends, 0, row,
                              static_cast<S*>(args.out) + r * row);
    }
  });
}

}  // namespace

extern const ResidualStageTable kResidualStageTable;
const ResidualStageTable kResidualStageTable = {
    {stage<float>, stage<double>, stage<BFloat16>, stage<Half>},
    {sum<float>, sum<double>, sum<BFloat16>, sum<Half>}};

}  // namespace pydense::PYDENSE_ISA
