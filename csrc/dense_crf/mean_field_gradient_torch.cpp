// SPDX-License-Identifier: Apache-2.0
// Mean field for training: the forward operator also returns Q_0 to Q_(T - 1), and backward walks
// back over them, or makes them again.
#include <tuple>

#include "dense_crf/feature_gradient.h"
#include "dense_crf/pictures_torch.h"
#include "dense_crf/schemas_torch.h"
#include "dense_crf/training_torch.h"

namespace pydense {
namespace {

// Rows (batch, steps, points, row values) for the marginals or gradients of several steps.
template <class T>
struct StepRows {
  Tensor tensor;
  int64_t image_values;

  StepRows(const Tensor& like, int64_t steps)
      : StepRows(like, steps, std::max(2, row_width(static_cast<int>(like.size(1))))) {}
  StepRows(const Tensor& like, int64_t steps, int64_t width)
      : tensor(make(like, steps, width)),
        image_values(steps * like.size(2) * like.size(3) * width) {}

  static Tensor make(const Tensor& like, int64_t steps, int64_t width) {
    const int64_t size[] = {like.size(0), steps, like.size(2) * like.size(3), width};
    return new_dense(like, size, like.scalar_type());
  }
  T* at(int64_t image) const {
    return image_values == 0 ? nullptr : tensor.mutable_data_ptr<T>() + image * image_values;
  }
};

std::tuple<Tensor, Tensor> mean_field_training_op(
    const Tensor& unary, const std::vector<Tensor>& lattices, const std::vector<Tensor>& compats,
    const std::vector<Tensor>& /*features*/, int64_t iterations, bool energies,
    const std::optional<Tensor>& q, const std::string& output,
    const std::string& /*feature_gradient*/, bool recompute) {
  constexpr const char* kOp = "dense_crf_mean_field_training";
  check_labels(kOp, unary);
  check_training(kOp, output, iterations, q.has_value());
  if (q.has_value()) {
    check_same_shape(kOp, *q, unary);
  }
  return with_dtype(kOp, "unary", unary, [&]<class T>(T) {
    Tensor out = new_picture(unary, unary.size(2), unary.size(3), unary.scalar_type(),
                             is_channels_last(unary));
    const StepRows<T> kept(unary, recompute ? 0 : iterations);
    if (unary.numel() == 0) {
      return std::tuple(out, kept.tensor);
    }
    const Terms<T> terms(kOp, unary, lattices, compats);
    const Pictures energy(unary);
    const Pictures start(q.has_value() ? *q : unary);
    const Pictures result(out);
    T* to = out.mutable_data_ptr<T>();
    const auto kind =
        output == "logits" ? MeanFieldOutput::kLogits : MeanFieldOutput::kProbabilities;
    for_each_image(unary.size(0), energy.grid(), [&](int64_t i, ParallelFor parallel_for) {
      MeanField<T> field(energy.grid(), static_cast<int>(unary.size(1)), parallel_for);
      field.set_unary(energy.at<T>(i), energies);
      terms.add_to(field, i);
      field.run(static_cast<int>(iterations),
                q.has_value() ? start.at<T>(i) : LabelArray<const T>{},
                {kind, {to + i * out.stride(0), out.stride(1), result.point_stride}, nullptr},
                kept.at(i));
    });
    return std::tuple(out, kept.tensor);
  });
}

template <class T>
LabelArray<T> writable(const Pictures& pictures, int64_t image) {
  Tensor tensor = pictures.tensor;
  return {tensor.mutable_data_ptr<T>() + image * tensor.stride(0), tensor.stride(1),
          pictures.point_stride};
}

// Returns dL/dunary; dL/dq (empty without q); with `keep`, dL/dlogits of every step and, where they
// were made again, the marginals (both empty else); then dL/dcompat of every term.
std::vector<Tensor> mean_field_backward_op(const Tensor& grad, const std::optional<Tensor>& unary,
                                           const std::optional<Tensor>& result, const Tensor& kept,
                                           const std::vector<Tensor>& lattices,
                                           const std::vector<Tensor>& compats, int64_t iterations,
                                           bool energies, const std::optional<Tensor>& q,
                                           bool from_q, bool channels_last, bool keep) {
  constexpr const char* kOp = "dense_crf_mean_field_backward";
  check_labels(kOp, grad);
  const bool recompute =
      check_recompute(kOp, kept, iterations, unary.has_value(), q.has_value(), from_q);
  for (const std::optional<Tensor>& other : {unary, result, q}) {
    if (other.has_value()) {
      check_same_shape(kOp, *other, grad);
    }
  }
  require_dtype(kOp, "kept", kept, grad.scalar_type());
  return with_dtype(kOp, "grad", grad, [&]<class T>(T) {
    const int64_t images = grad.size(0);
    const auto like = [&] {
      return new_picture(grad, grad.size(2), grad.size(3), grad.scalar_type(), channels_last);
    };
    const auto nothing = [&] {  // of its own each time: results do not share memory
      const int64_t no_size[] = {0};
      return new_dense(grad, no_size, grad.scalar_type());
    };
    const StepRows<T> steps(grad, keep ? iterations : 0);
    const StepRows<T> again(grad, recompute && keep ? iterations : 0);
    std::vector<Tensor> out = {like(), from_q ? like() : nothing(), keep ? steps.tensor : nothing(),
                               keep && recompute ? again.tensor : nothing()};
    // Of every image, to be added up in their order.
    std::vector<Tensor> parts;
    for (const Tensor& compat : compats) {
      std::vector<int64_t> size = {images};
      size.insert(size.end(), compat.sizes().begin(), compat.sizes().end());
      parts.push_back(new_dense(grad, size, grad.scalar_type()));
      out.push_back(torch::stable::new_zeros(compat, compat.sizes()));
    }
    if (grad.numel() == 0) {
      return out;
    }
    if (!recompute && iterations > 0) {
      check_kept(kOp, kept, grad, iterations, again.tensor.size(3));
    }
    const Terms<T> terms(kOp, grad, lattices, compats);
    const Pictures from(grad);
    const Pictures logits(unary.has_value() ? *unary : grad);
    const Pictures start(q.has_value() ? *q : grad);
    const Pictures end(result.has_value() ? *result : grad);
    const Pictures to(out[0]);
    const Pictures to_q(from_q ? out[1] : out[0]);
    const PointGrid grid = from.grid();
    const int64_t row_values = grid.points() * again.tensor.size(3);
    for_each_image(images, grid, [&](int64_t i, ParallelFor parallel_for) {
      MeanField<T> field(grid, static_cast<int>(grad.size(1)), parallel_for);
      field.set_unary(logits.at<T>(i), energies);
      terms.add_to(field, i);
      // Marginals that nobody asks for live as long as their image's turn.
      const Buffer own =
          buffer_of<T>(recompute && !keep ? static_cast<size_t>(iterations * row_values) : 0);
      T* const made = keep ? again.at(i) : static_cast<T*>(own.data());
      if (recompute) {
        field.keep_distributions(static_cast<int>(iterations),
                                 from_q ? start.at<T>(i) : LabelArray<const T>{}, made);
      }
      std::vector<T*> compat_parts;
      for (const Tensor& part : parts) {
        compat_parts.push_back(static_cast<T*>(part.mutable_data_ptr()) +
                               i * (part.numel() / images));
      }
      MeanFieldGradient<T> gradient{};
      gradient.iterations = static_cast<int>(iterations);
      gradient.grad = from.at<T>(i);
      if (result.has_value()) {
        gradient.result = end.at<T>(i);
      }
      gradient.kept =
          recompute ? made
                    : (iterations == 0 ? nullptr
                                       : kept.const_data_ptr<T>() + i * (kept.numel() / images));
      gradient.unary = writable<T>(to, i);
      if (from_q) {
        gradient.q = writable<T>(to_q, i);
      }
      gradient.steps = steps.at(i);
      gradient.compats = compat_parts.data();
      field.backward(gradient);
    });
    for (size_t k = 0; k < parts.size(); ++k) {
      const int64_t values = compats[k].numel();
      auto* sum = static_cast<T*>(out[4 + k].mutable_data_ptr());
      const auto* part = static_cast<const T*>(parts[k].const_data_ptr());
      for (int64_t v = 0; v < values; ++v) {
        double total = 0.0;
        for (int64_t i = 0; i < images; ++i) {
          total += static_cast<double>(part[i * values + v]);
        }
        sum[v] = static_cast<T>(total);
      }
    }
    return out;
  });
}

// dL/dfeatures of L = sum a^T K (b), with C^T a in the place of a where a compatibility is given.
Tensor feature_gradient_op(const Tensor& features, const Tensor& lattice, const Tensor& a,
                           const Tensor& b, const std::optional<Tensor>& compat,
                           const std::string& mode) {
  constexpr const char* kOp = "dense_crf_feature_gradient";
  check_pictures(kOp, "features", features);
  check_pictures(kOp, "a", a);
  check_feature_gradient(kOp, features, a, mode);
  check_same_shape(kOp, b, a);
  require_dtype(kOp, "lattice", lattice, ScalarType::Byte);
  const int64_t images = a.size(0);
  return with_dtype(kOp, "a", a, [&]<class T>(T) {
    Tensor out = torch::stable::new_zeros(features, features.sizes());
    if (a.numel() == 0) {
      return out;
    }
    const Tensor bytes = as_contiguous(lattice);
    PYDENSE_CHECK(count_lattices<T>(kOp, bytes.const_data_ptr(),
                                    static_cast<size_t>(bytes.numel())) == features.size(0),
                  kOp, ": lattice must have as many images as the features");
    const Tensor factors = compat.has_value() ? as_contiguous(*compat) : Tensor();
    if (compat.has_value()) {
      require_dtype(kOp, "compat", *compat, a.scalar_type());
      for (int64_t i = 0; i < compat->dim(); ++i) {
        PYDENSE_CHECK(compat->dim() <= 2 && compat->size(i) == a.size(1), kOp,
                      ": compat must have shape (), (", a.size(1), ",) or (", a.size(1), ", ",
                      a.size(1), ")");
      }
    }
    const Pictures from(features);
    const Pictures one(a);
    const Pictures other(b);
    const int64_t values = features.numel() / features.size(0);
    // Images that share their features are added up in their order.
    const bool shared = features.size(0) == 1 && images > 1;
    const Buffer parts = buffer_of<T>(shared ? static_cast<size_t>(images * values) : 0);
    auto* const to = static_cast<T*>(shared ? parts.data() : out.mutable_data_ptr());
    for_each_image(images, from.grid(), [&](int64_t i, ParallelFor parallel_for) {
      const int64_t own = features.size(0) == 1 ? 0 : i;
      const LatticeView<T> view = lattice_at<T>(bytes.const_data_ptr(), own);
      PYDENSE_CHECK(view.num_points() == from.grid().points() &&
                        view.grid.width == from.grid().width && view.dims == features.size(1),
                    kOp, ": lattice must have been built from the features");
      const LabelArray<const T> f = from.at<T>(own);
      feature_gradient<T>(
          {&view, f.data, f.label_stride, f.point_stride, one.at<T>(i), other.at<T>(i),
           static_cast<int>(a.size(1)),
           compat.has_value() ? static_cast<const T*>(factors.const_data_ptr()) : nullptr,
           static_cast<Compatibility>(compat.has_value() ? compat->dim() : 0), mode == "lattice",
           to + i * values},
          parallel_for);
    });
    if (shared) {
      auto* const sum = static_cast<T*>(out.mutable_data_ptr());
      for (int64_t i = 0; i < images; ++i) {
        for (int64_t v = 0; v < values; ++v) {
          sum[v] += to[i * values + v];
        }
      }
    }
    return out;
  });
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(pydense::kTrainingSchema);
  m.def(pydense::kBackwardSchema);
  m.def(pydense::kFeatureGradientSchema);
}
PYDENSE_TORCH_CPU(m) {
  m.impl("dense_crf_mean_field_training", TORCH_BOX(&pydense::mean_field_training_op));
  m.impl("dense_crf_mean_field_backward", TORCH_BOX(&pydense::mean_field_backward_op));
  m.impl("dense_crf_feature_gradient", TORCH_BOX(&pydense::feature_gradient_op));
}
