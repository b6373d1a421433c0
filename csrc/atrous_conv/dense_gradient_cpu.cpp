// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/dense_gradient_kernel.h"

namespace pydense::PYDENSE_ISA {
namespace {

template <class S>
void run(const DenseConvGradientArgs& args, ParallelFor parallel_for) {
  DenseWeightGradient<S>(args).run(parallel_for);
}

}  // namespace

extern const DenseConvGradientTable kDenseConvGradientTable;
const DenseConvGradientTable kDenseConvGradientTable = {
    {run<float>, run<double>, run<BFloat16>, run<Half>}};

}  // namespace pydense::PYDENSE_ISA
