#pragma once

// The random bits of stochastic rounding: 16 for each entry of a weight, a function of (seed,
// layer, row, column) alone, laid out as those of dropout (math/dropout.h): column e of a block of
// 128 reads counter e % 16 and draw e / 16. The counter's words are (16 * block + lane, row's low
// half, row's high half, layer + 1); dropout's fourth word is 0, so that the two never share bits.

#include <cstdint>

#include "math/dropout.h"
#include "math/host_device.h"
#include "math/philox.h"
#include "math/storage.h"

namespace gauge_ext {

// Which weight of a call, and the row of it that the first one given is.
struct Rounding {
  uint64_t seed = 0;
  uint32_t layer = 0;
  int64_t first_row = 0;
};

template <typename Multiply = MultiplyWide, typename Word>
GAUGE_EXT_HOST_DEVICE void rounding_words(const Rounding& rounding,
                                          int64_t row,
                                          Word lane_counter,
                                          Word (&words)[4]) {
  const Word zero = {};
  const auto place = static_cast<uint64_t>(rounding.first_row + row);
  words[0] = lane_counter;
  words[1] = zero + static_cast<uint32_t>(place);
  words[2] = zero + static_cast<uint32_t>(place >> 32);
  words[3] = zero + (rounding.layer + 1);
  philox4x32<Multiply>(words, PhiloxKey{rounding.seed});
}

// The 16 bits of one entry
GAUGE_EXT_HOST_DEVICE uint32_t rounding_bits(const Rounding& rounding,
                                             int64_t row,
                                             int64_t column) {
  const int64_t block = column / kDropoutBlock;
  const int element = static_cast<int>(column % kDropoutBlock);
  uint32_t words[4];
  rounding_words(rounding, row,
                 static_cast<uint32_t>(block * kDropoutLanes + element % kDropoutLanes), words);
  const int draw = element / kDropoutLanes;
  const uint32_t word = words[draw / 2];
  return draw % 2 ? word >> 16 : word & 0xFFFFu;
}

// `value` as one of its two neighbours in scalar_t, the farther the rarer: adding 16 random bits
// below the last one that is kept and cutting them off carries with just that probability. Still
// in float32; infinity and NaN stay what they are.
template <typename scalar_t>
GAUGE_EXT_HOST_DEVICE float round_stochastic(float value, uint32_t draw) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F7FFFFFu) {
    return value;
  }
  uint32_t rounded;
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    rounded = (magnitude + draw) & ~0xFFFFu;
  } else {
    static_assert(std::is_same_v<scalar_t, Float16Bits>);
    rounded = (magnitude + (draw >> 3)) & ~0x1FFFu;
    if (magnitude < 0x38800000u) {  // below 2^-14 numbers are 2^-24 apart: exact arithmetic
      const float steps = bits_float(magnitude) * 0x1p24f;
      const auto whole = static_cast<int32_t>(steps);
      const float rest = (steps - static_cast<float>(whole)) * 0x1p16f;
      const bool up = rest > static_cast<float>(0xFFFFu - draw);
      rounded = float_bits(static_cast<float>(whole + (up ? 1 : 0)) * 0x1p-24f);
    }
  }
  return bits_float(rounded | (bits & 0x80000000u));
}

}  // namespace gauge_ext
