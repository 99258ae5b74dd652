#pragma once

// Vector types of the width that this translation unit is compiled for, on the compiler's own
// vector extension: + and * work lane by lane, and a * b + c contracts to a fused multiply-add.
// Each kernel file is compiled once per capability, into a namespace named CPU_CAPABILITY, with
// internal linkage for everything but its table of functions: code for one instruction set never
// leaks into another's shared inline functions.

#include <cstdint>
#include <cstring>

#include "ops/cpu/low_rank.h"

namespace gauge_ext {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <typename acc_t>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename acc_t>
using Vec = typename VecOf<acc_t>::type;

template <typename acc_t>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(acc_t));

template <typename acc_t>
inline __attribute__((always_inline)) Vec<acc_t> load(const acc_t* from) {
  Vec<acc_t> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename acc_t>
inline __attribute__((always_inline)) void store(acc_t* to, const Vec<acc_t>& value) {
  std::memcpy(to, &value, sizeof(value));
}

template <typename acc_t>
inline __attribute__((always_inline)) acc_t horizontal_sum(const Vec<acc_t>& value) {
  acc_t sum = 0;
  for (int lane = 0; lane < kWidth<acc_t>; ++lane) {
    sum += value[lane];
  }
  return sum;
}

// Rounds to nearest, ties to even; a NaN stays one instead of rounding up into infinity.
inline __attribute__((always_inline)) uint16_t round_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

inline __attribute__((always_inline)) float to_acc(float value) {
  return value;
}
inline __attribute__((always_inline)) double to_acc(double value) {
  return value;
}
inline __attribute__((always_inline)) float to_acc(BFloat16Bits value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// y += value, in y's own precision
inline __attribute__((always_inline)) void add_to(float* y, float value) {
  *y += value;
}
inline __attribute__((always_inline)) void add_to(double* y, double value) {
  *y += value;
}
inline __attribute__((always_inline)) void add_to(BFloat16Bits* y, float value) {
  y->bits = round_to_bfloat16(to_acc(*y) + value);
}

// y[0 : width] += value
template <typename acc_t>
inline __attribute__((always_inline)) void add_vector(acc_t* y, const Vec<acc_t>& value) {
  store<acc_t>(y, load<acc_t>(y) + value);
}
inline __attribute__((always_inline)) void add_vector(BFloat16Bits* y, const Vec<float>& value) {
  for (int lane = 0; lane < kWidth<float>; ++lane) {
    add_to(y + lane, value[lane]);
  }
}

}  // namespace
}  // namespace gauge_ext
