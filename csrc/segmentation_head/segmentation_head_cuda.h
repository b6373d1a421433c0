// SPDX-License-Identifier: Apache-2.0
// The CUDA launchers of this room. What an array holds and means is as for the functions of the
// same names in segmentation_head.h; axes come by value, and nothing is allocated here.
#pragma once

#include "segmentation_head/segmentation_head.h"

namespace pydense {

template <class T>
struct UpsampleArgmaxCudaArgs {
  LogitsView logits;
  HeadAxes<T> axes;
  void* labels;
  IntegerType label_type;
  T* confidence;
};
template <class T>
void upsample_argmax_cuda(const UpsampleArgmaxCudaArgs<T>& args, int device, void* stream);

}  // namespace pydense
