// SPDX-License-Identifier: Apache-2.0
#include "atrous_conv/winograd_kernel.h"

namespace pydense::PYDENSE_ISA {
namespace {

template <int M>
void run(const WinogradArgs& args, ParallelFor parallel_for) {
  if (args.channels_last) {
    WinogradTiles<M>(args).run(parallel_for);
    return;
  }
  const int64_t pixels = args.height * args.width;
  const Buffer x = buffer_of<float>(static_cast<size_t>(args.images * args.channels * pixels));
  const Buffer out = buffer_of<float>(static_cast<size_t>(args.images * args.outputs * pixels));
  WinogradArgs last = args;
  last.x = x.as<float>();
  last.out = out.as<float>();
  transpose_planes(args.images, args.channels, pixels, args.x, x.as<float>(), parallel_for);
  WinogradTiles<M>(last).run(parallel_for);
  transpose_planes(args.images, pixels, args.outputs, out.as<float>(), args.out, parallel_for);
}

}  // namespace

extern const WinogradTable kWinogradTable;
const WinogradTable kWinogradTable = {{run<2>, run<3>, run<4>}};

}  // namespace pydense::PYDENSE_ISA
