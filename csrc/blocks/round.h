#pragma once

// The values of a group rounded to codes, and what that errs.

#include <cstdint>
#include <cstring>

#include "blocks/lanes.h"
#include "blocks/layout.h"
#include "blocks/steps.h"

namespace gauge_ext {
namespace {

// Which scales and zero points values are rounded with.
enum class Kind {
  kStored,       // zero points may be any numbers
  kStoredWhole,  // they are whole
  kFresh,        // they are whole, and no block has these scales yet
};

// rint(value / scale + zero) within the codes, on top of kRounder: what is added to a quotient, the
// zero point with it if it is whole, rounds it.
template <int BITS, bool DIVIDE, bool WHOLE>
inline GAUGE_EXT_INLINE Floats round_value(Floats value, const Steps& steps, Floats offset) {
  const Floats rounder = broadcast(kRounder), top = broadcast(kTop<BITS>);
  const Floats added = WHOLE ? offset : steps.zero;
  const Floats code = DIVIDE ? value / steps.by + added : fused(value, steps.by, added);
  if constexpr (WHOLE) {
    return lesser(greater(code, rounder), rounder + top);
  }
  return lesser(greater(code, Floats{}), top) + rounder;
}

// The codes of a group and what they err.
template <int BITS, bool DIVIDE, Kind KIND>
Floats round_group(const Layout& layout, const float* values, const Steps& given, uint32_t* words) {
  constexpr bool kWhole = KIND != Kind::kStored;
  constexpr uint32_t kRounders = [] {
    uint32_t sum = 0;
    for (int k = 0; k < kPerWord<BITS>; ++k) {
      sum += kRounderBits << (k * BITS);
    }
    return sum;
  }();
  const Steps steps = given;
  const Floats offset = broadcast(kRounder) + steps.zero;
  Floats errors = {};
  for (int64_t word = 0; word < layout.words; ++word) {
    // A sum of shifted words, from which what the rounders add to it is taken away.
    Words codes = Words{} - kRounders;
    repeat<kPerWord<BITS>>([&](int k) GAUGE_EXT_INLINE {
      const Floats value = load<float>(values + (word * kPerWord<BITS> + k) * kLanes);
      const Floats code = round_value<BITS, DIVIDE, kWhole>(value, steps, offset);
      const Floats level = kWhole ? code - offset : code - broadcast(kRounder) - steps.zero;
      // Unfused, as W was decoded: what has not changed errs by nothing.
      const Floats gap =
          KIND == Kind::kFresh ? fused(level, steps.scale, -value) : level * steps.scale - value;
      errors = fused(gap, gap, errors);
      codes += reinterpret_cast<Words>(code) << (k * BITS);
    });
    std::memcpy(words + word * kLanes, &codes, sizeof(codes));
  }
  return errors;
}

}  // namespace
}  // namespace gauge_ext
