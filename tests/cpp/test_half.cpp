// SPDX-License-Identifier: Apache-2.0
// 16-bit numbers, all of them: against their definition, and rounding to nearest even.
#include <cmath>
#include <limits>

#include "common/half.h"
#include "testing.h"

using namespace pydense;  // NOLINT(google-build-using-namespace)

namespace {

template <class S, class Reference>
void test_16_bit(const Reference& reference) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const S value = {static_cast<uint16_t>(bits)};
    const double exact = reference(static_cast<int>(bits));
    const auto wide = portable::load_as<float>(&value);
    EXPECT(std::isnan(exact) ? std::isnan(wide) : static_cast<double>(wide) == exact);
    EXPECT(std::signbit(wide) == (bits >= 0x8000));
    S back = {0};
    portable::store_as(&back, wide);
    EXPECT(std::isnan(wide) ? std::isnan(portable::load_as<float>(&back)) : back.bits == bits);
    // Half way to the next number, rounding goes to the even one; beside it, to the nearer one.
    if (!std::isfinite(wide) || (bits & 0x7FFF) == 0) {
      continue;
    }
    const double next = reference(static_cast<int>(bits + 1));
    if (std::isfinite(next)) {
      const auto middle = static_cast<float>((exact + next) / 2);
      portable::store_as(&back, middle);
      EXPECT(back.bits == bits + (bits & 1));
      portable::store_as(&back, std::nextafter(middle, wide));
      EXPECT(back.bits == bits);
    }
  }
}

double half_value(int bits) {
  const int exponent = (bits >> 10) & 31;
  const double mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}
double bfloat16_value(int bits) {
  const int exponent = (bits >> 7) & 255;
  const double mantissa = bits & 127;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 255) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134));
}

// Vectors convert as scalars do.
template <class S>
void test_vectors() {
  using V = portable::FloatVec<8>;
  for (uint32_t bits = 0; bits < 65536; bits += 8) {
    S values[8];
    for (uint32_t i = 0; i < 8; ++i) {
      values[i] = {static_cast<uint16_t>(bits + i)};
    }
    const V wide = portable::load_as<V>(values);
    S back[8];
    portable::store_as(back, wide * 1.0009765F);
    for (int i = 0; i < 8; ++i) {
      const auto single = portable::load_as<float>(values + i);
      EXPECT(std::isnan(single) ? std::isnan(wide[i]) : wide[i] == single);
      S expected;
      portable::store_as(&expected, single * 1.0009765F);
      EXPECT(back[i].bits == expected.bits);
    }
  }
}

}  // namespace

int main() {
  test_16_bit<Half>(half_value);
  test_16_bit<BFloat16>(bfloat16_value);
  test_vectors<Half>();
  test_vectors<BFloat16>();
  return testing::report("half");
}
