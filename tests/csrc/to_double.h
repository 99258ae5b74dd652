#pragma once

// What a stored number is, decoded here anew so that a test does not trust the code it tests.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "math/storage.h"

namespace gauge_ext::test {

inline double to_double(float value) {
  return value;
}
inline double to_double(double value) {
  return value;
}
inline double to_double(BFloat16Bits value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline double to_double(Float16Bits value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24)
                      : exponent < 31
                          ? std::ldexp(1024 + fraction, exponent - 25)
                          : (fraction ? std::nan("") : std::numeric_limits<double>::infinity());
  return value.bits >> 15 ? -size : size;
}

}  // namespace gauge_ext::test
