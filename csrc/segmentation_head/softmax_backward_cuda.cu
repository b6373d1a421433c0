// SPDX-License-Identifier: Apache-2.0
#include "segmentation_head/head_launch.cuh"
#include "segmentation_head/softmax_backward_kernels.cuh"

namespace pydense {

template <class T>
int64_t softmax_backward_parts(const LogitsView& logits, const HeadAxes<T>& axes) {
  return backward_blocks(logits, axes) * parts_of_block(logits, axes);
}

template <class T>
void upsample_softmax_backward_cuda(const UpsampleSoftmaxBackwardCudaArgs<T>& args, int device,
                                    void* stream) {
  const LogitsView& logits = args.logits;
  check_head("upsample_softmax_backward", logits, args.axes);
  const int64_t blocks = backward_blocks(logits, args.axes);
  if (blocks == 0) {
    return;
  }
  with_stored<T>(logits.type, [&]<class S>(S) {
    PYDENSE_LAUNCH(upsample_softmax_backward_kernel<S>, head_config(blocks, device, stream), args,
                   blocks);
  });
  const int64_t numbers = logits.images * logits.classes * logits.height * logits.width;
  PYDENSE_LAUNCH(softmax_backward_sum_kernel<T>,
                 head_config(pieces(numbers, kHeadColumns), device, stream), args, numbers);
}

template int64_t softmax_backward_parts(const LogitsView&, const HeadAxes<float>&);
template int64_t softmax_backward_parts(const LogitsView&, const HeadAxes<double>&);
template void upsample_softmax_backward_cuda(const UpsampleSoftmaxBackwardCudaArgs<float>&, int,
                                             void*);
template void upsample_softmax_backward_cuda(const UpsampleSoftmaxBackwardCudaArgs<double>&, int,
                                             void*);

}  // namespace pydense
