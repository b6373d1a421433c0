// SPDX-License-Identifier: Apache-2.0
// Small helpers that the CPU kernels of both directions share.
#pragma once

#include "common/half.h"
#include "common/partial.h"
#include "common/simd_lanes.h"
#include "common/with_constant.h"
#include "upsample/upsample.h"

namespace pydense::PYDENSE_ISA {

template <class S>
void upsample_forward_cpu(const UpsampleArgs& args, ParallelFor parallel_for);
template <class S>
void upsample_backward_cpu(const UpsampleBackwardArgs& args, ParallelFor parallel_for);

}  // namespace pydense::PYDENSE_ISA
