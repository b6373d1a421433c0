// SPDX-License-Identifier: Apache-2.0
#include "segmentation_head/segmentation_head.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/check.h"

namespace pydense {
namespace {

// Columns of a task, where tasks may be side by side: enough that the sources two of them share are
// few.
constexpr int64_t kTaskColumns = 512;

template <class T>
void check_logits(const char* op, const LogitsView& logits, const AxisTable<T>& y,
                  const AxisTable<T>& x) {
  PYDENSE_CHECK(logits.images >= 0, op, ": logits must have a size of at least 0, got ",
                logits.images, " images");
  PYDENSE_CHECK(logits.classes >= 1 && logits.classes <= std::numeric_limits<int32_t>::max(), op,
                ": logits must have 1 to 2^31 - 1 classes, got ", logits.classes);
  PYDENSE_CHECK(logits.height == y.in_size && logits.width == x.in_size, op,
                ": logits must have the size of the axes, got ", logits.height, " x ",
                logits.width);
  PYDENSE_CHECK((logits.type == FloatType::kFloat64) == (sizeof(T) == 8), op,
                ": logits must be float64 for arithmetic in double, and only then");
}

// Calls task(HeadTask) for all groups of source rows of all images, columns in pieces.
template <class Task>
void for_each_task(int64_t images, int64_t source_rows, int64_t columns, int64_t step,
                   ParallelFor parallel_for, const Task& task) {
  const int64_t groups = ceil_div(source_rows, kGroupRows);
  const int64_t pieces = ceil_div(columns, step);
  parallel_tasks(parallel_for, images * groups * pieces, [&](int64_t i) {
    const int64_t first = i % pieces * step;
    task(
        HeadTask{i / pieces / groups, i / pieces % groups, first, std::min(step, columns - first)});
  });
}

}  // namespace

template <class T>
OutputRows rows_of_group(const AxisTable<T>& y, int64_t group) {
  const int32_t* begin = y.i0;
  const int32_t* end = begin + y.size;
  const auto at = [&](int64_t row) { return std::lower_bound(begin, end, row) - begin; };
  return {at(group * kGroupRows), at((group + 1) * kGroupRows)};
}

template <class T>
void upsample_argmax(const UpsampleArgmaxArgs<T>& args, ParallelFor parallel_for) {
  constexpr const char* kOp = "upsample_argmax";
  check_logits(kOp, args.logits, *args.y, *args.x);
  PYDENSE_CHECK(args.label_type == IntegerType::kUInt8 || args.label_type == IntegerType::kInt32 ||
                    args.label_type == IntegerType::kInt64,
                kOp, ": labels must be uint8, int32 or int64");
  PYDENSE_CHECK(args.label_type != IntegerType::kUInt8 || args.logits.classes <= 256, kOp,
                ": dtype must hold ", args.logits.classes, " classes, got uint8");
  const UpsampleArgmaxTable& table =
      select_cpu_table<UpsampleArgmaxTable>(PYDENSE_CPU_TABLES(kUpsampleArgmaxTable));
  for_each_task(args.logits.images, args.logits.height, args.x->size, kTaskColumns, parallel_for,
                [&](const HeadTask& task) {
                  if constexpr (std::is_same_v<T, float>) {
                    table.argmax_f32(args, task);
                  } else {
                    table.argmax_f64(args, task);
                  }
                });
}

// Calls task(image, group) for all groups of source rows of all images. Where they write a
// gradient, neighbours add to a source row that both touch: first the even groups, then the others.
template <class Task>
void for_each_group(int64_t images, int64_t source_rows, bool gradient, ParallelFor parallel_for,
                    const Task& task) {
  const int64_t groups = ceil_div(source_rows, kGroupRows);
  const int64_t phases = gradient && groups > 1 ? 2 : 1;
  for (int64_t phase = 0; phase < phases; ++phase) {
    const int64_t in_phase = ceil_div(groups - phase, phases);
    parallel_tasks(parallel_for, images * in_phase,
                   [&](int64_t i) { task(i / in_phase, i % in_phase * phases + phase); });
  }
}

template <class T>
CrossEntropySums upsample_cross_entropy(const UpsampleCrossEntropyArgs<T>& args,
                                        ParallelFor parallel_for) {
  constexpr const char* kOp = "upsample_cross_entropy";
  check_logits(kOp, args.logits, *args.y, *args.x);
  PYDENSE_CHECK(args.smoothing >= 0 && args.smoothing <= 1, kOp,
                ": label_smoothing must be in [0, 1], got ", args.smoothing);
  const CrossEntropyTable& table =
      select_cpu_table<CrossEntropyTable>(PYDENSE_CPU_TABLES(kCrossEntropyTable));
  const int64_t groups = ceil_div(args.logits.height, kGroupRows);
  std::vector<CrossEntropySums> sums(static_cast<size_t>(args.logits.images * groups));
  for_each_group(args.logits.images, args.logits.height, args.gradient != nullptr, parallel_for,
                 [&](int64_t image, int64_t group) {
                   const HeadTask task = {image, group, 0, args.x->size};
                   CrossEntropySums& sum = sums[static_cast<size_t>(image * groups + group)];
                   if constexpr (std::is_same_v<T, float>) {
                     table.task_f32(args, task, sum);
                   } else {
                     table.task_f64(args, task, sum);
                   }
                 });
  CrossEntropySums total;
  for (const CrossEntropySums& sum : sums) {
    total.loss += sum.loss;
    total.weight += sum.weight;
    total.valid += sum.valid;
    total.correct += sum.correct;
    if (sum.refused && !total.refused) {
      total.refused = true;
      total.label = sum.label;
    }
  }
  PYDENSE_CHECK(!total.refused, kOp, ": target must be in [0, ", args.logits.classes,
                ") or ignore_index ", args.ignore_index, ", got ", total.label);
  return total;
}

template <class T>
void upsample_softmax(const UpsampleSoftmaxArgs<T>& args, ParallelFor parallel_for) {
  check_logits("upsample_softmax", args.logits, *args.y, *args.x);
  const UpsampleSoftmaxTable& table =
      select_cpu_table<UpsampleSoftmaxTable>(PYDENSE_CPU_TABLES(kUpsampleSoftmaxTable));
  for_each_group(args.logits.images, args.logits.height, args.gradient != nullptr, parallel_for,
                 [&](int64_t image, int64_t group) {
                   const HeadTask task = {image, group, 0, args.x->size};
                   if constexpr (std::is_same_v<T, float>) {
                     table.softmax_f32(args, task);
                   } else {
                     table.softmax_f64(args, task);
                   }
                 });
}

template <class T>
void upsample_accumulate(const UpsampleAccumulateArgs<T>& args, ParallelFor parallel_for) {
  check_logits("upsample_accumulate", args.logits, *args.y, *args.x);
  const UpsampleSoftmaxTable& table =
      select_cpu_table<UpsampleSoftmaxTable>(PYDENSE_CPU_TABLES(kUpsampleSoftmaxTable));
  for_each_task(args.logits.images, args.logits.height, args.x->size, kTaskColumns, parallel_for,
                [&](const HeadTask& task) {
                  if constexpr (std::is_same_v<T, float>) {
                    table.accumulate_f32(args, task);
                  } else {
                    table.accumulate_f64(args, task);
                  }
                });
}

template OutputRows rows_of_group(const AxisTable<float>&, int64_t);
template OutputRows rows_of_group(const AxisTable<double>&, int64_t);
template void upsample_argmax(const UpsampleArgmaxArgs<float>&, ParallelFor);
template void upsample_argmax(const UpsampleArgmaxArgs<double>&, ParallelFor);
template CrossEntropySums upsample_cross_entropy(const UpsampleCrossEntropyArgs<float>&,
                                                 ParallelFor);
template CrossEntropySums upsample_cross_entropy(const UpsampleCrossEntropyArgs<double>&,
                                                 ParallelFor);
template void upsample_softmax(const UpsampleSoftmaxArgs<float>&, ParallelFor);
template void upsample_softmax(const UpsampleSoftmaxArgs<double>&, ParallelFor);
template void upsample_accumulate(const UpsampleAccumulateArgs<float>&, ParallelFor);
template void upsample_accumulate(const UpsampleAccumulateArgs<double>&, ParallelFor);

}  // namespace pydense
