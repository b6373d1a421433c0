// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/separable_kernel.h"

namespace pydense::PYDENSE_ISA {
namespace {

template <class S>
void run(const SeparableArgs& args, const DepthwisePlan& plan, ParallelFor parallel_for) {
  Separable<S>(args, plan).run(parallel_for);
}

}  // namespace

extern const SeparableTable kSeparableTable;
const SeparableTable kSeparableTable = {{run<float>, run<double>, run<BFloat16>, run<Half>}};

}  // namespace pydense::PYDENSE_ISA
