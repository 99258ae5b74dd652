#pragma once

// Half-precision numbers as they lie in memory, and what they are computed in.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math/host_device.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace gauge_ext {

struct BFloat16Bits {  // the upper half of a float32
  uint16_t bits;
};

struct Float16Bits {  // IEEE 754 binary16: 5 bits of exponent, 10 of fraction
  uint16_t bits;
};

template <typename scalar_t>
struct AccOf {
  using type = scalar_t;
};
template <>
struct AccOf<BFloat16Bits> {
  using type = float;
};
template <>
struct AccOf<Float16Bits> {
  using type = float;
};

GAUGE_EXT_HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GAUGE_EXT_HOST_DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

GAUGE_EXT_HOST_DEVICE float widen(float value) {
  return value;
}
GAUGE_EXT_HOST_DEVICE double widen(double value) {
  return value;
}
GAUGE_EXT_HOST_DEVICE float widen(BFloat16Bits value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}
GAUGE_EXT_HOST_DEVICE float widen(Float16Bits value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31u, fraction = value.bits & 0x3FFu;
  if (exponent == 0) {
    const float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return bits_float(float_bits(tiny) | sign);
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + (127 - 15);
  return bits_float(sign | wide << 23 | fraction << 13);
#endif
}

// Rounds to nearest, ties to even; a NaN stays one instead of rounding up into infinity.
template <typename scalar_t>
GAUGE_EXT_HOST_DEVICE scalar_t narrow(typename AccOf<scalar_t>::type value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    const uint32_t bits = float_bits(value);
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
  } else if constexpr (std::is_same_v<scalar_t, Float16Bits>) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t sign = (float_bits(value) >> 16) & 0x8000u;
    const uint32_t magnitude = float_bits(value) & 0x7FFFFFFFu;
    uint32_t rounded;
    if (magnitude > 0x7F800000u) {
      rounded = 0x7E00u;
    } else if (magnitude >= 0x477FF000u) {  // from 65520 on it rounds to infinity
      rounded = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14 numbers are 2^-24 apart, as just above 0.5
      rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
    } else {
      rounded = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    }
    return {static_cast<uint16_t>(sign | rounded)};
#endif
  } else {
    return value;
  }
}

}  // namespace gauge_ext
