// SPDX-License-Identifier: Apache-2.0
#include "common/build_info.h"

namespace pydense {

const BuildInfo& build_info() {
  static constexpr BuildInfo kInfo = {PYDENSE_VERSION, PYDENSE_COMPILER, PYDENSE_BUILD_TYPE,
                                      PYDENSE_CUDA_ARCHITECTURES_TEXT, PYDENSE_CUDA_TOOLKIT};
  return kInfo;
}

}  // namespace pydense
