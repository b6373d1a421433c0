// SPDX-License-Identifier: Apache-2.0
#include <optional>
#include <string>
#include <utility>

#include "segmentation_head/arguments_torch.h"
#include "segmentation_head/cross_entropy_cuda.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

enum class Reduction { kNone, kSum, kMean, kMeanAll };

Reduction parse_reduction(const std::string& name) {
  PYDENSE_CHECK(name == "none" || name == "sum" || name == "mean" || name == "mean_all",
                "upsample_cross_entropy: reduction must be none, sum, mean or mean_all, got '",
                name, "'");
  return name == "none"   ? Reduction::kNone
         : name == "sum"  ? Reduction::kSum
         : name == "mean" ? Reduction::kMean
                          : Reduction::kMeanAll;
}

// loss: (N, H, W) or (); gradient of the sum over the pixels, empty where it is not asked for; what
// the sum is multiplied with, in double, 0 where that would be 1 / 0; counts: (correct, valid).
std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_op(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& pixel_weight, bool align_corners, int64_t ignore_index,
    double label_smoothing, const std::string& reduction_name, bool gradient, bool count_correct) {
  constexpr const char* kOp = "upsample_cross_entropy";
  const LogitsView view = view_logits(kOp, logits);
  const Reduction reduction = parse_reduction(reduction_name);
  PYDENSE_CHECK(target.dim() == 3 && target.size(0) == view.images, kOp,
                ": target must have 3 dimensions and ", view.images, " images, got ", target.dim(),
                " dimensions and ", target.dim() > 0 ? target.size(0) : 0, " images");
  require_device_of(kOp, "target", target, logits);
  for (const auto& [name, tensor] :
       {std::pair{"weight", &weight}, std::pair{"pixel_weight", &pixel_weight}}) {
    if (tensor->has_value()) {
      require_device_of(kOp, name, **tensor, logits);
    }
  }
  const int64_t height = target.size(1);
  const int64_t width = target.size(2);
  check_size(kOp, "target", view, height, width);
  const IntegerType target_type = integer_type(kOp, target);
  return with_arithmetic(view, [&]<class T>(T) {
    Tensor classes;
    if (weight.has_value()) {
      require_dtype(kOp, "weight", *weight, dtype_of<T>());
      check_shape(kOp, "weight", *weight, {view.classes});
      classes = as_contiguous(*weight);
    }
    if (pixel_weight.has_value()) {
      require_dtype(kOp, "pixel_weight", *pixel_weight, dtype_of<T>());
      check_shape(kOp, "pixel_weight", *pixel_weight, {view.images, height, width});
    }
    const bool per_pixel = reduction == Reduction::kNone;
    Tensor loss = per_pixel ? new_array(logits, {view.images, height, width}, dtype_of<T>())
                            : torch::stable::new_empty(logits, {}, dtype_of<T>());
    Tensor falls = gradient ? new_in_format_of(logits, view.height, view.width, dtype_of<T>())
                            : torch::stable::new_empty(logits, {0}, dtype_of<T>());
    Tensor scale = torch::stable::new_empty(logits, {}, ScalarType::Double);
    Tensor counts = torch::stable::new_empty(logits, {2}, ScalarType::Long);
    CrossEntropyTerms<T> terms{};
    terms.logits = view;
    terms.target = target.const_data_ptr();
    terms.target_type = target_type;
    copy_strides(target, terms.target_strides);
    terms.ignore_index = ignore_index;
    if (weight.has_value()) {
      terms.weight = classes.const_data_ptr<T>();
    }
    if (pixel_weight.has_value()) {
      terms.pixel_weight = pixel_weight->const_data_ptr<T>();
      copy_strides(*pixel_weight, terms.pixel_weight_strides);
    }
    terms.smoothing = label_smoothing;
    terms.loss = per_pixel ? loss.mutable_data_ptr<T>() : nullptr;
    terms.gradient = gradient ? falls.mutable_data_ptr<T>() : nullptr;
    terms.gradient_channels_last = is_channels_last(logits);
    terms.count_correct = count_correct;
#ifdef PYDENSE_WITH_CUDA
    if (on_gpu(logits)) {
      CrossEntropyCudaArgs<T> args{};
      static_cast<CrossEntropyTerms<T>&>(args) = terms;
      args.axes = head_axes<T>(view, height, width, align_corners);
      args.divisor = reduction == Reduction::kMean      ? CrossEntropyDivisor::kWeight
                     : reduction == Reduction::kMeanAll ? CrossEntropyDivisor::kPixels
                                                        : CrossEntropyDivisor::kOne;
      args.total = per_pixel ? nullptr : loss.mutable_data_ptr<T>();
      args.scale = scale.mutable_data_ptr<double>();
      args.counts = counts.mutable_data_ptr<int64_t>();
      const CrossEntropyPlan plan = plan_cross_entropy(view, args.axes, gradient);
      constexpr int64_t kDoubles = sizeof(CrossEntropyPartial) / sizeof(double);
      Tensor partials = new_array(logits, {plan.blocks * kDoubles}, ScalarType::Double);
      Tensor halo = new_array(logits, {plan.halo_rows + plan.halo_columns}, dtype_of<T>());
      args.partials = reinterpret_cast<CrossEntropyPartial*>(partials.mutable_data_ptr<double>());
      args.halo = halo.mutable_data_ptr<T>();
      const int32_t device = logits.get_device_index();
      upsample_cross_entropy_cuda(args, plan, device, current_cuda_stream(device));
      return std::make_tuple(loss, falls, scale, counts);
    }
#endif
    const Axes<T> axes(view, height, width, align_corners);
    const UpsampleCrossEntropyArgs<T> args{terms, &axes.y, &axes.x};
    const CrossEntropySums sums = upsample_cross_entropy(args, torch_parallel_for);
    const double by = reduction == Reduction::kMean ? sums.weight
                      : reduction == Reduction::kMeanAll
                          ? static_cast<double>(view.images * height * width)
                          : 1.0;
    *scale.mutable_data_ptr<double>() = by == 0 ? 0.0 : 1 / by;
    if (!per_pixel) {
      *loss.mutable_data_ptr<T>() = static_cast<T>(sums.loss / by);
    }
    counts.mutable_data_ptr<int64_t>()[0] = sums.correct;
    counts.mutable_data_ptr<int64_t>()[1] = sums.valid;
    return std::make_tuple(loss, falls, scale, counts);
  });
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? pixel_weight, "
      "bool align_corners, int ignore_index, float label_smoothing, str reduction, bool gradient, "
      "bool count_correct) -> (Tensor, Tensor, Tensor, Tensor)");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&pydense::upsample_cross_entropy_op));
}
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&pydense::upsample_cross_entropy_op));
}
#endif
