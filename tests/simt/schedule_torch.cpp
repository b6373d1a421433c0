// SPDX-License-Identifier: Apache-2.0
// What Python tests ask of the shim beyond the operators themselves.
#include "planted_kernels.cuh"
#include "torch/tensor.h"

namespace pydense {
namespace {

// 0: threads and blocks in order, 1: in reverse order, others: in a random order by seed.
void set_schedule(int64_t seed) {
  simt::config().seed = 1 + static_cast<uint64_t>(seed);
  simt::config().order = seed == 0   ? simt::Order::kForward
                         : seed == 1 ? simt::Order::kReverse
                                     : simt::Order::kRandom;
}

// A kernel with shared memory, which lies elsewhere in a library than in a program. With a mistake
// it reads shared memory that nobody wrote.
Tensor log_sum_exp(const Tensor& x, bool mistake) {
  require_dtype("_log_sum_exp", "x", x, torch::headeronly::ScalarType::Float);
  const Tensor rows = as_contiguous(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0)});
  const auto run = mistake ? planted::run_log_sum_exp<planted::kUninitialisedShared>
                           : planted::run_log_sum_exp<planted::kNone>;
  run(rows.const_data_ptr<float>(), y.mutable_data_ptr<float>(), static_cast<int>(x.size(0)),
      static_cast<int>(x.size(1)), 128);
  return y;
}

int64_t launches() { return static_cast<int64_t>(simt::stats().launches); }

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("_set_schedule(int seed) -> ()");
  m.def("_launches() -> int");
  m.def("_log_sum_exp(Tensor x, bool mistake) -> Tensor");
}
PYDENSE_TORCH_ANY(m) {
  m.impl("_set_schedule", TORCH_BOX(&pydense::set_schedule));
  m.impl("_launches", TORCH_BOX(&pydense::launches));
  m.impl("_log_sum_exp", TORCH_BOX(&pydense::log_sum_exp));
}
