// SPDX-License-Identifier: Apache-2.0
// Two operators carry the dense CRF: one builds lattices, the other iterates on them. A lattice
// travels as a byte tensor. Arrays are (batch, channels, height, width); a picture's pixels are the
// points, row by row, point sets have height 1 and volumes stack their slices.
#include <cstring>

#include "dense_crf/pictures_torch.h"
#include "dense_crf/schemas_torch.h"

namespace pydense {
namespace {

Normalization parse_normalization(const std::string& name) {
  PYDENSE_CHECK(name == "none" || name == "before" || name == "after" || name == "symmetric",
                "dense_crf_lattice: normalization must be none, before, after or symmetric, got '",
                name, "'");
  return name == "none"     ? Normalization::kNone
         : name == "before" ? Normalization::kBefore
         : name == "after"  ? Normalization::kAfter
                            : Normalization::kSymmetric;
}

Tensor new_bytes(const Tensor& like, int64_t size) {
  return new_dense(like, {&size, 1}, ScalarType::Byte);
}

Tensor lattice_op(const Tensor& features, const std::string& normalization, bool self_term) {
  constexpr const char* kOp = "dense_crf_lattice";
  check_pictures(kOp, "features", features);
  PYDENSE_CHECK(features.size(1) >= 1 && features.size(1) <= kMaxLatticeDims, kOp,
                ": features must have 1 to ", kMaxLatticeDims, " channels, got ", features.size(1));
  const LatticeOptions options = {parse_normalization(normalization), self_term};
  const int64_t images = features.size(0);
  if (features.numel() == 0) {
    return new_bytes(features, 0);
  }
  return with_dtype(kOp, "features", features, [&]<class T>(T) {
    const Pictures pictures(features);
    const auto build = [&](int64_t i, const ByteSink& sink, ParallelFor parallel_for) {
      const LabelArray<const T> from = pictures.at<T>(i);
      build_lattice<T>({from.data, pictures.grid(), static_cast<int>(features.size(1)),
                        from.label_stride, from.point_stride},
                       options, sink, parallel_for);
    };
    Tensor bytes;
    if (images == 1) {
      struct Target {
        const Tensor& like;
        Tensor& bytes;
      } target = {features, bytes};
      build(0,
            {&target,
             [](void* context, size_t size) {
               auto* to = static_cast<Target*>(context);
               to->bytes = new_bytes(to->like, static_cast<int64_t>(size));
               return to->bytes.mutable_data_ptr();
             }},
            torch_parallel_for);
      return bytes;
    }
    std::vector<Buffer> lattices(static_cast<size_t>(images));
    for_each_image(images, pictures.grid(), [&](int64_t i, ParallelFor parallel_for) {
      build(i,
            {&lattices[static_cast<size_t>(i)],
             [](void* buffer, size_t size) {
               *static_cast<Buffer*>(buffer) = Buffer(size);
               return static_cast<Buffer*>(buffer)->data();
             }},
            parallel_for);
    });
    size_t total = 0;
    for (const Buffer& lattice : lattices) {
      total += lattice.bytes();
    }
    bytes = new_bytes(features, static_cast<int64_t>(total));
    auto* to = static_cast<char*>(bytes.mutable_data_ptr());
    for (Buffer& lattice : lattices) {
      std::memcpy(to, lattice.data(), lattice.bytes());
      to += lattice.bytes();
      lattice = Buffer();
    }
    return bytes;
  });
}

Tensor mean_field_op(const Tensor& unary, const std::vector<Tensor>& lattices,
                     const std::vector<Tensor>& compats, int64_t iterations, bool energies,
                     const std::optional<Tensor>& q, const std::string& output) {
  constexpr const char* kOp = "dense_crf_mean_field";
  check_labels(kOp, unary);
  PYDENSE_CHECK(output == "probabilities" || output == "logits" || output == "labels", kOp,
                ": output must be probabilities, logits or labels, got '", output, "'");
  PYDENSE_CHECK(iterations >= 0 && iterations <= INT32_MAX, kOp,
                ": iterations must be in [0, 2^31), got ", iterations);
  if (q.has_value()) {
    check_same_shape(kOp, *q, unary);
  }
  const MeanFieldOutput kind = output == "probabilities" ? MeanFieldOutput::kProbabilities
                               : output == "logits"      ? MeanFieldOutput::kLogits
                                                         : MeanFieldOutput::kLabels;
  return with_dtype(kOp, "unary", unary, [&]<class T>(T) {
    Tensor out = kind == MeanFieldOutput::kLabels
                     ? torch::stable::new_empty(
                           unary, {unary.size(0), unary.size(2), unary.size(3)}, ScalarType::Long)
                     : new_picture(unary, unary.size(2), unary.size(3), unary.scalar_type(),
                                   is_channels_last(unary));
    if (unary.numel() == 0) {
      return out;
    }
    const Terms<T> terms(kOp, unary, lattices, compats);
    const Pictures energy(unary);
    const Pictures start(q.has_value() ? *q : unary);
    const PointGrid grid = energy.grid();
    const Pictures result(kind == MeanFieldOutput::kLabels ? unary : out);
    void* to = out.mutable_data_ptr();
    for_each_image(unary.size(0), grid, [&](int64_t i, ParallelFor parallel_for) {
      MeanField<T> field(grid, static_cast<int>(unary.size(1)), parallel_for);
      field.set_unary(energy.at<T>(i), energies);
      terms.add_to(field, i);
      MeanFieldResult<T> target{kind, {}, nullptr};
      if (kind == MeanFieldOutput::kLabels) {
        target.labels = static_cast<int64_t*>(to) + i * grid.points();
      } else {
        target.q = {static_cast<T*>(to) + i * out.stride(0), out.stride(1), result.point_stride};
      }
      field.run(static_cast<int>(iterations),
                q.has_value() ? start.at<T>(i) : LabelArray<const T>{}, target);
    });
    return out;
  });
}

Tensor free_energy_op(const Tensor& unary, const std::vector<Tensor>& lattices,
                      const std::vector<Tensor>& compats, bool energies, const Tensor& q) {
  constexpr const char* kOp = "dense_crf_free_energy";
  check_labels(kOp, unary);
  check_same_shape(kOp, q, unary);
  return with_dtype(kOp, "unary", unary, [&]<class T>(T) {
    Tensor out = torch::stable::new_zeros(unary, {unary.size(0), 3}, ScalarType::Double);
    if (unary.numel() == 0) {
      return out;
    }
    const Terms<T> terms(kOp, unary, lattices, compats);
    const Pictures energy(unary);
    const Pictures marginals(q);
    auto* sums = static_cast<double*>(out.mutable_data_ptr());
    for_each_image(unary.size(0), energy.grid(), [&](int64_t i, ParallelFor parallel_for) {
      MeanField<T> field(energy.grid(), static_cast<int>(unary.size(1)), parallel_for);
      field.set_unary(energy.at<T>(i), energies);
      terms.add_to(field, i);
      const FreeEnergy sum = field.free_energy(marginals.at<T>(i));
      sums[i * 3] = sum.negative_entropy;
      sums[i * 3 + 1] = sum.unary;
      sums[i * 3 + 2] = sum.pairwise;
    });
    return out;
  });
}

Tensor filter_op(const Tensor& values, const Tensor& lattice, bool reverse) {
  constexpr const char* kOp = "permutohedral_filter";
  check_pictures(kOp, "values", values);
  require_dtype(kOp, "lattice", lattice, ScalarType::Byte);
  return with_dtype(kOp, "values", values, [&]<class T>(T) {
    Tensor out =
        new_dense(values, {values.sizes().data(), values.sizes().size()}, values.scalar_type());
    if (values.numel() == 0) {
      return out;
    }
    const Tensor bytes = as_contiguous(lattice);
    const int64_t images =
        count_lattices<T>(kOp, bytes.const_data_ptr(), static_cast<size_t>(bytes.numel()));
    PYDENSE_CHECK(images == 1 || images == values.size(0), kOp, ": lattice must hold 1 or ",
                  values.size(0), " images, got ", images);
    const Pictures from(values);
    const int64_t points = from.grid().points();
    T* to = out.mutable_data_ptr<T>();
    PYDENSE_CHECK(values.size(1) <= INT32_MAX, kOp, ": values have too many channels");
    for_each_image(values.size(0), from.grid(), [&](int64_t i, ParallelFor parallel_for) {
      const LatticeView<T> view = lattice_at<T>(bytes.const_data_ptr(), images == 1 ? 0 : i);
      PYDENSE_CHECK(view.num_points() == points, kOp, ": values must have ", view.num_points(),
                    " points as the lattice has, got ", points);
      const LabelArray<const T> image = from.at<T>(i);
      filter_lattice<T>(
          {&view, image.data, to + i * out.stride(0), static_cast<int>(values.size(1)),
           image.label_stride, image.point_stride, points, 1, reverse},
          parallel_for);
    });
    return out;
  });
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(pydense::kLatticeSchema);
  m.def(pydense::kMeanFieldSchema);
  m.def(
      "dense_crf_free_energy(Tensor unary, Tensor[] lattices, Tensor[] compats, bool energies, "
      "Tensor q) -> Tensor");
  m.def(pydense::kFilterSchema);
}
PYDENSE_TORCH_CPU(m) {
  m.impl("dense_crf_lattice", TORCH_BOX(&pydense::lattice_op));
  m.impl("dense_crf_mean_field", TORCH_BOX(&pydense::mean_field_op));
  m.impl("dense_crf_free_energy", TORCH_BOX(&pydense::free_energy_op));
  m.impl("permutohedral_filter", TORCH_BOX(&pydense::filter_op));
}
