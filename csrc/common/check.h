// SPDX-License-Identifier: Apache-2.0
// The one way the core refuses an argument: std::invalid_argument, which Python sees as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace pydense {

template <class... Parts>
[[noreturn]] void throw_invalid_argument(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace pydense

// PYDENSE_CHECK(ok, "op: name must ..., got ", value). The message holds no file name or line, so
// no build path can reach a user.
#define PYDENSE_CHECK(condition, ...)                 \
  do {                                                \
    if (!(condition)) [[unlikely]] {                  \
      ::pydense::throw_invalid_argument(__VA_ARGS__); \
    }                                                 \
  } while (false)
