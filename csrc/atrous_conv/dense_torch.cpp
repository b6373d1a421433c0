// SPDX-License-Identifier: Apache-2.0
// Dense atrous convolution on torch tensors (N, C, H, W). A result has the memory format of x.
#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "atrous_conv/dense_cuda.h"
#include "atrous_conv/dense_gradient.h"
#include "atrous_conv/dense_packed_torch.h"
#include "common/buffer.h"
#include "torch/memory.h"
#include "torch/picture.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

void check_weight(const char* op, const Tensor& weight, const Tensor& x, bool transposed) {
  require_dtype(op, "weight", weight, x.scalar_type());
  require_same_device(op, "weight", weight, x);
  PYDENSE_CHECK(weight.dim() == 4 && weight.size(transposed ? 0 : 1) == x.size(1), op,
                ": weight must have shape ", transposed ? "(" : "(O, ", x.size(1),
                transposed ? ", O, kH, kW), got " : ", kH, kW), got ", weight.dim(),
                " dimensions or another size");
}

// A vector of numbers for every output, in the type of the sums.
std::optional<Tensor> outputs_vector(const char* op, const char* name,
                                     const std::optional<Tensor>& vector, const Tensor& x,
                                     int64_t outputs) {
  if (!vector.has_value()) {
    return std::nullopt;
  }
  const ScalarType sums =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (vector->scalar_type() != sums) {
    require_dtype(op, name, *vector, x.scalar_type());
  }
  require_same_device(op, name, *vector, x);
  PYDENSE_CHECK(vector->dim() == 1 && vector->size(0) == outputs, op, ": ", name,
                " must have shape (", outputs, "), got ", vector->dim(),
                " dimensions or another size");
  return as_contiguous(torch::stable::to(*vector, sums));
}

// x itself where its channels or the pixels of its rows lie side by side, else a dense copy.
Tensor with_unit_stride(const Tensor& x) {
  return x.stride(1) == 1 || x.stride(3) == 1 ? x : as_dense(x, is_channels_last(x));
}

// A picture of one channel has any stride along it, and so has a row of one pixel.
DenseConvPicture picture_of(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

struct Geometry {
  int64_t dilation_y;
  int64_t dilation_x;
  int64_t top;
  int64_t left;
};

DenseConvShape shape_of(const Tensor& x, const Tensor& weight, int64_t height, int64_t width,
                        const Geometry& geometry, bool transposed) {
  return {x.size(0),
          x.size(1),
          weight.size(transposed ? 1 : 0),
          x.size(2),
          x.size(3),
          height,
          width,
          weight.size(2),
          weight.size(3),
          geometry.dilation_y,
          geometry.dilation_x,
          geometry.top,
          geometry.left};
}

// One convolution, and the tensors that must outlive it.
struct Convolution {
  Tensor kernel;
  std::optional<Tensor> factor;
  std::optional<Tensor> shift;
  DenseConvArgs args;
};

// x and `out` are where they are; the latter begins at channel `first`.
Convolution convolution(const char* op, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                        const Tensor& out, int64_t first, const Geometry& geometry, bool transposed,
                        bool relu) {
  const DenseConvShape shape = shape_of(x, weight, out.size(2), out.size(3), geometry, transposed);
  Convolution made = {with_even_taps(weight),
                      outputs_vector(op, "scale", scale, x, shape.outputs),
                      outputs_vector(op, "bias", bias, x, shape.outputs),
                      {}};
  const auto element = static_cast<int64_t>(x.element_size());
  made.args = {shape,
               picture_of(x),
               dense_weight_of(made.kernel, transposed),
               nullptr,
               made.factor.has_value() ? made.factor->const_data_ptr() : nullptr,
               made.shift.has_value() ? made.shift->const_data_ptr() : nullptr,
               relu,
               {static_cast<char*>(out.mutable_data_ptr()) + first * out.stride(1) * element,
                out.stride(0), out.stride(1), out.stride(2), out.stride(3)}};
  return made;
}

Tensor forward_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& packed,
                  const std::optional<Tensor>& bias, int64_t height, int64_t width,
                  int64_t dilation_y, int64_t dilation_x, int64_t top, int64_t left,
                  bool transposed, bool relu) {
  constexpr const char* kOp = "dense_atrous_conv2d";
  check_picture(kOp, "x", x, true);
  const FloatType dtype = float_type(kOp, "x", x);
  check_weight(kOp, weight, x, transposed);
  PYDENSE_CHECK(height >= 1 && width >= 1, kOp, ": output size must be at least 1, got (", height,
                ", ", width, ")");
  const std::array<int64_t, 4> size = {x.size(0), weight.size(transposed ? 1 : 0), height, width};
  Tensor out = new_dense(x, size, x.scalar_type(), is_channels_last(x));
  const Tensor rows = on_gpu(x) ? x : with_unit_stride(x);  // a GPU takes any strides
  Convolution own = convolution(kOp, rows, weight, std::nullopt, bias, out, 0,
                                {dilation_y, dilation_x, top, left}, transposed, relu);
  if (packed.has_value()) {
    own.args.packed = dense_panels(kOp, *packed, x, dtype, own.args.shape, transposed);
  }
  run_where(
      x,
      [&](auto device, void* stream) {
        const DenseConvCudaArgs all = {&own.args, 1};
        const Tensor workspace = new_bytes(x, dense_conv_cuda_workspace(kOp, dtype, all));
        dense_conv_cuda(kOp, dtype, all, workspace.mutable_data_ptr(), device, stream);
      },
      [&] { dense_conv(kOp, dtype, own.args, torch_parallel_for); });
  return out;
}

void check_target(const char* op, const Tensor& out, const Tensor& x, int64_t outputs) {
  require_dtype(op, "out", out, x.scalar_type());
  require_same_device(op, "out", out, x);
  PYDENSE_CHECK(out.size(0) == x.size(0) && out.size(1) == outputs, op, ": out must have shape (",
                x.size(0), ", ", outputs, ", H', W'), got (", out.size(0), ", ", out.size(1), ", ",
                out.size(2), ", ", out.size(3), ")");
  for (int64_t axis = 0; axis < 4; ++axis) {
    PYDENSE_CHECK(out.size(axis) <= 1 || out.stride(axis) > 0, op,
                  ": out must have a stride along axis ", axis, ", got ", out.stride(axis));
  }
}

// Branches of one picture with odd kernels and half of their reach as padding, side by side.
// `packed` is empty, or has a tensor for each weight, without elements where it is not packed.
void branches_op(const Tensor& x, const std::vector<Tensor>& weights,
                 const std::vector<Tensor>& packed, const std::vector<Tensor>& scales,
                 const std::vector<Tensor>& biases, const Tensor& out,
                 const std::vector<int64_t>& rates, bool relu) {
  constexpr const char* kOp = "_dense_atrous_conv2d_branches_into";
  check_picture(kOp, "x", x, true);
  check_picture(kOp, "out", out, true);
  const FloatType dtype = float_type(kOp, "x", x);
  const size_t count = weights.size();
  PYDENSE_CHECK(count >= 1 && rates.size() == count && (packed.empty() || packed.size() == count) &&
                    (scales.empty() || scales.size() == count) &&
                    (biases.empty() || biases.size() == count),
                kOp,
                ": rates, and packed, scales and biases unless there are none, must be as many as "
                "weights, got ",
                rates.size(), ", ", packed.size(), ", ", scales.size(), " and ", biases.size(),
                " for ", count);
  int64_t outputs = 0;
  for (const Tensor& weight : weights) {
    check_weight(kOp, weight, x, false);
    PYDENSE_CHECK(weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1, kOp,
                  ": weights must have odd kernels, got (", weight.size(2), ", ", weight.size(3),
                  ")");
    outputs += weight.size(0);
  }
  check_target(kOp, out, x, outputs);
  PYDENSE_CHECK(out.size(2) == x.size(2) && out.size(3) == x.size(3), kOp,
                ": out must have the size of x");
  const Tensor rows = on_gpu(x) ? x : with_unit_stride(x);
  std::vector<Convolution> made;
  int64_t first = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    const Geometry geometry = {rates[i], rates[i], rates[i] * (weight.size(2) / 2),
                               rates[i] * (weight.size(3) / 2)};
    made.push_back(convolution(kOp, rows, weight,
                               scales.empty() ? std::nullopt : std::optional<Tensor>(scales[i]),
                               biases.empty() ? std::nullopt : std::optional<Tensor>(biases[i]),
                               out, first, geometry, false, relu));
    if (!packed.empty() && packed[i].numel() > 0) {
      made.back().args.packed =
          dense_panels(kOp, packed[i], x, dtype, made.back().args.shape, false);
    }
    first += weight.size(0);
  }
  run_where(
      x,
      [&](auto device, void* stream) {
        std::vector<DenseConvArgs> all;
        for (const Convolution& own : made) {
          all.push_back(own.args);
        }
        for (size_t i = 0; i < count; i += kMaxDenseConvolutions) {
          const DenseConvCudaArgs some = {
              all.data() + i, static_cast<int>(std::min<size_t>(kMaxDenseConvolutions, count - i))};
          const Tensor workspace = new_bytes(x, dense_conv_cuda_workspace(kOp, dtype, some));
          dense_conv_cuda(kOp, dtype, some, workspace.mutable_data_ptr(), device, stream);
        }
      },
      [&] {
        const DenseConvArgs& any = made.front().args;
        const int64_t bytes = dense_conv_rows_bytes(kOp, dtype, any.shape, any.x);
        const Buffer shared(static_cast<size_t>(bytes));
        if (bytes > 0) {
          dense_conv_rows(kOp, dtype, any.shape, any.x, shared.data(), torch_parallel_for);
        }
        for (Convolution& own : made) {
          own.args.rows = bytes > 0 ? shared.data() : nullptr;
          dense_conv(kOp, dtype, own.args, torch_parallel_for);
        }
      });
}

Tensor gradient_op(const Tensor& grad, const Tensor& x, int64_t kernel_height, int64_t kernel_width,
                   int64_t dilation_y, int64_t dilation_x, int64_t top, int64_t left) {
  constexpr const char* kOp = "dense_atrous_conv2d_weight_gradient";
  check_picture(kOp, "grad", grad, true);
  check_picture(kOp, "x", x, true);
  const FloatType dtype = float_type(kOp, "x", x);
  require_dtype(kOp, "grad", grad, x.scalar_type());
  require_same_device(kOp, "grad", grad, x);
  PYDENSE_CHECK(grad.size(0) == x.size(0), kOp, ": grad must have the batch of x, ", x.size(0),
                ", got ", grad.size(0));
  PYDENSE_CHECK(kernel_height >= 1 && kernel_width >= 1, kOp,
                ": kernel size must be at least 1, got (", kernel_height, ", ", kernel_width, ")");
  const DenseConvShape shape = {x.size(0),    x.size(1),    grad.size(1),  x.size(2),    x.size(3),
                                grad.size(2), grad.size(3), kernel_height, kernel_width, dilation_y,
                                dilation_x,   top,          left};
  const bool gpu = on_gpu(x);
  const Tensor rows = gpu ? x : with_unit_stride(x);
  const Tensor grad_rows = gpu ? grad : with_unit_stride(grad);
  const std::array<int64_t, 4> size = {grad.size(1), x.size(1), kernel_height, kernel_width};
  Tensor weight = new_dense(x, size, x.scalar_type());
  const DenseConvGradientArgs args = {shape, picture_of(grad_rows), picture_of(rows),
                                      weight.mutable_data_ptr()};
  run_where(
      x,
      [&](auto device, void* stream) {
        const Tensor workspace =
            new_bytes(x, dense_conv_weight_gradient_cuda_workspace(kOp, dtype, args));
        dense_conv_weight_gradient_cuda(kOp, dtype, args, workspace.mutable_data_ptr(), device,
                                        stream);
      },
      [&] { dense_conv_weight_gradient(kOp, dtype, args, torch_parallel_for); });
  return weight;
}

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def(
      "dense_atrous_conv2d(Tensor x, Tensor weight, Tensor? packed, Tensor? bias, SymInt height, "
      "SymInt width, SymInt dilation_y, SymInt dilation_x, SymInt top, SymInt left, "
      "bool transposed, bool relu) -> Tensor");
  m.def(
      "_dense_atrous_conv2d_branches_into(Tensor x, Tensor[] weights, Tensor[] packed, "
      "Tensor[] scales, Tensor[] biases, Tensor(a!) out, int[] rates, bool relu) -> ()");
  m.def(
      "dense_atrous_conv2d_weight_gradient(Tensor grad, Tensor x, SymInt kernel_height, "
      "SymInt kernel_width, SymInt dilation_y, SymInt dilation_x, SymInt top, SymInt left) "
      "-> Tensor");
}
PYDENSE_TORCH_CPU(m) {
  m.impl("dense_atrous_conv2d", TORCH_BOX(&pydense::forward_op));
  m.impl("_dense_atrous_conv2d_branches_into", TORCH_BOX(&pydense::branches_op));
  m.impl("dense_atrous_conv2d_weight_gradient", TORCH_BOX(&pydense::gradient_op));
}
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) {
  m.impl("dense_atrous_conv2d", TORCH_BOX(&pydense::forward_op));
  m.impl("_dense_atrous_conv2d_branches_into", TORCH_BOX(&pydense::branches_op));
  m.impl("dense_atrous_conv2d_weight_gradient", TORCH_BOX(&pydense::gradient_op));
}
#endif
