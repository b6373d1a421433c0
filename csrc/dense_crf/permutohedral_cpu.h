// SPDX-License-Identifier: Apache-2.0
// What the per-ISA units of the lattice share.
#pragma once

#include <new>
#include <utility>

#include "common/buffer.h"
#include "common/isa_namespace.h"
#include "common/parallel.h"
#include "common/with_constant.h"
#include "dense_crf/permutohedral.h"

namespace pydense::PYDENSE_ISA {

constexpr int64_t kVertexChunk = 2048;  // vertices per task

// `count` objects, each made by the task that fills it.
template <class T>
class TaskArray {
 public:
  explicit TaskArray(int64_t count)
      : items_(buffer_of<T>(static_cast<size_t>(count))),
        made_(buffer_of<bool>(static_cast<size_t>(count))),
        count_(count) {
    for (int64_t i = 0; i < count; ++i) {
      made_.as<bool>()[i] = false;
    }
  }
  TaskArray(const TaskArray&) = delete;
  TaskArray& operator=(const TaskArray&) = delete;
  ~TaskArray() {
    for (int64_t i = 0; i < count_; ++i) {
      if (made_.as<bool>()[i]) {
        items_.as<T>()[i].~T();
      }
    }
  }
  template <class... Args>
  T* emplace(int64_t i, Args&&... args) {
    T* item = new (items_.as<T>() + i) T(std::forward<Args>(args)...);
    made_.as<bool>()[i] = true;
    return item;
  }
  const T& operator[](int64_t i) const { return items_.as<T>()[i]; }

 private:
  Buffer items_;
  Buffer made_;
  int64_t count_;
};

// Splat of ones, merge, blur, slice: K 1 without `scale` and normalisation.
template <class T>
void lattice_mass(const LatticeView<T>& lattice, T* mass /* [num_points] */,
                  ParallelFor parallel_for);

void build_lattice_cpu(const LatticeFeatures<float>& features, const LatticeOptions& options,
                       const ByteSink& sink, ParallelFor parallel_for);
void build_lattice_cpu(const LatticeFeatures<double>& features, const LatticeOptions& options,
                       const ByteSink& sink, ParallelFor parallel_for);
template <class T>
void filter_lattice_cpu(const FilterArgs<T>& args, ParallelFor parallel_for);
template <class T>
void merge_and_blur_cpu(const LatticeRows<T>& rows, bool reverse, ParallelFor parallel_for);

}  // namespace pydense::PYDENSE_ISA
