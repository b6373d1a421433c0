// SPDX-License-Identifier: Apache-2.0
// What the operators of the dense CRF share, for *_torch.cpp files alone.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dense_crf/lattice_bytes.h"
#include "dense_crf/mean_field.h"
#include "torch/memory.h"
#include "torch/picture.h"

namespace pydense {

using torch::headeronly::ScalarType;

inline void check_pictures(const char* op, const char* name, const Tensor& x) {
  PYDENSE_CHECK(x.dim() == 4, op, ": ", name,
                " must have 4 dimensions (batch, channels, height, width), got ", x.dim());
  PYDENSE_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU");
}

// Calls fn(float{}) or fn(double{}) by the dtype of x.
template <class Fn>
auto with_dtype(const char* op, const char* name, const Tensor& x, const Fn& fn) {
  const ScalarType dtype = x.scalar_type();
  PYDENSE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": ", name,
                " must be of dtype Float or Double, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float ? fn(float{}) : fn(double{});
}

// A tensor whose points have one stride.
struct Pictures {
  Tensor tensor;
  int64_t point_stride;

  explicit Pictures(const Tensor& x) : tensor(x), point_stride(x.stride(3)) {
    if (x.size(2) > 1 && x.size(3) > 1 && x.stride(2) != x.stride(3) * x.size(3)) {
      tensor = as_contiguous(x);
      point_stride = 1;
    } else if (x.size(3) == 1) {
      point_stride = x.stride(2);
    }
  }

  PointGrid grid() const { return {tensor.size(2), tensor.size(3)}; }
  template <class T>
  LabelArray<const T> at(int64_t image) const {
    return {tensor.const_data_ptr<T>() + image * tensor.stride(0), tensor.stride(1), point_stride};
  }
};

// Runs image(i, ParallelFor) for all images: one after the other with all threads or, where a
// picture is too small for several threads, side by side. The first error in order is raised.
template <class Image>
void for_each_image(int64_t images, const PointGrid& grid, const Image& image) {
  if (BandGrid(grid).count() > 1 || images == 1) {
    for (int64_t i = 0; i < images; ++i) {
      image(i, torch_parallel_for);
    }
    return;
  }
  std::vector<std::string> errors(static_cast<size_t>(images));
  parallel_tasks(torch_parallel_for, images, [&](int64_t i) {
    try {
      image(i, serial_for);
    } catch (const std::invalid_argument& error) {
      errors[static_cast<size_t>(i)] = error.what();
    }
  });
  for (const std::string& error : errors) {
    if (!error.empty()) {
      throw std::invalid_argument(error);
    }
  }
}

// The pairwise terms of a batch.
template <class T>
struct Terms {
  struct Term {
    Tensor lattice;
    int64_t images;
    Tensor compat;
  };
  std::vector<Term> terms;

  Terms(const char* op, const Tensor& unary, const std::vector<Tensor>& lattices,
        const std::vector<Tensor>& compats) {
    PYDENSE_CHECK(lattices.size() == compats.size(), op, ": compats must be ", lattices.size(),
                  ", one for each lattice, got ", compats.size());
    const int64_t labels = unary.size(1);
    for (size_t k = 0; k < lattices.size(); ++k) {
      const Tensor& lattice = lattices[k];
      const Tensor& compat = compats[k];
      require_dtype(op, "lattices", lattice, ScalarType::Byte);
      require_dtype(op, "compats", compat, unary.scalar_type());
      PYDENSE_CHECK(lattice.is_cpu() && compat.is_cpu(), op,
                    ": lattices and compats must be on the CPU");
      const int64_t dims = compat.dim();
      bool fits = dims <= 2;
      for (int64_t i = 0; i < dims; ++i) {
        fits = fits && compat.size(i) == labels;
      }
      PYDENSE_CHECK(fits, op, ": compats must have shape (), (", labels, ",) or (", labels, ", ",
                    labels, ")");
      const Tensor bytes = as_contiguous(lattice);
      const int64_t images =
          count_lattices<T>(op, bytes.const_data_ptr(), static_cast<size_t>(bytes.numel()));
      PYDENSE_CHECK(images == 1 || images == unary.size(0), op, ": lattices must hold 1 or ",
                    unary.size(0), " images, got ", images);
      terms.push_back({bytes, images, as_contiguous(compat)});
    }
  }

  void add_to(MeanField<T>& field, int64_t image) const {
    for (const Term& term : terms) {
      field.add_pairwise(lattice_at<T>(term.lattice.const_data_ptr(), term.images == 1 ? 0 : image),
                         static_cast<Compatibility>(term.compat.dim()),
                         static_cast<const T*>(term.compat.const_data_ptr()));
    }
  }
};

inline void check_labels(const char* op, const Tensor& unary) {
  check_pictures(op, "unary", unary);
  PYDENSE_CHECK(unary.size(1) <= 65536, op, ": unary must have at most 65536 labels, got ",
                unary.size(1));
}

inline void check_same_shape(const char* op, const Tensor& q, const Tensor& unary) {
  check_pictures(op, "q", q);
  require_dtype(op, "q", q, unary.scalar_type());
  for (int64_t i = 0; i < 4; ++i) {
    PYDENSE_CHECK(q.size(i) == unary.size(i), op, ": q must have the shape of the unary, got ",
                  q.size(i), " instead of ", unary.size(i), " in dimension ", i);
  }
}

}  // namespace pydense
