// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/thread_pool.h"
#include "dense_crf/lattice_bytes.h"
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
                    const MeanField<float>& field) {
  PYDENSE_CHECK(array.ndim() == 2 && array.shape(0) == field.num_labels() &&
                    array.shape(1) == field.num_points(),
                op, ": ", name, " must have shape (", field.num_labels(), ", ", field.num_points(),
                "), got ", shape_text(array));
}

// A new (L, N) array with the labels of a point side by side in memory.
FloatArray new_distribution(const MeanField<float>& field) {
  const py::ssize_t labels = field.num_labels();
  constexpr py::ssize_t kFloat = sizeof(float);
  return FloatArray({labels, py::ssize_t{field.num_points()}}, {kFloat, kFloat * labels});
}

// Points as a picture with rows of `width` pixels, 0 for points without an order.
PointGrid picture(const char* op, int64_t points, int64_t width) {
  PYDENSE_CHECK(width >= 0 && (width == 0 || points % width == 0), op,
                ": width must divide the number of points, ", points, ", got ", width);
  return width == 0 ? PointGrid{1, points} : PointGrid{points / width, width};
}

// A lattice and the bytes it lies in.
struct Lattice {
  Buffer bytes;
  LatticeView<float> view{};
};

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
                "permutohedral_lattice: normalization must be none, before, after or symmetric, "
                "got '",
                name, "'");
  return Normalization::kSymmetric;
}

std::shared_ptr<Lattice> make_lattice(const FloatArray& features, const std::string& normalization,
                                      int64_t width) {
  PYDENSE_CHECK(features.ndim() == 2,
                "permutohedral_lattice: features must have shape (d, N), got ",
                shape_text(features));
  const FloatArray array = with_float_strides(features);
  PYDENSE_CHECK(array.shape(0) <= kMaxLatticeDims,
                "permutohedral_lattice: features must have at most ", kMaxLatticeDims,
                " dimensions, got ", array.shape(0));
  const LatticeFeatures<float> args = {
      array.data(), picture("permutohedral_lattice", array.shape(1), width),
      static_cast<int>(array.shape(0)), float_stride(array, 0), float_stride(array, 1)};
  const LatticeOptions options = {parse_normalization(normalization), true};
  const py::gil_scoped_release release;
  auto lattice = std::make_shared<Lattice>();
  const ByteSink sink = {&lattice->bytes, [](void* bytes, size_t size) {
                           *static_cast<Buffer*>(bytes) = Buffer(size, Lifetime::kTensor);
                           return static_cast<Buffer*>(bytes)->data();
                         }};
  build_lattice(args, options, sink, pool_parallel_for);
  lattice->view = lattice_at<float>(lattice->bytes.data(), 0);
  return lattice;
}

FloatArray filter(const Lattice& lattice, const FloatArray& values, bool reverse) {
  PYDENSE_CHECK(values.ndim() == 2 && values.shape(1) == lattice.view.num_points() &&
                    values.shape(0) <= INT32_MAX,
                "permutohedral_filter: values must have shape (C, ", lattice.view.num_points(),
                "), got ", shape_text(values));
  const FloatArray in = with_float_strides(values);
  FloatArray out({in.shape(0), in.shape(1)});
  const FilterArgs<float> args = {&lattice.view,
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

// The field with the arrays it reads.
struct Field {
  MeanField<float> mean_field;
  Buffer unary;
  std::vector<std::shared_ptr<Lattice>> lattices;
  std::mutex mutex;  // of the two above

  Field(int64_t num_points, int num_labels, int64_t width)
      : mean_field(picture("mean_field", num_points, width), num_labels, pool_parallel_for) {}
};

void add_pairwise(Field& field, const std::shared_ptr<Lattice>& lattice, const FloatArray& compat) {
  const int64_t labels = field.mean_field.num_labels();
  const py::ssize_t dims = compat.ndim();
  PYDENSE_CHECK(dims == 0 || (dims == 1 && compat.shape(0) == labels) ||
                    (dims == 2 && compat.shape(0) == labels && compat.shape(1) == labels),
                "mean_field: compat must have shape (), (", labels, ",) or (", labels, ", ", labels,
                "), got ", shape_text(compat));
  const ContiguousFloatArray contiguous = as_contiguous(with_float_strides(compat));
  const float* data = contiguous.data();
  const py::gil_scoped_release release;
  const std::lock_guard<std::mutex> lock(field.mutex);
  field.lattices.push_back(lattice);
  field.mean_field.add_pairwise(lattice->view, static_cast<Compatibility>(dims), data);
}

// Keeps a copy, in the order of the array's memory.
void set_unary(Field& field, const FloatArray& unary) {
  require_labels("mean_field", "unary", unary, field.mean_field);
  const FloatArray array = with_float_strides(unary);
  const int64_t labels = array.shape(0);
  const int64_t points = array.shape(1);
  const LabelArray<const float> from = label_array<const float>(array, array.data());
  const bool labels_first = from.label_stride > from.point_stride;
  const py::gil_scoped_release release;
  Buffer copy =
      buffer_of<float>(checked_bytes(static_cast<size_t>(labels), static_cast<size_t>(points)));
  const LabelArray<float> to = {copy.as<float>(), labels_first ? points : 1,
                                labels_first ? 1 : labels};
  const auto copy_run = [](const float* source, int64_t stride, int64_t count, float* target) {
    if (stride == 1) {
      std::memcpy(target, source, static_cast<size_t>(count) * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      target[i] = source[i * stride];
    }
  };
  constexpr int64_t kChunk = 16384;  // points
  parallel_tasks(pool_parallel_for, ceil_div(points, kChunk), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = std::min(begin + kChunk, points);
    for (int64_t l = 0; labels_first && l < labels; ++l) {
      copy_run(from.data + l * from.label_stride + begin * from.point_stride, from.point_stride,
               end - begin, to.data + l * points + begin);
    }
    for (int64_t p = begin; !labels_first && p < end; ++p) {
      copy_run(from.data + p * from.point_stride, from.label_stride, labels, to.data + p * labels);
    }
  });
  const std::lock_guard<std::mutex> lock(field.mutex);
  std::swap(field.unary, copy);  // the old one lives until the field reads the new one
  field.mean_field.set_unary({to.data, to.label_stride, to.point_stride}, true);
}

FloatArray run(Field& field, int iterations) {
  FloatArray q = new_distribution(field.mean_field);
  const auto view = label_array<float>(q, q.mutable_data());
  const py::gil_scoped_release release;
  field.mean_field.run(iterations, {}, {MeanFieldOutput::kProbabilities, view, nullptr});
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

void step(Field& field, FloatArray q) {  // NOLINT(performance-unnecessary-value-param)
  require_labels("mean_field", "q", q, field.mean_field);
  PYDENSE_CHECK(q.writeable(), "mean_field: q must be writeable, got a read-only array");
  require_no_overlap(q);
  FloatArray array = with_float_strides(q);
  const auto view = label_array<float>(
      array, q.mutable_data() == array.data() ? q.mutable_data() : array.mutable_data());
  {
    const py::gil_scoped_release release;
    field.mean_field.run(1, {view.data, view.label_stride, view.point_stride},
                         {MeanFieldOutput::kProbabilities, view, nullptr});
  }
  if (array.ptr() != q.ptr()) {
    q[py::ellipsis()] = array;
  }
}

double kl_divergence(Field& field, const FloatArray& q) {
  require_labels("mean_field", "q", q, field.mean_field);
  const FloatArray array = with_float_strides(q);
  const auto view = label_array<const float>(array, array.data());
  const py::gil_scoped_release release;
  const FreeEnergy sums = field.mean_field.free_energy(view);
  return sums.negative_entropy + sums.unary + sums.pairwise;
}

}  // namespace

void bind_dense_crf(py::module_& m) {
  py::class_<Lattice, std::shared_ptr<Lattice>>(m, "Lattice")
      .def(py::init(&make_lattice), py::arg("features").noconvert(),
           py::arg("normalization") = "none", py::arg("width") = 0)
      .def_property_readonly("num_points", [](const Lattice& l) { return l.view.num_points(); })
      .def_property_readonly("num_dims", [](const Lattice& l) { return l.view.dims; })
      .def_property_readonly("num_vertices", [](const Lattice& l) { return l.view.num_vertices; })
      .def_property_readonly("nbytes", [](const Lattice& l) { return l.bytes.bytes(); })
      .def("filter", &filter, py::arg("values").noconvert(), py::kw_only(),
           py::arg("reverse") = false);
  py::class_<Field>(m, "MeanField")
      .def(py::init([](int64_t num_points, int num_labels, int64_t width) {
             const py::gil_scoped_release release;
             return std::make_unique<Field>(num_points, num_labels, width);
           }),
           py::arg("num_points"), py::arg("num_labels"), py::arg("width") = 0)
      .def("set_unary", &set_unary, py::arg("unary").noconvert())
      .def("add_pairwise", &add_pairwise, py::arg("lattice").none(false),
           py::arg("compat").noconvert())
      .def("start", [](Field& field) { return run(field, 0); })
      .def("step", &step, py::arg("q").noconvert())
      .def("run", &run, py::arg("iterations"))
      .def("kl_divergence", &kl_divergence, py::arg("q").noconvert());
}

}  // namespace pydense::numpy
