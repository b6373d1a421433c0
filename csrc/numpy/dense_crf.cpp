// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/thread_pool.h"
#include "dense_crf/mean_field.h"
#include "dense_crf/permutohedral.h"
#include "numpy/array.h"

namespace pydense::numpy {
namespace {

// Strides in floats; an array whose strides are not whole floats is copied first.
FloatArray with_float_strides(const FloatArray& array) {
  bool whole = reinterpret_cast<uintptr_t>(array.data()) % alignof(float) == 0;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    whole = whole && array.strides(i) % static_cast<py::ssize_t>(sizeof(float)) == 0;
  }
  return whole ? array : FloatArray::ensure(py::array(array).attr("copy")());
}

int64_t float_stride(const FloatArray& array, int axis) {
  return array.strides(axis) / static_cast<int64_t>(sizeof(float));
}

std::string shape_text(const py::array& array) {
  return py::str(array.attr("shape")).cast<std::string>();
}

template <class T>
LabelArray<T> label_array(const FloatArray& array, T* data) {
  return {data, float_stride(array, 0), float_stride(array, 1)};
}

void require_labels(const char* op, const char* name, const FloatArray& array,
                    const MeanField& field) {
  PYDENSE_CHECK(array.ndim() == 2 && array.shape(0) == field.num_labels() &&
                    array.shape(1) == field.num_points(),
                op, ": ", name, " must have shape (", field.num_labels(), ", ", field.num_points(),
                "), got ", shape_text(array));
}

// A new (L, N) array with the labels of a point side by side in memory.
FloatArray new_distribution(const MeanField& field) {
  const py::ssize_t labels = field.num_labels();
  constexpr py::ssize_t kFloat = sizeof(float);
  return FloatArray({labels, py::ssize_t{field.num_points()}}, {kFloat, kFloat * labels});
}

std::shared_ptr<Lattice> make_lattice(const FloatArray& features) {
  PYDENSE_CHECK(features.ndim() == 2,
                "permutohedral_lattice: features must have shape (d, N), got ",
                shape_text(features));
  const FloatArray array = with_float_strides(features);
  PYDENSE_CHECK(array.shape(0) <= kMaxLatticeDims,
                "permutohedral_lattice: features must have at most ", kMaxLatticeDims,
                " dimensions, got ", array.shape(0));
  const LatticeFeatures args = {array.data(), array.shape(1), static_cast<int>(array.shape(0)),
                                float_stride(array, 0), float_stride(array, 1)};
  const py::gil_scoped_release release;
  return std::make_shared<Lattice>(build_lattice(args, pool_parallel_for));
}

FloatArray filter(const Lattice& lattice, const FloatArray& values, bool reverse) {
  PYDENSE_CHECK(values.ndim() == 2 && values.shape(1) == lattice.view.num_points &&
                    values.shape(0) <= INT32_MAX,
                "permutohedral_filter: values must have shape (C, ", lattice.view.num_points,
                "), got ", shape_text(values));
  const FloatArray in = with_float_strides(values);
  FloatArray out({in.shape(0), in.shape(1)});
  const FilterArgs args = {&lattice.view,
                           in.data(),
                           out.mutable_data(),
                           static_cast<int>(in.shape(0)),
                           float_stride(in, 0),
                           float_stride(in, 1),
                           float_stride(out, 0),
                           float_stride(out, 1),
                           reverse};
  const py::gil_scoped_release release;
  filter_lattice(args, pool_parallel_for);
  return out;
}

Normalization parse_normalization(const std::string& name) {
  if (name == "none") {
    return Normalization::kNone;
  }
  if (name == "before") {
    return Normalization::kBefore;
  }
  if (name == "after") {
    return Normalization::kAfter;
  }
  PYDENSE_CHECK(name == "symmetric",
                "mean_field: normalization must be none, before, after or symmetric, got '", name,
                "'");
  return Normalization::kSymmetric;
}

void add_pairwise(MeanField& field, std::shared_ptr<Lattice> lattice, const FloatArray& compat,
                  const std::string& normalization) {
  const int64_t labels = field.num_labels();
  const py::ssize_t dims = compat.ndim();
  PYDENSE_CHECK(dims == 0 || (dims == 1 && compat.shape(0) == labels) ||
                    (dims == 2 && compat.shape(0) == labels && compat.shape(1) == labels),
                "mean_field: compat must have shape (), (", labels, ",) or (", labels, ", ", labels,
                "), got ", shape_text(compat));
  const Normalization parsed = parse_normalization(normalization);
  const ContiguousFloatArray contiguous = as_contiguous(compat);
  const float* data = contiguous.data();
  const py::gil_scoped_release release;
  field.add_pairwise(std::move(lattice), static_cast<Compatibility>(dims), data, parsed);
}

void set_unary(MeanField& field, const FloatArray& unary) {
  require_labels("mean_field", "unary", unary, field);
  const FloatArray array = with_float_strides(unary);
  const auto view = label_array<const float>(array, array.data());
  const py::gil_scoped_release release;
  field.set_unary(view);
}

FloatArray run(MeanField& field, int iterations) {
  FloatArray q = new_distribution(field);
  const auto view = label_array<float>(q, q.mutable_data());
  const py::gil_scoped_release release;
  field.run(iterations, view);
  return q;
}

// Several threads write q: no element may be the place of two.
void require_no_overlap(const FloatArray& q) {
  int64_t inner = 0;
  int64_t outer = 1;
  if (std::abs(q.strides(0)) > std::abs(q.strides(1))) {
    std::swap(inner, outer);
  }
  const auto stride = [&](int64_t axis) { return std::abs(q.strides(axis)); };
  const bool apart = (q.shape(inner) <= 1 || stride(inner) >= py::ssize_t{sizeof(float)}) &&
                     (q.shape(outer) <= 1 || stride(outer) >= stride(inner) * (q.shape(inner) - 1) +
                                                                  py::ssize_t{sizeof(float)});
  PYDENSE_CHECK(apart, "mean_field: q must not overlap itself, got strides (", q.strides(0), ", ",
                q.strides(1), ")");
}

void step(MeanField& field, FloatArray q) {  // NOLINT(performance-unnecessary-value-param)
  require_labels("mean_field", "q", q, field);
  PYDENSE_CHECK(q.writeable(), "mean_field: q must be writeable, got a read-only array");
  require_no_overlap(q);
  FloatArray array = with_float_strides(q);
  const auto view = label_array<float>(
      array, q.mutable_data() == array.data() ? q.mutable_data() : array.mutable_data());
  {
    const py::gil_scoped_release release;
    field.step(view);
  }
  if (array.ptr() != q.ptr()) {
    q[py::ellipsis()] = array;
  }
}

double kl_divergence(MeanField& field, const FloatArray& q) {
  require_labels("mean_field", "q", q, field);
  const FloatArray array = with_float_strides(q);
  const auto view = label_array<const float>(array, array.data());
  const py::gil_scoped_release release;
  return field.kl_divergence(view);
}

}  // namespace

void bind_dense_crf(py::module_& m) {
  py::class_<Lattice, std::shared_ptr<Lattice>>(m, "Lattice")
      .def(py::init(&make_lattice), py::arg("features").noconvert())
      .def_property_readonly("num_points", [](const Lattice& l) { return l.view.num_points; })
      .def_property_readonly("num_dims", [](const Lattice& l) { return l.view.dims; })
      .def_property_readonly("num_vertices", [](const Lattice& l) { return l.view.num_vertices; })
      .def_property_readonly("nbytes", &Lattice::bytes)
      .def("filter", &filter, py::arg("values").noconvert(), py::kw_only(),
           py::arg("reverse") = false);
  py::class_<MeanField>(m, "MeanField")
      .def(py::init([](int64_t num_points, int num_labels) {
             const py::gil_scoped_release release;
             return std::make_unique<MeanField>(num_points, num_labels, pool_parallel_for);
           }),
           py::arg("num_points"), py::arg("num_labels"))
      .def("set_unary", &set_unary, py::arg("unary").noconvert())
      .def("add_pairwise", &add_pairwise, py::arg("lattice").none(false),
           py::arg("compat").noconvert(), py::arg("normalization"))
      .def("start", [](MeanField& field) { return run(field, 0); })
      .def("step", &step, py::arg("q").noconvert())
      .def("run", &run, py::arg("iterations"))
      .def("kl_divergence", &kl_divergence, py::arg("q").noconvert());
}

}  // namespace pydense::numpy
