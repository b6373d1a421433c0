// SPDX-License-Identifier: Apache-2.0
#include "segmentation_head/head_launch.cuh"
#include "segmentation_head/softmax_kernels.cuh"

namespace pydense {

template <class T>
void upsample_softmax_cuda(const UpsampleSoftmaxCudaArgs<T>& args, int device, void* stream) {
  check_head("upsample_softmax", args.logits, args.axes);
  const int64_t blocks = args.logits.images * head_blocks(args.axes);
  if (blocks == 0) {
    return;
  }
  with_stored<T>(args.logits.type, [&]<class S>(S) {
    PYDENSE_LAUNCH(upsample_softmax_kernel<S>, head_config(blocks, device, stream), args, blocks);
  });
}

template <class T>
void upsample_accumulate_cuda(const UpsampleAccumulateCudaArgs<T>& args, int device, void* stream) {
  check_head("upsample_accumulate", args.logits, args.axes);
  const int64_t blocks =
      args.logits.images * head_blocks(args.axes) * pieces(args.logits.classes, kAccumulateClasses);
  if (blocks == 0) {
    return;
  }
  with_stored<T>(args.logits.type, [&]<class S>(S) {
    PYDENSE_LAUNCH(upsample_accumulate_kernel<S>, head_config(blocks, device, stream), args,
                   blocks);
  });
}

template void upsample_softmax_cuda(const UpsampleSoftmaxCudaArgs<float>&, int, void*);
template void upsample_softmax_cuda(const UpsampleSoftmaxCudaArgs<double>&, int, void*);
template void upsample_accumulate_cuda(const UpsampleAccumulateCudaArgs<float>&, int, void*);
template void upsample_accumulate_cuda(const UpsampleAccumulateCudaArgs<double>&, int, void*);

}  // namespace pydense
