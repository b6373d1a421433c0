// SPDX-License-Identifier: Apache-2.0
// What Python tests ask of the shim beyond the operators themselves.
#include "simt.h"
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

int64_t launches() { return static_cast<int64_t>(simt::stats().launches); }

}  // namespace
}  // namespace pydense

PYDENSE_TORCH_SCHEMAS(m) {
  m.def("_set_schedule(int seed) -> ()");
  m.def("_launches() -> int");
}
PYDENSE_TORCH_ANY(m) {
  m.impl("_set_schedule", TORCH_BOX(&pydense::set_schedule));
  m.impl("_launches", TORCH_BOX(&pydense::launches));
}
