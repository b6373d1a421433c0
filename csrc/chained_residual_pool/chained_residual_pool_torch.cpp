// SPDX-License-Identifier: Apache-2.0
// chained_residual_pool with 1x1 convolutions on torch tensors (N, C, H, W).
#include <optional>
#include <vector>

#include "chained_residual_pool/arguments_torch.h"
#include "chained_residual_pool/residual_stage.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;
constexpr const char* kOp = "chained_residual_pool";

// [out, what weights' gradients need ..., offsets ...], the latter two where they are asked for:
// pool first: the pooled inputs of all convolutions, else the inputs of all but the first.
std::vector<Tensor> forward(const Tensor& x, const std::vector<Tensor>& weights,
                            const std::vector<Tensor>& biases, bool pool_first, int64_t pool_size,
                            bool save_inputs, bool save_offsets) {
  check_picture(kOp, "x", x, true);
  const FloatType dtype = float_type(kOp, "x", x);
  const size_t stages = weights.size();
  PYDENSE_CHECK(stages >= 1 && stages <= kMaxResidualStages, kOp, ": weights must be 1 to ",
                kMaxResidualStages, " tensors, got ", stages);
  PYDENSE_CHECK(biases.empty() || biases.size() == stages, kOp, ": biases must be none or ", stages,
                " tensors, got ", biases.size());
  std::vector<Tensor> dense_parameters;  // keeps copies alive
  for (size_t i = 0; i < stages; ++i) {
    check_conv1x1_weight(kOp, "weights", weights[i], x);
    dense_parameters.push_back(as_contiguous(weights[i]));
  }
  for (const Tensor& bias : biases) {
    require_dtype(kOp, "biases", bias, x.scalar_type());
    require_same_device(kOp, "biases", bias, x);
    PYDENSE_CHECK(bias.dim() == 1 && bias.size(0) == x.size(1), kOp, ": biases must have shape (",
                  x.size(1), "), got ", bias.dim(), " dimensions or another size");
    dense_parameters.push_back(as_contiguous(bias));
  }
  const bool last = is_channels_last(x);
  const PoolShape shape = pool_shape(x, pool_size, last);
  check_pool_shape(kOp, shape);
  PoolShape unpooled = shape;
  unpooled.size = 1;

  // There, a stage needs dense tensors, and memory for its pooled input where windows are large.
  const bool gpu = on_gpu(x);
  const bool pools_in_memory = gpu && !residual_stage_cuda_fuses(shape);
  const Tensor rows = gpu ? as_dense(x, last) : with_contiguous_rows(x, last);
  const auto picture = [&](ScalarType type) {
    return new_picture(x, x.size(2), x.size(3), type, last);
  };
  std::vector<Tensor> tops = {rows};  // of every stage
  std::vector<Tensor> inputs;
  std::vector<Tensor> offsets;
  std::vector<PoolSource> addends;
  const auto new_offsets = [&]() -> uint8_t* {
    if (!save_offsets) {
      return nullptr;
    }
    return static_cast<uint8_t*>(
        offsets.emplace_back(picture(ScalarType::Byte)).mutable_data_ptr());
  };
  const auto sources_of_tops = [&] {
    addends.clear();
    for (const Tensor& top : tops) {
      addends.push_back(pool_source(top));
    }
  };
  // Pools with `pooling`, convolves with weight i; pooled and offsets may be null.
  const auto run = [&](const PoolShape& pooling, const Tensor& from, size_t i, const Tensor& to,
                       void* pooled, uint8_t* codes) {
    ResidualStageArgs args = {
        pooling,
        pool_source(from),
        dense_parameters[i].const_data_ptr(),
        biases.empty() ? nullptr : dense_parameters[stages + i].const_data_ptr(),
        addends.data(),
        static_cast<int>(addends.size()),
        to.mutable_data_ptr(),
        pooled,
        codes};
    args.pooled_late = pool_first;  // then it is for backward alone
    run_where(
        x,
        [&](auto device, void* stream) { residual_stage_cuda(kOp, dtype, args, device, stream); },
        [&] { residual_stage(kOp, dtype, args, torch_parallel_for); });
  };

  Tensor out = picture(x.scalar_type());
  std::optional<Tensor> workspace;
  if (pool_first) {
    for (size_t i = 0; i < stages; ++i) {
      const bool is_last = i + 1 == stages;
      const Tensor from = tops.back();
      const Tensor to = is_last ? out : picture(x.scalar_type());
      void* pooled = nullptr;
      if (save_inputs) {
        pooled = inputs.emplace_back(picture(x.scalar_type())).mutable_data_ptr();
      } else if (pools_in_memory) {
        if (!workspace.has_value()) {
          workspace = picture(x.scalar_type());
        }
        pooled = workspace->mutable_data_ptr();
      }
      if (is_last) {
        sources_of_tops();
      }
      run(shape, from, i, to, pooled, new_offsets());
      tops.push_back(to);
    }
  } else {
    Tensor convolved = picture(x.scalar_type());
    run(unpooled, rows, 0, convolved, nullptr, nullptr);
    for (size_t i = 1; i < stages; ++i) {
      const Tensor top = picture(x.scalar_type());
      const Tensor to = picture(x.scalar_type());
      run(shape, convolved, i, to, top.mutable_data_ptr(), new_offsets());
      tops.push_back(top);
      convolved = to;
    }
    if (save_inputs) {
      inputs.assign(tops.begin() + 1, tops.end());
    }
    const Tensor top = picture(x.scalar_type());
    run_max_pool(kOp, dtype, {shape, pool_source(convolved), top.mutable_data_ptr(), new_offsets()},
                 x);
    tops.push_back(top);
    sources_of_tops();
    const ResidualSumArgs args = {shape, addends.data(), static_cast<int>(addends.size()),
                                  out.mutable_data_ptr()};
    run_where(
        x, [&](auto device, void* stream) { residual_sum_cuda(dtype, args, device, stream); },
        [&] { residual_sum(dtype, args, torch_parallel_for); });
  }
  std::vector<Tensor> results = {out};
  results.insert(results.end(), inputs.begin(), inputs.end());
  results.insert(results.end(), offsets.begin(), offsets.end());
  return results;
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "chained_residual_pool(Tensor x, Tensor[] weights, Tensor[] biases, bool pool_first, "
      "int pool_size, bool save_inputs, bool save_offsets) -> Tensor[]");
}
PYDENSE_TORCH_CPU(m) { m.impl("chained_residual_pool", TORCH_BOX(&pydense::forward)); }
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { m.impl("chained_residual_pool", TORCH_BOX(&pydense::forward)); }
#endif
