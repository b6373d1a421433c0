// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/dense_packed_torch.h"

#include <array>
#include <cstring>
#include <optional>

#include "atrous_conv/dense_cuda.h"
#include "torch/memory.h"

namespace pydense {
namespace {

using torch::headeronly::ScalarType;

// Before the panels of a packed weight: what they are of.
struct PackedHeader {
  static constexpr uint64_t kMagic = 0x31746C64'7970'0003;  // raised with every change of the order
  uint64_t magic;
  int64_t isa;
  int64_t dtype;
  int64_t outputs;
  int64_t channels;
  int64_t kernel_height;
  int64_t kernel_width;
  int64_t transposed;
};
static_assert(sizeof(PackedHeader) == 64);

PackedHeader header_of(FloatType dtype, const DenseConvShape& shape, bool transposed) {
  return {PackedHeader::kMagic,
          static_cast<int64_t>(current_cpu_isa()),
          static_cast<int64_t>(dtype),
          shape.outputs,
          shape.channels,
          shape.kernel_height,
          shape.kernel_width,
          transposed ? 1 : 0};
}

// Of a packed weight on a GPU, where there is no header; none elsewhere.
std::optional<int64_t> bytes_on_gpu([[maybe_unused]] const char* op, const Tensor& like,
                                    [[maybe_unused]] FloatType dtype,
                                    [[maybe_unused]] const DenseConvShape& shape) {
  std::optional<int64_t> bytes;
  run_where(
      like, [&](auto, void*) { bytes = dense_conv_cuda_packed_bytes(op, dtype, shape); }, [] {});
  return bytes;
}

Tensor pack_op(const Tensor& weight, bool transposed) {
  constexpr const char* kOp = "_pack_dense_atrous_weight";
  check_picture(kOp, "weight", weight, true);
  const FloatType dtype = float_type(kOp, "weight", weight);
  DenseConvShape shape = {};
  shape.outputs = weight.size(transposed ? 1 : 0);
  shape.channels = weight.size(transposed ? 0 : 1);
  shape.kernel_height = weight.size(2);
  shape.kernel_width = weight.size(3);
  const Tensor kernel = with_even_taps(weight);
  if (const auto bytes = bytes_on_gpu(kOp, weight, dtype, shape)) {
    Tensor packed = new_bytes(weight, *bytes);
    run_where(
        weight,
        [&](auto device, void* stream) {
          dense_conv_cuda_pack(kOp, dtype, shape, dense_weight_of(kernel, transposed),
                               packed.mutable_data_ptr(), device, stream);
        },
        [] {});
    return packed;
  }
  const PackedHeader header = header_of(dtype, shape, transposed);
  const std::array<int64_t, 1> size = {static_cast<int64_t>(sizeof(header)) +
                                       dense_conv_packed_bytes(kOp, dtype, shape)};
  Tensor packed = new_dense(weight, size, ScalarType::Byte);
  auto* const data = static_cast<char*>(packed.mutable_data_ptr());
  std::memcpy(data, &header, sizeof(header));
  dense_conv_pack(kOp, dtype, shape, dense_weight_of(kernel, transposed), data + sizeof(header),
                  torch_parallel_for);
  return packed;
}

}  // namespace

DenseConvWeight dense_weight_of(const Tensor& weight, bool transposed) {
  return {weight.const_data_ptr(), weight.stride(transposed ? 1 : 0),
          weight.stride(transposed ? 0 : 1), weight.stride(weight.size(3) == 1 ? 2 : 3),
          transposed};
}

Tensor with_even_taps(const Tensor& weight) {
  const bool even = weight.size(2) == 1 || weight.size(3) == 1 ||
                    weight.stride(2) == weight.size(3) * weight.stride(3);
  return even ? weight : as_contiguous(weight);
}

const void* dense_panels(const char* op, const Tensor& packed, const Tensor& x, FloatType dtype,
                         const DenseConvShape& shape, bool transposed) {
  require_dtype(op, "packed", packed, ScalarType::Byte);
  require_same_device(op, "packed", packed, x);
  const auto* const data = static_cast<const char*>(packed.const_data_ptr());
  if (const auto bytes = bytes_on_gpu(op, x, dtype, shape)) {
    PYDENSE_CHECK(packed.dim() == 1 && packed.is_contiguous() && packed.size(0) == *bytes &&
                      reinterpret_cast<uintptr_t>(data) % 16 == 0,
                  op,
                  ": packed must be what _pack_dense_atrous_weight makes of weight on CUDA, got "
                  "something else");
    return data;
  }
  const PackedHeader expected = header_of(dtype, shape, transposed);
  const int64_t bytes = dense_conv_packed_bytes(op, dtype, shape);
  PYDENSE_CHECK(packed.dim() == 1 && packed.is_contiguous() &&
                    packed.size(0) == static_cast<int64_t>(sizeof(PackedHeader)) + bytes &&
                    std::memcmp(data, &expected, sizeof(PackedHeader)) == 0,
                op,
                ": packed must be what _pack_dense_atrous_weight makes of weight on this CPU, "
                "got something else");
  return data + sizeof(PackedHeader);
}

Tensor new_bytes(const Tensor& x, int64_t bytes) {
  const std::array<int64_t, 1> size = {bytes};
  return new_dense(x, size, ScalarType::Byte);
}

}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("_pack_dense_atrous_weight(Tensor weight, bool transposed) -> Tensor");
}
PYDENSE_TORCH_CPU(m) { m.impl("_pack_dense_atrous_weight", TORCH_BOX(&pydense::pack_op)); }
#ifdef PYDENSE_WITH_CUDA
PYDENSE_TORCH_CUDA(m) { m.impl("_pack_dense_atrous_weight", TORCH_BOX(&pydense::pack_op)); }
#endif
