// SPDX-License-Identifier: Apache-2.0
// The fast mode of the exact filter: one operator orders the points of some features, the other
// filters with that order. The CPU has no such mode: there an order is empty, and the filter is the
// accurate one.
#include <cmath>

#include "dense_crf/exact_fast.h"
#include "dense_crf/exact_filter_torch.h"
#include "torch/memory.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

void check_floats(const char* op, const char* name, const Tensor& x) {
  check_points(op, name, x);
  require_dtype(op, name, x, ScalarType::Float);
}

void check_dims(const char* op, const Tensor& features) {
  PYDENSE_CHECK(features.size(1) >= 1 && features.size(1) <= kMaxFastDims, op,
                ": features must have 1 to ", kMaxFastDims, " dimensions, got ", features.size(1));
}

Tensor device_bytes(const Tensor& like, size_t size) {
  const auto count = static_cast<int64_t>(size);
  return new_dense(like, {&count, 1}, ScalarType::Byte);
}

Tensor order_op(const Tensor& features) {
  constexpr const char* kOp = "exact_gaussian_order";
  check_floats(kOp, "features", features);
  check_dims(kOp, features);
  Tensor words;
  run_where(
      features,
      [&](auto device, void* stream) {
        PointOrderArgs args{
            features.const_data_ptr<float>(),
            {},
            features.size(1),
            point_order(features.size(0), features.size(2), features.size(1), nullptr)};
        // Before all that is sized, in part with 32 bits, by the number of points.
        PYDENSE_CHECK(
            args.order.padded <= kMaxOrdered &&
                (args.order.padded == 0 || args.order.images <= kMaxOrdered / args.order.padded),
            kOp, ": features must have fewer than 2^31 points, each image's rounded up to ",
            kOrderTile, ", got ", features.size(0), " x ", features.size(2));
        const int64_t size[3] = {features.size(0), args.order.tiles,
                                 point_order_words(features.size(1))};
        words = new_dense(features, size, ScalarType::Int);
        if (words.numel() == 0) {
          return;
        }
        args.order = point_order(features.size(0), features.size(2), features.size(1),
                                 words.mutable_data_ptr<int32_t>());
        for (int64_t axis = 0; axis < 3; ++axis) {
          args.strides[axis] = features.stride(axis);
        }
        const Tensor workspace = device_bytes(features, point_order_workspace(args));
        point_order_cuda(args, workspace.mutable_data_ptr(), device, stream);
      },
      [&] {
        const int64_t none[3] = {0, 0, 0};
        words = new_dense(features, none, ScalarType::Int);
      });
  return words;
}

#ifdef PYDENSE_WITH_CUDA
void run_fast(const char* op, const Tensor& values, const Tensor& features, const Tensor& order,
              bool self_term, double skip_tolerance, Tensor& out, int device, void* stream) {
  const int64_t dims = features.size(1);
  require_dtype(op, "order", order, ScalarType::Int);
  require_same_device(op, "order", order, values);
  ExactFastArgs args{point_order(features.size(0), features.size(2), dims, nullptr),
                     values.const_data_ptr<float>(),
                     {},
                     out.mutable_data_ptr<float>(),
                     values.size(0),
                     values.size(1),
                     self_term,
                     static_cast<float>(skip_tolerance)};
  PYDENSE_CHECK(order.dim() == 3 && order.is_contiguous() && order.size(0) == features.size(0) &&
                    order.size(1) == args.order.tiles && order.size(2) == point_order_words(dims) &&
                    reinterpret_cast<uintptr_t>(order.const_data_ptr()) % 16 == 0,
                op, ": order must be what exact_gaussian_order makes of the features");
  args.order = point_order(features.size(0), features.size(2), dims,
                           const_cast<void*>(order.const_data_ptr()));
  for (int64_t axis = 0; axis < 3; ++axis) {
    args.value_strides[axis] = values.stride(axis);
  }
  const Tensor workspace = device_bytes(values, exact_fast_workspace(args));
  exact_fast_cuda(args, workspace.mutable_data_ptr(), device, stream);
}
#endif

Tensor filter_op(const Tensor& values, const Tensor& features, const Tensor& order, bool self_term,
                 double skip_tolerance) {
  constexpr const char* kOp = "exact_gaussian_filter_fast";
  check_floats(kOp, "values", values);
  check_floats(kOp, "features", features);
  check_dims(kOp, features);
  check_points_fit(kOp, values, features);
  PYDENSE_CHECK(features.size(0) == values.size(0) || features.size(0) == 1, kOp,
                ": features must have 1 or ", values.size(0), " images, got ", features.size(0));
  PYDENSE_CHECK(skip_tolerance >= 0 && skip_tolerance < 1, kOp,
                ": skip_tolerance must be in [0, 1), got ", skip_tolerance);
  Tensor out = torch::stable::new_empty(values, values.sizes());
  if (out.numel() == 0) {
    return out;
  }
#ifdef PYDENSE_WITH_CUDA
  if (on_gpu(values)) {
    const int32_t device = values.get_device_index();
    run_fast(kOp, values, features, order, self_term, skip_tolerance, out, device,
             current_cuda_stream(device));
    return out;
  }
#else
  static_cast<void>(order);
#endif
  exact_filter(exact_filter_args<float>(values, features, self_term, out), torch_parallel_for);
  return out;
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("exact_gaussian_order(Tensor features) -> Tensor");
  m.def(
      "exact_gaussian_filter_fast(Tensor values, Tensor features, Tensor order, bool self_term, "
      "float skip_tolerance) -> Tensor");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("exact_gaussian_order", TORCH_BOX(&pydense::order_op));
  m.impl("exact_gaussian_filter_fast", TORCH_BOX(&pydense::filter_op));
}
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) {
  m.impl("exact_gaussian_order", TORCH_BOX(&pydense::order_op));
  m.impl("exact_gaussian_filter_fast", TORCH_BOX(&pydense::filter_op));
}
#endif
