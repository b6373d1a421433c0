// SPDX-License-Identifier: Apache-2.0
// pydense._core: the torch-free Python door. NumPy arrays in and out; checks shapes and strides,
// releases the GIL, owns no maths.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/build_info.h"
#include "common/cpu_isa.h"
#include "common/mapping.h"
#include "common/thread_pool.h"
#include "numpy/array.h"
#include "selftest/selftest.h"

namespace pydense::numpy {
namespace {

FloatArray selftest(const FloatArray& x) {
  const ContiguousFloatArray contiguous = as_contiguous(x);
  FloatArray y(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  const SelftestArgs args = {contiguous.data(), y.mutable_data(), x.size()};
  const py::gil_scoped_release release;
  selftest_table().run(args, pool_parallel_for);
  return y;
}

py::dict build_info_dict() {
  const BuildInfo& info = build_info();
  py::dict dict;
  dict["version"] = info.version;
  dict["compiler"] = info.compiler;
  dict["build_type"] = info.build_type;
  dict["cuda_architectures"] = info.cuda_architectures;
  dict["cuda_toolkit"] = info.cuda_toolkit;
  return dict;
}

}  // namespace
}  // namespace pydense::numpy

PYBIND11_MODULE(_core, m) {
  namespace py = pybind11;
  using namespace pydense;  // NOLINT(google-build-using-namespace)
  // A wrong PYDENSE_CPU_CAPABILITY, PYDENSE_NUM_THREADS or PYDENSE_CACHE_MIB shows at import.
  current_cpu_isa();
  get_num_threads();
  max_kept_bytes();
  m.def("build_info", &numpy::build_info_dict);
  m.def("cpu_capability", [] { return cpu_isa_name(current_cpu_isa()); });
  m.def("cpu_capabilities", [] {
    std::vector<std::string> names;
    for (const CpuIsa isa : available_cpu_isas()) {
      names.emplace_back(cpu_isa_name(isa));
    }
    return names;
  });
  m.def("set_cpu_capability", &set_cpu_isa, py::arg("name"));
  m.def("get_num_threads", &get_num_threads);
  m.def(
      "set_num_threads",
      [](int64_t n) {
        const py::gil_scoped_release release;
        set_num_threads(n);
      },
      py::arg("n"));
  m.def("empty_cache", &drop_kept_mappings);
  m.def("cached_bytes", [] { return mapped_bytes().kept; });
  m.def("selftest", &numpy::selftest, py::arg("x").noconvert());
  numpy::bind_dense_crf(m);
}
