// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "crf_lattices.h"
#include "dense_crf/device_gradient.h"

namespace crf_lattices {

// A training step: what is kept, and where the gradients go.
template <class T>
struct Training {
  int64_t batch;
  int64_t labels;
  int64_t points;
  int iterations;
  bool logits;  // are the result
  bool start;   // from given marginals
  simt::Buffer<T> unary;
  simt::Buffer<T> q;
  simt::Buffer<T> grad;
  simt::Buffer<T> result;
  simt::Buffer<T> kept;
  simt::Buffer<T> steps;
  simt::Buffer<T> by_unary;
  simt::Buffer<T> by_q;

  Training(int64_t images, int64_t count, int64_t of_image, int updates, bool of_logits, bool given)
      : batch(images),
        labels(count),
        points(of_image),
        iterations(updates),
        logits(of_logits),
        start(given),
        unary(all(), "unary"),
        q(given ? all() : 0, "q"),
        grad(all(), "grad"),
        result(all(), "result"),
        kept(rows(), "kept"),
        steps(rows(), "steps"),
        by_unary(all(), "gradient by the unary"),
        by_q(given ? all() : 0, "gradient by q") {
    simt::fill(unary, 4, 2);
    simt::fill(grad, 7);
    for (T& x : q) {
      x = T{1} / static_cast<T>(labels);
    }
  }

  size_t all() const { return static_cast<size_t>(batch * labels * points); }
  size_t rows() const {
    return static_cast<size_t>(batch * iterations * points * pydense::step_width(labels));
  }
  DeviceArray<const T> source(const simt::Buffer<T>& from) const {
    return {from.size() == 0 ? nullptr : from.data(), {labels * points, points, 1}};
  }
  DeviceArray<T> target(simt::Buffer<T>& to) const {
    return {to.size() == 0 ? nullptr : to.data(), {labels * points, 1, labels}};
  }
  pydense::DeviceSteps<T> steps_in(simt::Buffer<T>& rows) const {
    return {rows.size() == 0 ? nullptr : rows.data(), iterations, pydense::step_width(labels)};
  }

  void forward(const std::vector<pydense::DeviceTerm<T>>& terms) {
    pydense::DeviceMeanFieldArgs<T> args{};
    args.batch = batch;
    args.labels = labels;
    args.points = points;
    args.terms = terms.data();
    args.num_terms = static_cast<int>(terms.size());
    args.unary = source(unary);
    args.energies = true;
    args.q = source(q);
    args.iterations = iterations;
    args.kind = logits ? MeanFieldOutput::kLogits : MeanFieldOutput::kProbabilities;
    args.out = {result.data(), {labels * points, points, 1}};
    args.kept = steps_in(kept);
    const auto workspace = bytes_of(pydense::mean_field_workspace(args), "workspace");
    pydense::mean_field_cuda(args, workspace->data(), 0, nullptr);
  }

  void backward(const std::vector<pydense::DeviceTerm<T>>& terms, T* const* compats, bool keep) {
    pydense::DeviceGradientArgs<T> args{};
    args.batch = batch;
    args.labels = labels;
    args.points = points;
    args.terms = terms.data();
    args.num_terms = static_cast<int>(terms.size());
    args.iterations = iterations;
    args.energies = true;
    args.grad = source(grad);
    if (!logits) {
      args.result = source(result);
    }
    args.kept = steps_in(kept);
    if (keep) {
      args.steps = steps_in(steps);
    }
    args.unary = target(by_unary);
    args.q = target(by_q);
    args.compats = compats;
    const auto workspace = bytes_of(pydense::mean_field_gradient_workspace(args), "workspace");
    pydense::mean_field_gradient_cuda(args, workspace->data(), 0, nullptr);
  }
};

}  // namespace crf_lattices
