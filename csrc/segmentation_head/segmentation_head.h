// SPDX-License-Identifier: Apache-2.0
// What stands at the end of a segmentation network, without logits of full resolution: bilinear
// upsampling (F.interpolate's, either align_corners) fused with argmax, softmax, cross-entropy, or
// the sum over sliding windows.
//
// T is the type of the arithmetic: double for double logits, float for all others. Results are
// bitwise the same for any number of threads. An image is cut into groups of source rows; a group's
// outputs are those whose upper tap lies in it.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/float_type.h"
#include "common/parallel.h"
#include "upsample/axis_table.h"

namespace pydense {

enum class IntegerType : int32_t { kUInt8, kInt8, kInt16, kInt32, kInt64 };

// An array [images, classes, height, width]; strides are in elements, any sign, also 0.
struct LogitsView {
  const void* data;
  FloatType type;
  int64_t images;
  int64_t classes;
  int64_t height;
  int64_t width;
  int64_t strides[4];
};

// The axes as CUDA kernels take them, by value: each thread works out the taps it needs.
template <class T>
struct HeadAxes {
  AxisMap<T> y;
  AxisMap<T> x;
};

constexpr int64_t kGroupRows = 4;  // source rows of a task
struct OutputRows {
  int64_t begin;
  int64_t end;
};
// The outputs of a group of source rows.
template <class T>
OutputRows rows_of_group(const AxisTable<T>& y, int64_t group);

// ---- argmax ----
// labels and confidence are contiguous [images, H, W]; confidence, the softmax of the label, may be
// null. Ties go to the first class; NaN counts as largest, as in torch.argmax. Where all taps of a
// cell are finite and have one argmax, so has the cell.
template <class T>
struct UpsampleArgmaxArgs {
  LogitsView logits;
  const AxisTable<T>* y;
  const AxisTable<T>* x;
  void* labels;
  IntegerType label_type;  // kUInt8, kInt32 or kInt64
  T* confidence;
};
template <class T>
void upsample_argmax(const UpsampleArgmaxArgs<T>& args, ParallelFor parallel_for);

// ---- softmax ----
// Forward: out is [images, classes, H, W] in the type of the logits, of any strides. Backward,
// where gradient is not null: full_gradient is such an array, and gradient, [images, classes,
// height, width] in T, contiguous or channels last, that of the logits.
template <class T>
struct UpsampleSoftmaxArgs {
  LogitsView logits;
  const AxisTable<T>* y;
  const AxisTable<T>* x;
  int64_t full_strides[4];
  void* out;
  const void* full_gradient;
  T* gradient;
  bool gradient_channels_last;
};
template <class T>
void upsample_softmax(const UpsampleSoftmaxArgs<T>& args, ParallelFor parallel_for);

// ---- accumulate ----
// out[n, c, y, x] += weight[y, x] * upsampled logits; out stands at the window's origin.
template <class T>
struct UpsampleAccumulateArgs {
  LogitsView logits;
  const AxisTable<T>* y;
  const AxisTable<T>* x;
  T* out;
  int64_t out_strides[4];
  const T* weight;
  int64_t weight_strides[2];
};
template <class T>
void upsample_accumulate(const UpsampleAccumulateArgs<T>& args, ParallelFor parallel_for);

// ---- cross-entropy ----
// With p the softmax of the upsampled logits, t the target, w the class weights, a = pixel_weight:
//   loss = a ((1 - smoothing) w_t (-log p_t) + smoothing / classes * sum_c w_c (-log p_c))
// and 0 where t is ignore_index. The gradient is that of the sum over all pixels.
template <class T>
struct CrossEntropyTerms {
  LogitsView logits;
  const void* target;  // [images, H, W]
  IntegerType target_type;
  int64_t target_strides[3];
  int64_t ignore_index;
  const T* weight;        // [classes], or null for 1
  const T* pixel_weight;  // [images, H, W], or null for 1
  int64_t pixel_weight_strides[3];
  double smoothing;
  T* loss;      // contiguous [images, H, W], or null
  T* gradient;  // [images, classes, height, width], contiguous or channels last, or null
  bool gradient_channels_last;
  bool count_correct;
};
template <class T>
struct UpsampleCrossEntropyArgs : CrossEntropyTerms<T> {
  const AxisTable<T>* y;
  const AxisTable<T>* x;
};
struct CrossEntropySums {
  double loss = 0;
  double weight = 0;    // sum of a w_t over the pixels that are not ignored
  int64_t valid = 0;    // pixels that are not ignored
  int64_t correct = 0;  // of these, those whose target has the largest logit
  bool refused = false;
  int64_t label = 0;  // a label that is no class and not ignored, where there is one
};
template <class T>
CrossEntropySums upsample_cross_entropy(const UpsampleCrossEntropyArgs<T>& args,
                                        ParallelFor parallel_for);

// One task of each, over a group of source rows of an image, and a range of columns where no two
// tasks write to one place.
struct HeadTask {
  int64_t image;
  int64_t group;
  int64_t first_column;
  int64_t columns;
};
struct UpsampleArgmaxTable {
  void (*argmax_f32)(const UpsampleArgmaxArgs<float>&, const HeadTask&);
  void (*argmax_f64)(const UpsampleArgmaxArgs<double>&, const HeadTask&);
};
struct CrossEntropyTable {
  void (*task_f32)(const UpsampleCrossEntropyArgs<float>&, const HeadTask&, CrossEntropySums&);
  void (*task_f64)(const UpsampleCrossEntropyArgs<double>&, const HeadTask&, CrossEntropySums&);
};
struct UpsampleSoftmaxTable {
  void (*softmax_f32)(const UpsampleSoftmaxArgs<float>&, const HeadTask&);
  void (*softmax_f64)(const UpsampleSoftmaxArgs<double>&, const HeadTask&);
  void (*accumulate_f32)(const UpsampleAccumulateArgs<float>&, const HeadTask&);
  void (*accumulate_f64)(const UpsampleAccumulateArgs<double>&, const HeadTask&);
};
PYDENSE_DECLARE_CPU_TABLES(UpsampleArgmaxTable, kUpsampleArgmaxTable)
PYDENSE_DECLARE_CPU_TABLES(CrossEntropyTable, kCrossEntropyTable)
PYDENSE_DECLARE_CPU_TABLES(UpsampleSoftmaxTable, kUpsampleSoftmaxTable)

}  // namespace pydense
