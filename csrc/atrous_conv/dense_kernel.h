// SPDX-License-Identifier: Apache-2.0
// A task is a piece of the outputs' pixels and a block of their channels. It goes through the taps
// and, of each, through slabs of channels: all its runs of pixels that read the tap are multiplied
// by the slab of weights, which the second-level cache holds. Its sums lie there, too.
#pragma once

#include "atrous_conv/dense_epilogue.h"
#include "atrous_conv/dense_picture.h"
#include "atrous_conv/dense_runs.h"
#include "atrous_conv/dense_weight_panels.h"
#include "common/gemm/gemm_parts.h"

namespace pydense::PYDENSE_ISA {

template <class S>
class DenseConv {
  using P = GemmOperandOf<S>;
  using T = ComputeOf<S>;
  static constexpr int64_t kColumns = kGemmColumns<P>;
  static constexpr int64_t kTaskPixels = 128;

 public:
  DenseConv(const DenseConvArgs& args, const DenseConvPlan& plan)
      : args_(args),
        panels_(args.shape),
        runs_(plan),
        picture_(args_.shape, args_.x, args_.rows),
        epilogue_(args_) {
    find_tasks();
  }

  void run(ParallelFor parallel_for) {
    picture_.prepare(parallel_for);
    const P* weights = static_cast<const P*>(args_.packed);
    Buffer packed;
    if (weights == nullptr) {
      packed = Buffer(static_cast<size_t>(panels_.bytes()));
      panels_.pack(args_.weight, packed.as<P>(), parallel_for);
      weights = packed.as<P>();
    }
    const int64_t blocks = panels_.blocks();
    parallel_tasks(parallel_for, tasks_ * blocks, [&](int64_t task) {
      const int64_t pixels = task_pixels_ * panels_.block_panels() * kColumns;
      Buffer buffer = pool_.take(
          checked_bytes(static_cast<size_t>(pixels), sizeof(T)) +
          checked_bytes(static_cast<size_t>(picture_.room(panels_.slab_depth(0))), sizeof(P)));
      T* const sums = buffer.as<T>();
      Work work = {task / blocks, task % blocks, weights, sums,
                   reinterpret_cast<P*>(sums + pixels)};
      multiply(work);
      finish(work);
      pool_.give_back(std::move(buffer));
    });
  }

 private:
  struct Work {
    int64_t task;
    int64_t block;
    const P* weights;
    T* sums;  // [panel][pixel][kColumns]
    P* room;
  };

  int64_t start(int64_t task) const { return starts_.as<int64_t>()[task]; }
  const DenseRun& run_at(int64_t i) const { return runs_[i % runs_.size()]; }
  int64_t image_of(int64_t i) const { return i / runs_.size(); }

  // Work in units of a tap of a pixel; what a pixel costs besides counts as one.
  int64_t work_of(const DenseRun& run) const { return run.count * (runs_.taps(run) + 1); }

  // Tasks of about equal work, whatever the number of threads.
  void find_tasks() {
    const int64_t all = args_.shape.batches * runs_.size();
    int64_t work = 0;
    int64_t most = 0;
    int64_t pixels = 0;
    for (int64_t i = 0; i < runs_.size(); ++i) {
      work += work_of(runs_[i]);
      pixels += runs_[i].count;
      most = larger(most, runs_.taps(runs_[i]) + 1);
    }
    work *= args_.shape.batches;
    pixels *= args_.shape.batches;
    constexpr int64_t kEven = 8;  // of any usual number of threads, none shall be idle
    tasks_ = larger(ceil_div(work, kTaskPixels * most), ceil_div(pixels, 2 * kTaskPixels));
    tasks_ = tasks_ > 2 ? ceil_div(tasks_, kEven) * kEven : tasks_;
    tasks_ = smaller(tasks_, all);
    starts_ = buffer_of<int64_t>(static_cast<size_t>(tasks_ + 1));
    int64_t task = 0;
    int64_t done = 0;
    int64_t own = 0;
    for (int64_t i = 0; i < all; ++i) {
      for (; task < tasks_ && done * tasks_ >= task * work; ++task) {
        starts_.as<int64_t>()[task] = i;
        own = 0;
      }
      done += work_of(run_at(i));
      own += run_at(i).count;
      task_pixels_ = larger(task_pixels_, own);
    }
    for (; task <= tasks_; ++task) {
      starts_.as<int64_t>()[task] = all;
    }
  }

  bool reads(int64_t i, int64_t tap) const {
    return runs_.reads(run_at(i), tap / args_.shape.kernel_width, tap % args_.shape.kernel_width);
  }
  bool is_first(int64_t i, int64_t tap) const {
    const DenseRun& run = run_at(i);
    return tap == runs_.rows(run).first * args_.shape.kernel_width + runs_.columns(run).first;
  }

  void multiply(const Work& work) const {
    for (int64_t tap = 0; tap < args_.shape.taps(); ++tap) {
      for (int64_t slab = 0; slab < panels_.slabs(); ++slab) {
        multiply_slab(work, tap, slab);
      }
    }
  }

  void multiply_slab(const Work& work, int64_t tap, int64_t slab) const {
    const DenseConvShape& shape = args_.shape;
    const int64_t down = tap / shape.kernel_width * shape.dilation_y - shape.top;
    const int64_t right = tap % shape.kernel_width * shape.dilation_x - shape.left;
    const int64_t depth = panels_.slab_depth(slab);
    const P* const weights = work.weights + panels_.place(work.block, tap, slab);
    const int64_t own_panels = panels_.panels(work.block);
    const int64_t end = start(work.task + 1);
    int64_t pixel = 0;
    for (int64_t i = start(work.task); i < end; pixel += run_at(i++).count) {
      if (!reads(i, tap)) {
        continue;
      }
      const DenseRun& run = run_at(i);
      const auto rows =
          picture_.read(image_of(i), run.y + down, run.x + right, run.count, run.vertical != 0,
                        panels_.first_channel(slab), depth, work.room);
      const bool more = slab > 0 || !is_first(i, tap);
      for (int64_t p = 0; p < own_panels; ++p) {
        gemm_rows_in_parts<P, false>(
            run.count, depth, rows.first, rows.pitch, weights + p * depth * kColumns,
            work.sums + (p * task_pixels_ + pixel) * kColumns, kColumns, more);
      }
    }
  }

  void finish(const Work& work) const {
    const int64_t first = work.block * panels_.block_panels() * kColumns;
    int64_t pixel = 0;
    for (int64_t i = start(work.task); i < start(work.task + 1); pixel += run_at(i++).count) {
      const DenseRun& run = run_at(i);
      for (int64_t p = 0; p < panels_.panels(work.block); ++p) {
        T* const sums = work.sums + (p * task_pixels_ + pixel) * kColumns;
        if (runs_.taps(run) == 0) {
          std::memset(sums, 0, static_cast<size_t>(run.count * kColumns) * sizeof(T));
        }
        epilogue_.write(sums, run.count, image_of(i), first + p * kColumns, run.y, run.x,
                        run.vertical != 0);
      }
    }
  }

  const DenseConvArgs& args_;
  WeightPanels<S> panels_;
  DenseRuns runs_;
  PictureRows<S> picture_;
  DenseEpilogue<S> epilogue_;
  int64_t tasks_ = 0;
  int64_t task_pixels_ = 0;  // of one, at most
  Buffer starts_;            // of tasks: runs of all pictures
  BufferPool pool_;
};

}  // namespace pydense::PYDENSE_ISA
