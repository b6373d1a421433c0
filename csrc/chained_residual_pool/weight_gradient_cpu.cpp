// SPDX-License-Identifier: Apache-2.0
#include "chained_residual_pool/weight_gradient_kernel.h"

namespace pydense::PYDENSE_ISA {
namespace {

template <class S>
void run(const WeightGradientArgs& args, ParallelFor parallel_for) {
  WeightGradient<S>(args).run(parallel_for);
}

}  // namespace

extern const WeightGradientTable kWeightGradientTable;
const WeightGradientTable kWeightGradientTable = {
    {run<float>, run<double>, run<BFloat16>, run<Half>}};

}  // namespace pydense::PYDENSE_ISA
