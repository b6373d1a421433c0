// SPDX-License-Identifier: Apache-2.0
// The operators of the dense CRF on a GPU. A lattice is a byte tensor there too, of another form
// (device_lattice.h): one for the whole batch, and nothing of it is read by the host.
#include "dense_crf/device_pictures_torch.h"
#include "dense_crf/schemas_torch.h"

#ifdef PYDENSE_WITH_CUDA

namespace pydense {
namespace {

Tensor lattice_op(const Tensor& features, const std::string& normalization, bool self_term) {
  constexpr const char* kOp = "dense_crf_lattice";
  check_device_picture(kOp, "features", features);
  PYDENSE_CHECK(features.size(1) >= 1 && features.size(1) <= kMaxLatticeDims, kOp,
                ": features must have 1 to ", kMaxLatticeDims, " channels, got ", features.size(1));
  const bool symmetric = normalization == "symmetric";
  const bool before = symmetric || normalization == "before";
  const bool after = symmetric || normalization == "after";
  PYDENSE_CHECK(before || after || normalization == "none", kOp,
                ": normalization must be none, before, after or symmetric, got '", normalization,
                "'");
  if (features.numel() == 0) {
    return device_bytes(features, 0);
  }
  const Normalization kind = symmetric ? Normalization::kSymmetric
                             : before  ? Normalization::kBefore
                             : after   ? Normalization::kAfter
                                       : Normalization::kNone;
  const DeviceLatticeShape shape = {features.size(0),
                                    features.size(2) * features.size(3),
                                    static_cast<int>(features.size(1)),
                                    before,
                                    after,
                                    !self_term};
  const int32_t device = features.get_device_index();
  void* const stream = current_cuda_stream(device);
  return with_device_type(features, [&]<class T>(T) {
    const DevicePicture picture(features);
    DeviceFeatures<T> args = {picture.source<T>().data, shape, {}};
    std::copy_n(picture.strides, 3, args.strides);
    // Usual keys have one word. Those that need more are counted a second time.
    VertexCount count = {0, 1};
    Tensor counted;
    for (int words = 0; words < count.words;) {
      words = count.words;
      counted = device_bytes(features, count_workspace(shape, words, sizeof(T)));
      count = count_vertices_cuda<T>(args, words, counted.mutable_data_ptr(), device, stream);
    }
    Tensor bytes = device_bytes(features, device_lattice_bytes(shape, count.vertices, sizeof(T)));
    const Tensor workspace = device_bytes(features, build_workspace(shape, count, sizeof(T)));
    build_lattice_cuda<T>(shape, kind, count, counted.mutable_data_ptr(),
                          workspace.mutable_data_ptr(), bytes.mutable_data_ptr(), device, stream);
    return bytes;
  });
}

Tensor mean_field_op(const Tensor& unary, const std::vector<Tensor>& lattices,
                     const std::vector<Tensor>& compats, int64_t iterations, bool energies,
                     const std::optional<Tensor>& q, const std::string& output) {
  constexpr const char* kOp = "dense_crf_mean_field";
  check_device_labels(kOp, "unary", unary);
  PYDENSE_CHECK(output == "probabilities" || output == "logits" || output == "labels", kOp,
                ": output must be probabilities, logits or labels, got '", output, "'");
  PYDENSE_CHECK(iterations >= 0 && iterations <= INT32_MAX, kOp,
                ": iterations must be in [0, 2^31), got ", iterations);
  if (q.has_value()) {
    check_same_device_shape(kOp, "q", *q, unary);
  }
  const MeanFieldOutput kind = output == "probabilities" ? MeanFieldOutput::kProbabilities
                               : output == "logits"      ? MeanFieldOutput::kLogits
                                                         : MeanFieldOutput::kLabels;
  const bool labels = kind == MeanFieldOutput::kLabels;
  Tensor out = labels ? torch::stable::new_empty(
                            unary, {unary.size(0), unary.size(2), unary.size(3)}, ScalarType::Long)
                      : new_picture(unary, unary.size(2), unary.size(3), unary.scalar_type(),
                                    is_channels_last(unary));
  if (unary.numel() == 0) {
    return out;
  }
  const int32_t device = unary.get_device_index();
  void* const stream = current_cuda_stream(device);
  return with_device_type(unary, [&]<class T>(T) {
    const DeviceTerms<T> terms(kOp, unary, lattices, compats);
    const DevicePicture energy(unary);
    const DevicePicture start(q.has_value() ? *q : unary);
    DeviceMeanFieldArgs<T> args{};
    args.batch = unary.size(0);
    args.labels = unary.size(1);
    args.points = unary.size(2) * unary.size(3);
    args.terms = terms.terms.data();
    args.num_terms = static_cast<int>(terms.terms.size());
    args.unary = energy.source<T>();
    args.energies = energies;
    if (q.has_value()) {
      args.q = start.source<T>();
    }
    args.iterations = static_cast<int>(iterations);
    args.kind = kind;
    if (labels) {
      args.out_labels = out.mutable_data_ptr<int64_t>();
    } else {
      args.out = device_target<T>(out);
    }
    const Tensor workspace = device_bytes(unary, mean_field_workspace(args));
    mean_field_cuda<T>(args, workspace.mutable_data_ptr(), device, stream);
    return out;
  });
}

Tensor filter_op(const Tensor& values, const Tensor& lattice, bool reverse) {
  constexpr const char* kOp = "permutohedral_filter";
  check_device_picture(kOp, "values", values);
  Tensor out =
      new_dense(values, {values.sizes().data(), values.sizes().size()}, values.scalar_type());
  if (values.numel() == 0) {
    return out;
  }
  const int32_t device = values.get_device_index();
  void* const stream = current_cuda_stream(device);
  return with_device_type(values, [&]<class T>(T) {
    const DevicePicture from(values);
    const int64_t points = values.size(2) * values.size(3);
    const DeviceFilterArgs<T> args = {
        lattice_of<T>(kOp, lattice, values),
        values.size(0),
        values.size(1),
        from.source<T>(),
        {out.mutable_data_ptr<T>(), {values.size(1) * points, points, 1}},
        reverse};
    const Tensor workspace = device_bytes(values, filter_workspace(args));
    filter_lattice_cuda<T>(args, workspace.mutable_data_ptr(), device, stream);
    return out;
  });
}

}  // namespace
}  // namespace pydense

#ifdef PYDENSE_SIMT
PYDENSE_TORCH_SCHEMAS(m) {
  m.def(pydense::kLatticeSchema);
  m.def(pydense::kMeanFieldSchema);
  m.def(pydense::kFilterSchema);
}
#endif
PYDENSE_TORCH_CUDA(m) {
  m.impl("dense_crf_lattice", TORCH_BOX(&pydense::lattice_op));
  m.impl("dense_crf_mean_field", TORCH_BOX(&pydense::mean_field_op));
  m.impl("permutohedral_filter", TORCH_BOX(&pydense::filter_op));
}

#endif
