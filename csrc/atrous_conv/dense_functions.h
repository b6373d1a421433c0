// SPDX-License-Identifier: Apache-2.0
// What the door of dense convolutions calls, for one type.
#pragma once

#include "atrous_conv/dense_kernel.h"

namespace pydense::PYDENSE_ISA {

template <class S>
void run_dense_conv(const DenseConvArgs& args, const DenseConvPlan& plan,
                    ParallelFor parallel_for) {
  DenseConv<S>(args, plan).run(parallel_for);
}

template <class S>
int64_t dense_conv_bytes(const DenseConvShape& shape) {
  return WeightPanels<S>(shape).bytes();
}

template <class S>
void pack_dense_conv(const DenseConvShape& shape, const DenseConvWeight& weight, void* packed,
                     ParallelFor parallel_for) {
  WeightPanels<S>(shape).pack(weight, static_cast<GemmOperandOf<S>*>(packed), parallel_for);
}

template <class S>
int64_t dense_conv_row_bytes(const DenseConvShape& shape, const DenseConvPicture& x) {
  return PictureRows<S>(shape, x, nullptr).bytes();
}

template <class S>
void lay_out_dense_conv_rows(const DenseConvShape& shape, const DenseConvPicture& x, void* rows,
                             ParallelFor parallel_for) {
  PictureRows<S>(shape, x, nullptr).lay_out(static_cast<GemmOperandOf<S>*>(rows), parallel_for);
}

template <class S>
constexpr DenseConvFunctions kDenseConvFunctions = {run_dense_conv<S>, dense_conv_bytes<S>,
                                                    pack_dense_conv<S>, dense_conv_row_bytes<S>,
                                                    lay_out_dense_conv_rows<S>};

}  // namespace pydense::PYDENSE_ISA
