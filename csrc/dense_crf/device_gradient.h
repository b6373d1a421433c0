// SPDX-License-Identifier: Apache-2.0
// Derivatives on a GPU, as mean_field.h and feature_gradient.h have them for the CPU.
#pragma once

#include "dense_crf/device_lattice.h"

namespace pydense {

template <class T>
struct DeviceGradientArgs {
  int64_t batch;
  int64_t labels;
  int64_t points;
  const DeviceTerm<T>* terms;
  int num_terms;
  int iterations;
  bool energies;
  DeviceArray<const T> grad;    // of the result: probabilities or logits
  DeviceArray<const T> result;  // the probabilities; data null where the result is logits
  DeviceSteps<T> kept;          // Q_0 to Q_(iterations - 1)
  DeviceSteps<T> steps;         // gets dL/dlogits of steps 1 to iterations, or null
  DeviceArray<T> unary;         // gets dL/dunary
  DeviceArray<T> q;             // gets dL/dQ_0 where the field started from a given one, or null
  // [terms] get dL/dcompat in the shape of the compatibility; left alone without iterations.
  T* const* compats;
};
template <class T>
size_t mean_field_gradient_workspace(const DeviceGradientArgs<T>& args);
template <class T>
void mean_field_gradient_cuda(const DeviceGradientArgs<T>& args, void* workspace, int device,
                              void* stream);

// dL/dfeatures of L = sum a^T K b.
template <class T>
struct DeviceFeatureGradientArgs {
  DeviceLattice<T> lattice;
  int64_t batch;
  int64_t channels;
  DeviceArray<const T> features;  // [images of the lattice, dims, points]
  DeviceArray<const T> a;         // [batch, channels, points]
  DeviceArray<const T> b;
  const T* compat;  // where it is not null, C^T a takes the place of a
  Compatibility kind;
  bool of_lattice;  // the derivative of the lattice itself; only with its self term
  T* out;           // [images of the lattice, dims, points]
};
template <class T>
size_t feature_gradient_workspace(const DeviceFeatureGradientArgs<T>& args);
template <class T>
void feature_gradient_cuda(const DeviceFeatureGradientArgs<T>& args, void* workspace, int device,
                           void* stream);

}  // namespace pydense
