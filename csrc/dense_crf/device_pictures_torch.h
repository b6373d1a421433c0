// SPDX-License-Identifier: Apache-2.0
// What the operators of the dense CRF share on a GPU, for *_torch.cpp files alone.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "dense_crf/device_lattice.h"
#include "torch/memory.h"
#include "torch/picture.h"

namespace pydense {

using torch::headeronly::ScalarType;

inline void check_device_picture(const char* op, const char* name, const Tensor& x) {
  check_picture(op, name, x, true);
  const ScalarType dtype = x.scalar_type();
  PYDENSE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": ", name,
                " must be of dtype Float or Double, got ", torch::headeronly::toString(dtype));
}

// Calls fn(float{}) or fn(double{}).
template <class Fn>
auto with_device_type(const Tensor& x, const Fn& fn) {
  return x.scalar_type() == ScalarType::Float ? fn(float{}) : fn(double{});
}

// A picture whose points have one stride.
struct DevicePicture {
  Tensor tensor;
  int64_t strides[3];

  explicit DevicePicture(const Tensor& x) : tensor(x) {
    if (x.size(2) > 1 && x.size(3) > 1 && x.stride(2) != x.stride(3) * x.size(3)) {
      tensor = as_contiguous(x);
    }
    strides[0] = tensor.stride(0);
    strides[1] = tensor.stride(1);
    strides[2] = tensor.stride(tensor.size(3) == 1 ? 2 : 3);
  }
  template <class T>
  DeviceArray<const T> source() const {
    return {tensor.const_data_ptr<T>(), {strides[0], strides[1], strides[2]}};
  }
};

inline Tensor device_bytes(const Tensor& like, size_t size) {
  const auto count = static_cast<int64_t>(size);
  return new_dense(like, {&count, 1}, ScalarType::Byte);
}

// Where results go: a new picture, which is dense.
template <class T>
DeviceArray<T> device_target(Tensor& to) {
  const DevicePicture picture(to);
  return {to.mutable_data_ptr<T>(), {picture.strides[0], picture.strides[1], picture.strides[2]}};
}

inline void check_device_labels(const char* op, const char* name, const Tensor& unary) {
  check_device_picture(op, name, unary);
  PYDENSE_CHECK(unary.size(1) <= 65536, op, ": ", name, " must have at most 65536 labels, got ",
                unary.size(1));
}

inline void check_same_device_shape(const char* op, const char* name, const Tensor& x,
                                    const Tensor& unary) {
  check_picture(op, name, x, true);
  require_dtype(op, name, x, unary.scalar_type());
  require_same_device(op, name, x, unary);
  for (int64_t i = 0; i < 4; ++i) {
    PYDENSE_CHECK(x.size(i) == unary.size(i), op, ": ", name,
                  " must have the shape of the unary, got ", x.size(i), " instead of ",
                  unary.size(i), " in dimension ", i);
  }
}

template <class T>
DeviceLattice<T> lattice_of(const char* op, const Tensor& lattice, const Tensor& like) {
  require_dtype(op, "lattice", lattice, ScalarType::Byte);
  require_same_device(op, "lattice", lattice, like);
  PYDENSE_CHECK(
      lattice.is_contiguous() && reinterpret_cast<uintptr_t>(lattice.const_data_ptr()) % 64 == 0,
      op, ": lattice must be contiguous, at an address that is a multiple of 64");
  return read_device_lattice<T>(op, lattice.const_data_ptr(), static_cast<size_t>(lattice.numel()),
                                like.size(0), like.size(2) * like.size(3));
}

inline void check_device_compat(const char* op, const char* name, const Tensor& compat,
                                const Tensor& like) {
  require_dtype(op, name, compat, like.scalar_type());
  require_same_device(op, name, compat, like);
  bool fits = compat.dim() <= 2;
  for (int64_t i = 0; i < compat.dim(); ++i) {
    fits = fits && compat.size(i) == like.size(1);
  }
  PYDENSE_CHECK(fits, op, ": ", name, " must have shape (), (", like.size(1), ",) or (",
                like.size(1), ", ", like.size(1), ")");
}

// The pairwise terms of a batch.
template <class T>
struct DeviceTerms {
  std::vector<DeviceTerm<T>> terms;
  std::vector<Tensor> kept;

  DeviceTerms(const char* op, const Tensor& unary, const std::vector<Tensor>& lattices,
              const std::vector<Tensor>& compats) {
    PYDENSE_CHECK(lattices.size() == compats.size(), op, ": compats must be ", lattices.size(),
                  ", one for each lattice, got ", compats.size());
    for (size_t k = 0; k < lattices.size(); ++k) {
      check_device_compat(op, "compats", compats[k], unary);
      kept.push_back(as_contiguous(compats[k]));
      terms.push_back({lattice_of<T>(op, lattices[k], unary),
                       static_cast<Compatibility>(compats[k].dim()),
                       kept.back().template const_data_ptr<T>()});
    }
  }
};

}  // namespace pydense
