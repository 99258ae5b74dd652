#pragma once

// Scales and zero points of a group: those that are stored, and those that span its values.

#include <cstdint>

#include "blocks/lanes.h"
#include "blocks/layout.h"
#include "blocks/requantize.h"

namespace gauge_ext {
namespace {

template <int BITS>
constexpr int kPerWord = 32 / BITS;
template <int BITS>
constexpr int kTop = (1 << BITS) - 1;

// A group's scales and zero points, and what its values are divided by: the scales, or their
// reciprocals to multiply with.
struct Steps {
  Floats scale, zero, by;
};

// A scale of 0 stands for a block of zeros.
inline GAUGE_EXT_INLINE Floats divisor(Floats scale) {
  return scale == Floats{} ? broadcast(1) : scale;
}

// Whether the reciprocals of all divisors are ordinary numbers too.
inline GAUGE_EXT_INLINE bool invertible(Floats divisors) {
  const Words magnitude = reinterpret_cast<Words>(divisors) & 0x7FFFFFFFu;
  const Words least = Words{} + 0x0D800000u;  // 2^-100, and below 2^100:
  return !any(above(least, 0) & (~above(magnitude, 0x0D7FFFFFu) | above(magnitude, 0x717FFFFFu)));
}

template <int BITS>
inline GAUGE_EXT_INLINE Steps stored_steps(const BlockRows& weight, const Place& place) {
  Steps steps{load_numbers(place.scales, weight.format), broadcast(1 << (BITS - 1)), {}};
  if (weight.zeros == ZeroPoints::kCodes) {
    steps.zero = load_codes<BITS>(place.zeros);
  } else if (weight.zeros == ZeroPoints::kNumbers) {
    steps.zero = load_numbers(place.zeros, weight.format);
  }
  steps.by = divisor(steps.scale);
  return steps;
}

// Scales and zero points with which the blocks' values just fit, as they will be stored.
template <int BITS>
inline GAUGE_EXT_INLINE Steps spanning_steps(const BlockRows& weight, Floats low, Floats high) {
  constexpr float kMiddle = 1 << (BITS - 1);
  Steps steps;
  if (weight.zeros == ZeroPoints::kNone) {
    // The largest value in magnitude is -middle steps away from zero, where there is one more.
    steps.scale = (-low > high ? low : high) / -broadcast(kMiddle);
    steps.zero = broadcast(kMiddle);
  } else {
    low = lesser(low, Floats{});
    high = greater(high, Floats{});
    steps.scale = (high - low) / broadcast(kTop<BITS>);
    const Floats zero = lesser(-low / divisor(steps.scale), broadcast(kTop<BITS>));
    steps.zero = zero + broadcast(kRounder) - broadcast(kRounder);
  }
  steps.scale = rounded_to(steps.scale, weight.format);
  steps.by = divisor(steps.scale);
  return steps;
}

template <int BITS>
inline GAUGE_EXT_INLINE void store_steps(const BlockRows& weight,
                                         const Place& place,
                                         Floats scale,
                                         Floats zero) {
  store_numbers(place.scales, scale, weight.format);
  if (weight.zeros == ZeroPoints::kCodes) {
    store_codes<BITS>(place.zeros, zero);
  } else if (weight.zeros == ZeroPoints::kNumbers) {
    store_numbers(place.zeros, zero, weight.format);
  }
}

}  // namespace
}  // namespace gauge_ext
