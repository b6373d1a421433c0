// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>

#include <new>

namespace pydense::numpy {

namespace py = pybind11;

// float32 of any strides; other dtypes are a TypeError (the Python layer converts).
using FloatArray = py::array_t<float, 0>;
using ContiguousFloatArray = py::array_t<float, py::array::c_style>;

// array_t::ensure answers a lack of memory with a null array.
inline ContiguousFloatArray as_contiguous(const FloatArray& array) {
  ContiguousFloatArray contiguous = ContiguousFloatArray::ensure(array);
  if (!contiguous) {
    throw std::bad_alloc();
  }
  return contiguous;
}

void bind_dense_crf(py::module_& m);

}  // namespace pydense::numpy
