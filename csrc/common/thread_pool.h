// SPDX-License-Identifier: Apache-2.0
// The NumPy door's own threads: sleeping while idle, no OpenMP runtime, safe after fork.
#pragma once

#include "common/parallel.h"

namespace pydense {

// Number of threads a parallel region may use, the caller's own included. Starts at the number of
// CPUs the process may run on, or PYDENSE_NUM_THREADS.
int get_num_threads();
void set_num_threads(int64_t n);  // std::invalid_argument unless 1 <= n <= 1024

// ParallelFor on the pool. Nested calls, calls while another thread holds the pool, and calls in a
// forked child run serially in the caller.
void pool_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn);

}  // namespace pydense
