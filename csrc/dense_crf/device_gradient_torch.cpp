// SPDX-License-Identifier: Apache-2.0
// Mean field for training on a GPU, and its gradient: the operators of
// mean_field_gradient_torch.cpp.
#include <tuple>

#include "dense_crf/device_gradient.h"
#include "dense_crf/device_pictures_torch.h"
#include "dense_crf/schemas_torch.h"
#include "dense_crf/training_torch.h"

#ifdef PYDENSE_WITH_CUDA

namespace pydense {
namespace {

Tensor new_steps(const Tensor& like, int64_t steps) {
  const int64_t size[] = {like.size(0), steps, like.size(2) * like.size(3),
                          step_width(like.size(1))};
  return new_dense(like, size, like.scalar_type());
}

template <class T>
DeviceSteps<T> steps_of(Tensor& rows) {
  if (rows.numel() == 0) {
    return {nullptr, 0, 0};
  }
  return {rows.mutable_data_ptr<T>(), rows.size(1), rows.size(3)};
}

// What inference needs; the result is not stored.
template <class T>
DeviceMeanFieldArgs<T> field_of(const DeviceTerms<T>& terms, const DevicePicture& unary,
                                bool energies, const DevicePicture* q, int64_t iterations) {
  const Tensor& like = unary.tensor;
  DeviceMeanFieldArgs<T> args{};
  args.batch = like.size(0);
  args.labels = like.size(1);
  args.points = like.size(2) * like.size(3);
  args.terms = terms.terms.data();
  args.num_terms = static_cast<int>(terms.terms.size());
  args.unary = unary.source<T>();
  args.energies = energies;
  if (q != nullptr) {
    args.q = q->source<T>();
  }
  args.iterations = static_cast<int>(iterations);
  args.kind = MeanFieldOutput::kProbabilities;
  return args;
}

template <class T>
void run_field(const DeviceMeanFieldArgs<T>& args, const Tensor& like) {
  const int32_t device = like.get_device_index();
  const Tensor workspace = device_bytes(like, mean_field_workspace(args));
  mean_field_cuda<T>(args, workspace.mutable_data_ptr(), device, current_cuda_stream(device));
}

std::tuple<Tensor, Tensor> mean_field_training_op(
    const Tensor& unary, const std::vector<Tensor>& lattices, const std::vector<Tensor>& compats,
    const std::vector<Tensor>& /*features*/, int64_t iterations, bool energies,
    const std::optional<Tensor>& q, const std::string& output,
    const std::string& /*feature_gradient*/, bool recompute) {
  constexpr const char* kOp = "dense_crf_mean_field_training";
  check_device_labels(kOp, "unary", unary);
  check_training(kOp, output, iterations, q.has_value());
  if (q.has_value()) {
    check_same_device_shape(kOp, "q", *q, unary);
  }
  Tensor out = new_picture(unary, unary.size(2), unary.size(3), unary.scalar_type(),
                           is_channels_last(unary));
  Tensor kept = new_steps(unary, recompute ? 0 : iterations);
  if (unary.numel() == 0) {
    return {out, kept};
  }
  return with_device_type(unary, [&]<class T>(T) {
    const DeviceTerms<T> terms(kOp, unary, lattices, compats);
    const DevicePicture energy(unary);
    const DevicePicture start(q.has_value() ? *q : unary);
    DeviceMeanFieldArgs<T> args =
        field_of<T>(terms, energy, energies, q.has_value() ? &start : nullptr, iterations);
    args.kind = output == "logits" ? MeanFieldOutput::kLogits : MeanFieldOutput::kProbabilities;
    args.out = device_target<T>(out);
    args.kept = steps_of<T>(kept);
    run_field(args, unary);
    return std::tuple(out, kept);
  });
}

// See the operator of the CPU.
std::vector<Tensor> mean_field_backward_op(const Tensor& grad, const std::optional<Tensor>& unary,
                                           const std::optional<Tensor>& result, const Tensor& kept,
                                           const std::vector<Tensor>& lattices,
                                           const std::vector<Tensor>& compats, int64_t iterations,
                                           bool energies, const std::optional<Tensor>& q,
                                           bool from_q, bool channels_last, bool keep) {
  constexpr const char* kOp = "dense_crf_mean_field_backward";
  check_device_labels(kOp, "grad", grad);
  const bool recompute =
      check_recompute(kOp, kept, iterations, unary.has_value(), q.has_value(), from_q);
  for (const std::optional<Tensor>& other : {unary, result, q}) {
    if (other.has_value()) {
      check_same_device_shape(kOp, "unary, result and q", *other, grad);
    }
  }
  require_dtype(kOp, "kept", kept, grad.scalar_type());
  require_same_device(kOp, "kept", kept, grad);
  const auto like = [&] {
    return new_picture(grad, grad.size(2), grad.size(3), grad.scalar_type(), channels_last);
  };
  const auto nothing = [&] {  // of its own each time: results do not share memory
    const int64_t no_size[] = {0};
    return new_dense(grad, no_size, grad.scalar_type());
  };
  Tensor steps = new_steps(grad, keep ? iterations : 0);
  Tensor again = new_steps(grad, recompute ? iterations : 0);
  std::vector<Tensor> out = {like(), from_q ? like() : nothing(), keep ? steps : nothing(),
                             keep && recompute ? again : nothing()};
  for (const Tensor& compat : compats) {
    out.push_back(torch::stable::new_zeros(compat, compat.sizes()));
  }
  if (grad.numel() == 0) {
    return out;
  }
  if (!recompute && iterations > 0) {
    check_kept(kOp, kept, grad, iterations, again.size(3));
  }
  with_device_type(grad, [&]<class T>(T) {
    const DeviceTerms<T> terms(kOp, grad, lattices, compats);
    if (recompute) {
      const DevicePicture energy(*unary);
      const DevicePicture start(q.has_value() ? *q : *unary);
      DeviceMeanFieldArgs<T> field =
          field_of<T>(terms, energy, energies, from_q ? &start : nullptr, iterations - 1);
      field.kept = steps_of<T>(again);
      run_field(field, grad);
    }
    const DevicePicture from(grad);
    const DevicePicture end(result.has_value() ? *result : grad);
    Tensor marginals = recompute ? again : kept;
    DeviceGradientArgs<T> args{};
    args.batch = grad.size(0);
    args.labels = grad.size(1);
    args.points = grad.size(2) * grad.size(3);
    args.terms = terms.terms.data();
    args.num_terms = static_cast<int>(terms.terms.size());
    args.iterations = static_cast<int>(iterations);
    args.energies = energies;
    args.grad = from.source<T>();
    if (result.has_value()) {
      args.result = end.source<T>();
    }
    args.kept = steps_of<T>(marginals);
    args.steps = steps_of<T>(steps);
    args.unary = device_target<T>(out[0]);
    if (from_q) {
      args.q = device_target<T>(out[1]);
    }
    std::vector<T*> by_compat;
    for (size_t k = 0; k < compats.size(); ++k) {
      by_compat.push_back(static_cast<T*>(out[4 + k].mutable_data_ptr()));
    }
    args.compats = by_compat.data();
    const int32_t device = grad.get_device_index();
    const Tensor workspace = device_bytes(grad, mean_field_gradient_workspace(args));
    mean_field_gradient_cuda<T>(args, workspace.mutable_data_ptr(), device,
                                current_cuda_stream(device));
  });
  return out;
}

Tensor feature_gradient_op(const Tensor& features, const Tensor& lattice, const Tensor& a,
                           const Tensor& b, const std::optional<Tensor>& compat,
                           const std::string& mode) {
  constexpr const char* kOp = "dense_crf_feature_gradient";
  check_device_picture(kOp, "features", features);
  check_device_labels(kOp, "a", a);
  check_feature_gradient(kOp, features, a, mode);
  check_same_device_shape(kOp, "b", b, a);
  Tensor out = torch::stable::new_zeros(features, features.sizes());
  if (a.numel() == 0) {
    return out;
  }
  return with_device_type(a, [&]<class T>(T) {
    DeviceFeatureGradientArgs<T> args{};
    args.lattice = lattice_of<T>(kOp, lattice, a);
    PYDENSE_CHECK(args.lattice.shape.images == features.size(0) &&
                      args.lattice.shape.dims == features.size(1),
                  kOp, ": lattice must have been built from the features");
    Tensor factors;
    if (compat.has_value()) {
      check_device_compat(kOp, "compat", *compat, a);
      factors = as_contiguous(*compat);
      args.compat = factors.const_data_ptr<T>();
      args.kind = static_cast<Compatibility>(compat->dim());
    }
    const DevicePicture from(features);
    const DevicePicture one(a);
    const DevicePicture other(b);
    args.batch = a.size(0);
    args.channels = a.size(1);
    args.features = from.source<T>();
    args.a = one.source<T>();
    args.b = other.source<T>();
    args.of_lattice = mode == "lattice";
    args.out = out.mutable_data_ptr<T>();
    const int32_t device = a.get_device_index();
    const Tensor workspace = device_bytes(a, feature_gradient_workspace(args));
    feature_gradient_cuda<T>(args, workspace.mutable_data_ptr(), device,
                             current_cuda_stream(device));
    return out;
  });
}

}  // namespace
}  // namespace pydense

#ifdef PYDENSE_SIMT
PYDENSE_TORCH_SCHEMAS(m) {
  m.def(pydense::kTrainingSchema);
  m.def(pydense::kBackwardSchema);
  m.def(pydense::kFeatureGradientSchema);
}
#endif
PYDENSE_TORCH_CUDA(m) {
  m.impl("dense_crf_mean_field_training", TORCH_BOX(&pydense::mean_field_training_op));
  m.impl("dense_crf_mean_field_backward", TORCH_BOX(&pydense::mean_field_backward_op));
  m.impl("dense_crf_feature_gradient", TORCH_BOX(&pydense::feature_gradient_op));
}

#endif
