// SPDX-License-Identifier: Apache-2.0
#include "segmentation_head/argmax_kernels.cuh"
#include "segmentation_head/head_launch.cuh"

namespace pydense {

template <class T>
void upsample_argmax_cuda(const UpsampleArgmaxCudaArgs<T>& args, int device, void* stream) {
  constexpr const char* kOp = "upsample_argmax";
  check_head(kOp, args.logits, args.axes);
  PYDENSE_CHECK(args.label_type == IntegerType::kUInt8 || args.label_type == IntegerType::kInt32 ||
                    args.label_type == IntegerType::kInt64,
                kOp, ": labels must be uint8, int32 or int64");
  PYDENSE_CHECK(args.label_type != IntegerType::kUInt8 || args.logits.classes <= 256, kOp,
                ": dtype must hold ", args.logits.classes, " classes, got uint8");
  const int64_t blocks = args.logits.images * head_blocks(args.axes);
  if (blocks == 0) {
    return;
  }
  with_stored<T>(args.logits.type, [&]<class S>(S) {
    PYDENSE_LAUNCH(upsample_argmax_kernel<S>, head_config(blocks, device, stream), args, blocks);
  });
}

template void upsample_argmax_cuda(const UpsampleArgmaxCudaArgs<float>&, int, void*);
template void upsample_argmax_cuda(const UpsampleArgmaxCudaArgs<double>&, int, void*);

}  // namespace pydense
