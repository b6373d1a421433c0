// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/winograd.h"

#include "common/check.h"

namespace pydense {

void winograd(const char* op, const WinogradArgs& args, ParallelFor parallel_for) {
  PYDENSE_CHECK(args.tile >= 2 && args.tile <= 4, op, ": tile must be 2, 3 or 4, got ", args.tile);
  PYDENSE_CHECK(args.rate >= 1, op, ": rate must be 1 or more, got ", args.rate);
  PYDENSE_CHECK(args.images >= 0 && args.channels >= 0 && args.outputs >= 0 && args.height >= 0 &&
                    args.width >= 0,
                op, ": sizes must not be negative, got ", args.images, ", ", args.channels, ", ",
                args.outputs, ", ", args.height, " and ", args.width);
  if (args.images * args.outputs * args.height * args.width > 0) {
    select_cpu_table<WinogradTable>(PYDENSE_CPU_TABLES(kWinogradTable))
        .of[args.tile - 2](args, parallel_for);
  }
}

}  // namespace pydense
