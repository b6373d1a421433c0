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

template <class T>
struct UpsampleSoftmaxCudaArgs {
  LogitsView logits;
  HeadAxes<T> axes;
  void* out;
  int64_t strides[4];
};
template <class T>
void upsample_softmax_cuda(const UpsampleSoftmaxCudaArgs<T>& args, int device, void* stream);

template <class T>
struct UpsampleSoftmaxBackwardCudaArgs {
  LogitsView logits;
  HeadAxes<T> axes;
  const void* full_gradient;
  int64_t strides[4];  // of full_gradient
  T* gradient;
  bool gradient_channels_last;
  T* parts;  // softmax_backward_parts() numbers
};
template <class T>
int64_t softmax_backward_parts(const LogitsView& logits, const HeadAxes<T>& axes);
template <class T>
void upsample_softmax_backward_cuda(const UpsampleSoftmaxBackwardCudaArgs<T>& args, int device,
                                    void* stream);

template <class T>
struct UpsampleAccumulateCudaArgs {
  LogitsView logits;
  HeadAxes<T> axes;
  T* out;
  int64_t strides[4];
  const T* weight;
  int64_t weight_strides[2];
};
template <class T>
void upsample_accumulate_cuda(const UpsampleAccumulateCudaArgs<T>& args, int device, void* stream);

}  // namespace pydense
