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

void check_parameter(const char* name, const Tensor& parameter, const Tensor& x, bool is_weight) {
  require_dtype(kOp, name, parameter, x.scalar_type());
  require_same_device(kOp, name, parameter, x);
  const int64_t channels = x.size(1);
  const bool fits = is_weight ? parameter.dim() == 4 && parameter.size(0) == channels &&
                                    parameter.size(1) == channels && parameter.size(2) == 1 &&
                                    parameter.size(3) == 1
                              : parameter.dim() == 1 && parameter.size(0) == channels;
  PYDENSE_CHECK(fits, kOp, ": ", name, " must have shape (", channels,
                is_weight ? ", C, 1, 1), C the channels of x, got " : "), got ", parameter.dim(),
                " dimensions or another size");
}

// The steps of the chain, where the tensors are.
class Steps {
 public:
  Steps(const Tensor& x, FloatType dtype) : dtype_(dtype) {
#ifdef PYDENSE_WITH_CUDA
    gpu_ = on_gpu(x);
    if (gpu_) {
      device_ = x.get_device_index();
      stream_ = current_cuda_stream(device_);
    }
#else
    static_cast<void>(x);
#endif
  }

  // Then a stage needs memory for its pooled input, and dense tensors.
  bool is_gpu() const { return gpu_; }

  void stage(const ResidualStageArgs& args) const {
#ifdef PYDENSE_WITH_CUDA
    if (gpu_) {
      return residual_stage_cuda(kOp, dtype_, args, device_, stream_);
    }
#endif
    residual_stage(kOp, dtype_, args, torch_parallel_for);
  }
  void pool(const MaxPoolArgs& args) const {
#ifdef PYDENSE_WITH_CUDA
    if (gpu_) {
      return max_pool_forward_cuda(kOp, dtype_, args, device_, stream_);
    }
#endif
    max_pool_forward(kOp, dtype_, args, torch_parallel_for);
  }
  void sum(const ResidualSumArgs& args) const {
#ifdef PYDENSE_WITH_CUDA
    if (gpu_) {
      return residual_sum_cuda(dtype_, args, device_, stream_);
    }
#endif
    residual_sum(dtype_, args, torch_parallel_for);
  }

 private:
  FloatType dtype_;
  bool gpu_ = false;
  int32_t device_ = 0;
  void* stream_ = nullptr;
};

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
    check_parameter("weights", weights[i], x, true);
    dense_parameters.push_back(as_contiguous(weights[i]));
  }
  for (const Tensor& bias : biases) {
    check_parameter("biases", bias, x, false);
    dense_parameters.push_back(as_contiguous(bias));
  }
  const bool last = is_channels_last(x);
  const PoolShape shape = pool_shape(x, pool_size, last);
  check_pool_shape(kOp, shape);
  PoolShape unpooled = shape;
  unpooled.size = 1;

  const Steps steps(x, dtype);
  const Tensor rows = steps.is_gpu() ? as_dense(x, last) : with_contiguous_rows(x, last);
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
    steps.stage({pooling, pool_source(from), dense_parameters[i].const_data_ptr(),
                 biases.empty() ? nullptr : dense_parameters[stages + i].const_data_ptr(),
                 addends.data(), static_cast<int>(addends.size()), to.mutable_data_ptr(), pooled,
                 codes});
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
      } else if (steps.is_gpu()) {
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
    steps.pool({shape, pool_source(convolved), top.mutable_data_ptr(), new_offsets()});
    tops.push_back(top);
    sources_of_tops();
    steps.sum({shape, addends.data(), static_cast<int>(addends.size()), out.mutable_data_ptr()});
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
