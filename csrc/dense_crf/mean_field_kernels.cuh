// SPDX-License-Identifier: Apache-2.0
// One update of all points: slice every kernel, apply the compatibility, add the unary, softmax;
// and a step back through the softmax. A power of 2 of lanes has a point, and each lane 16 bytes of
// its row, in registers up to 32 lanes; longer rows go through memory. Messages through matrices
// are sliced alone, and products of their own (label_kernels.cuh).
#pragma once

#include "common/cuda.cuh"
#include "dense_crf/device_lattice.h"
#include "dense_crf/lattice_filter_kernels.cuh"

namespace pydense {

constexpr int kFieldThreads = 128;
constexpr int kFieldTerms = 4;  // of one launch

template <class T>
struct FieldTerm {
  const T* rows;  // [copies, capacity, width] blurred
  const int32_t* ids;
  const T* weights;
  const T* norm;    // [all points], or null for 1
  const T* self;    // [all points], or null
  const T* compat;  // null for 1
  T scale;
  Compatibility kind;
  int corners;
  int64_t all_points;  // of the lattice
  int64_t capacity;
};

template <class T>
struct FieldParams {
  FieldTerm<T> terms[kFieldTerms];
  int num_terms;
  MeanFieldOutput kind;
  int lanes;  // of a point
  int vectors;
  int64_t labels;
  int64_t points;  // of all images of the batch
  const T* base;   // [points, width] what messages are added to, or null for 0
  const T* q;      // [points, width], where a term takes out a point's own share
  T* z;            // [points, width], for rows of more than 32 vectors
  T* out;          // [points, width], may be q
  int64_t* labels_out;
};

// Where a point is in a term's lattice.
template <class T>
struct FieldPlace {
  int64_t point;
  const T* rows;
  T factor;
  T own;  // what of Q is to be taken out
};

template <class T>
__device__ __forceinline__ FieldPlace<T> place_in(const FieldTerm<T>& term, int64_t point,
                                                  int64_t width) {
  FieldPlace<T> place;
  const int64_t copy = point / term.all_points;
  place.point = point - copy * term.all_points;
  place.rows = term.rows + copy * term.capacity * width;
  const T weight =
      term.kind == Compatibility::kPotts && term.compat != nullptr ? *term.compat : T{1};
  place.factor = weight * term.scale;
  if (term.norm != nullptr) {
    place.factor *= term.norm[place.point];
  }
  place.own = term.self == nullptr ? T{} : term.self[place.point] * weight;
  return place;
}

// A vector of a point's message, before a diagonal is applied.
template <class T>
__device__ __forceinline__ RowVector<T> slice_vector(const FieldTerm<T>& term,
                                                     const FieldPlace<T>& place, const T* q,
                                                     int64_t width, int64_t at) {
  RowVector<T> sliced = row_zero<T>();
  int64_t corner = place.point;
  for (int r = 0; r < term.corners; ++r, corner += term.all_points) {
    const T* const row = place.rows + term.ids[corner] * width + at;
    add_scaled(sliced, term.weights[corner], load_vector<kRowVector<T>>(row));
  }
  RowVector<T> message = row_zero<T>();
  add_scaled(message, place.factor, sliced);
  if (term.self != nullptr) {
    add_scaled(message, -place.own, load_vector<kRowVector<T>>(q + at));
  }
  return message;
}

// z += C message at `at`, for one value or a diagonal.
template <class T>
__device__ __forceinline__ void add_message(const FieldTerm<T>& term, const RowVector<T>& message,
                                            int64_t labels, int64_t at, RowVector<T>& z) {
#pragma unroll
  for (int k = 0; k < kRowVector<T>; ++k) {
    if (term.kind == Compatibility::kPotts) {
      z[k] += message[k];
    } else if (at + k < labels) {
      z[k] = fma(message[k], term.compat[at + k], z[k]);
    }
  }
}

// The largest of a point's logits and, of equal ones, the lowest label.
template <class T>
struct Best {
  T value;
  int label;
};

template <class T>
__device__ __forceinline__ Best<T> best_of(const RowVector<T>& z, int64_t at, Best<T> best) {
#pragma unroll
  for (int k = 0; k < kRowVector<T>; ++k) {
    if (z[k] > best.value) {
      best = {z[k], static_cast<int>(at) + k};
    }
  }
  return best;
}

template <class T>
__device__ __forceinline__ Best<T> best_of_lanes(Best<T> best, int lanes) {
  for (int by = lanes / 2; by > 0; by /= 2) {
    const T value = __shfl_xor_sync(0xFFFFFFFFU, best.value, by);
    const int label = __shfl_xor_sync(0xFFFFFFFFU, best.label, by);
    if (value > best.value || (value == best.value && label < best.label)) {
      best = {value, label};
    }
  }
  return best;
}

template <class T>
__device__ __forceinline__ T sum_of_lanes(T sum, int lanes) {
  for (int by = lanes / 2; by > 0; by /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFU, sum, by);
  }
  return sum;
}

// exp(z - top), and its sum.
template <class T>
__device__ __forceinline__ T powers_of(RowVector<T>& z, T top) {
  T sum{};
#pragma unroll
  for (int k = 0; k < kRowVector<T>; ++k) {
    z[k] = exp(z[k] - top);
    sum += z[k];
  }
  return sum;
}

// kShort: a lane has one vector at most, in registers.
template <class T, bool kShort>
__global__ void __launch_bounds__(kFieldThreads)
    mean_field_update_kernel(const __grid_constant__ FieldParams<T> p) {
  constexpr int kVector = kRowVector<T>;
  const int64_t thread = int64_t{blockIdx.x} * kFieldThreads + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t point = thread / p.lanes;
  const bool inside = point < p.points;
  const int64_t width = int64_t{p.vectors} * kVector;
  const int64_t row = (inside ? point : 0) * width;
  const int last = inside ? p.vectors : 0;  // lanes without a point take part in the sums alone
  RowVector<T> kept = row_zero<T>();
  // fn(where in the row, z) for the vectors of this lane; z stays.
  const auto for_each_vector = [&](const auto& fn) {
    if constexpr (kShort) {
      if (lane < last) {
        fn(int64_t{lane} * kVector, kept);
      }
    } else {
      for (int v = lane; v < last; v += p.lanes) {
        const int64_t at = int64_t{v} * kVector;
        RowVector<T> z = load_vector<kVector>(p.z + row + at);
        fn(at, z);
        store_vector(p.z + row + at, z);
      }
    }
  };
  if constexpr (!kShort) {  // z is made here
    for (int v = lane; v < last; v += p.lanes) {
      const int64_t at = row + int64_t{v} * kVector;
      store_vector(p.z + at, p.base == nullptr ? row_zero<T>() : load_vector<kVector>(p.base + at));
    }
  } else if (lane < last && p.base != nullptr) {
    kept = load_vector<kVector>(p.base + row + int64_t{lane} * kVector);
  }
  for (int k = 0; k < p.num_terms; ++k) {
    const FieldTerm<T>& term = p.terms[k];
    const FieldPlace<T> place = place_in(term, inside ? point : 0, width);
    for_each_vector([&](int64_t at, RowVector<T>& z) {
      const RowVector<T> message =
          slice_vector(term, place, p.q == nullptr ? nullptr : p.q + row, width, at);
      add_message(term, message, p.labels, at, z);
    });
  }
  if (p.kind == MeanFieldOutput::kLogits) {
    for_each_vector([&](int64_t at, RowVector<T>& z) { store_vector(p.out + row + at, z); });
    return;
  }
  Best<T> best = {-INFINITY, 0};
  for_each_vector([&](int64_t at, RowVector<T>& z) { best = best_of(z, at, best); });
  best = best_of_lanes(best, p.lanes);
  T sum{};
  for_each_vector([&](int64_t /*at*/, RowVector<T>& z) { sum += powers_of(z, best.value); });
  sum = sum_of_lanes(sum, p.lanes);
  if (p.kind == MeanFieldOutput::kLabels) {
    if (inside && lane == 0) {
      // The largest term is e^0; a NaN or infinity anywhere breaks one of the two.
      const bool finite = sum >= T{1} && sum <= static_cast<T>(p.labels) * static_cast<T>(1.001);
      p.labels_out[point] = finite ? best.label : -1;
    }
    return;
  }
  const T inverse = T{1} / sum;
  for_each_vector([&](int64_t at, RowVector<T>& z) {
    RowVector<T> q;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      q[i] = z[i] * inverse;
    }
    store_vector(p.out + row + at, q);
  });
}

template <class T>
struct FieldGradientParams {
  int lanes;  // of a point
  int vectors;
  int64_t points;
  const T* grad;  // [points, width] G = dL/dQ or, without q, dL/dZ
  const T* q;     // [points, width], or null
  bool first;     // nothing is in the total yet
  T* total;       // [points, width] gets dL/dZ added
  T* step;        // [points, width] gets dL/dZ, or null
};

// dL/dZ = Q (G - <G, Q>).
template <class T>
__global__ void __launch_bounds__(kFieldThreads)
    mean_field_gradient_kernel(const FieldGradientParams<T> p) {
  constexpr int kVector = kRowVector<T>;
  const int64_t thread = int64_t{blockIdx.x} * kFieldThreads + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const int64_t point = thread / p.lanes;
  const bool inside = point < p.points;
  const int64_t row = (inside ? point : 0) * p.vectors * kVector;
  const int last = inside ? p.vectors : 0;
  T mean{};
  for (int v = lane; p.q != nullptr && v < last; v += p.lanes) {
    const int64_t at = row + int64_t{v} * kVector;
    const RowVector<T> grad = load_vector<kVector>(p.grad + at);
    const RowVector<T> q = load_vector<kVector>(p.q + at);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      mean = fma(grad[k], q[k], mean);
    }
  }
  mean = sum_of_lanes(mean, p.lanes);
  for (int v = lane; v < last; v += p.lanes) {
    const int64_t at = row + int64_t{v} * kVector;
    RowVector<T> step = load_vector<kVector>(p.grad + at);
    if (p.q != nullptr) {
      const RowVector<T> q = load_vector<kVector>(p.q + at);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        step[k] = (step[k] - mean) * q[k];
      }
    }
    RowVector<T> total = step;
    if (!p.first) {
      add_scaled(total, T{1}, load_vector<kVector>(p.total + at));
    }
    store_vector(p.total + at, total);
    if (p.step != nullptr) {
      store_vector(p.step + at, step);
    }
  }
}

}  // namespace pydense
