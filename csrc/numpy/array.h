// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>

namespace pydense::numpy {

namespace py = pybind11;

// float32 of any strides; other dtypes are a TypeError (the Python layer converts).
using FloatArray = py::array_t<float, 0>;
using ContiguousFloatArray = py::array_t<float, py::array::c_style>;

void bind_dense_crf(py::module_& m);

}  // namespace pydense::numpy
