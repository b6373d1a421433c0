// SPDX-License-Identifier: Apache-2.0
// Memory that the next piece of work reads, line by line: to be asked for little by little while
// the present one computes.
#pragma once

#include <cstdint>

#include "common/hd.h"
#include "common/isa_namespace.h"

namespace pydense::PYDENSE_ISA {

// outer x inner runs of `bytes` each, strides in bytes of any sign. None where `bytes` is 0.
class LinesAhead {
 public:
  LinesAhead() = default;
  LinesAhead(const void* from, int64_t bytes, int64_t inner, int64_t inner_stride, int64_t outer,
             int64_t outer_stride)
      : from_(static_cast<const char*>(from)),
        lines_((bytes + kLine - 1) / kLine),
        inner_(inner),
        inner_stride_(inner_stride),
        outer_(bytes > 0 ? outer : 0),
        outer_stride_(outer_stride),
        run_(from_) {}

  int64_t lines() const { return lines_ * inner_ * outer_; }

  // Calls fn(address) for the next `lines` lines.
  template <class Fn>
  void next(int64_t lines, const Fn& fn) {
    for (; lines > 0 && outer_ > 0; --lines) {
      fn(run_ + line_ * kLine);
      if (++line_ == lines_) {
        line_ = 0;
        run_ += inner_stride_;
        if (++index_ == inner_) {
          index_ = 0;
          --outer_;
          from_ += outer_stride_;
          run_ = from_;
        }
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* from_ = nullptr;
  int64_t lines_ = 0;  // of a run
  int64_t inner_ = 0;
  int64_t inner_stride_ = 0;
  int64_t outer_ = 0;  // that are left
  int64_t outer_stride_ = 0;
  const char* run_ = nullptr;
  int64_t index_ = 0;
  int64_t line_ = 0;
};

}  // namespace pydense::PYDENSE_ISA
