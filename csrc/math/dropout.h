#pragma once

// Inverted dropout whose mask is a function of (seed, row, column): never stored, drawn again in
// the backward pass, the same for every thread count, instruction set and device.
//
// Columns are served in blocks of 128 by 16 Philox counters. Each counter yields four 32-bit words,
// that is eight 16-bit draws; column e of a block reads counter e % 16 and draw e / 16, so that 16
// neighbouring columns lie in the 16 lanes of one vector register. The counter's words are
// (16 * block + lane, row's low half, row's high half, 0).

#include <cmath>
#include <cstdint>

#include "math/host_device.h"
#include "math/philox.h"

namespace gauge_ext {

constexpr int kDropoutLanes = 16;
constexpr int kDropoutDraws = 8;
constexpr int kDropoutBlock = kDropoutLanes * kDropoutDraws;

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // an element is dropped where its 16-bit draw is below
  double scale = 1.0;      // of the elements that are kept

  bool active() const { return threshold > 0; }

  // p is rounded to a multiple of 2^-16; the scale follows the rounded p, so that the expectation
  // stays exact.
  static Dropout make(double p, uint64_t seed) {
    Dropout dropout;
    dropout.seed = seed;
    dropout.threshold = static_cast<uint32_t>(std::nearbyint(p * 65536.0));
    dropout.scale = dropout.threshold < 65536 ? 65536.0 / (65536.0 - dropout.threshold) : 0.0;
    return dropout;
  }
};

// The four words, each two draws, of the counters `lane_counter` of one row.
template <typename Multiply = MultiplyWide, typename Key, typename Word>
GAUGE_EXT_HOST_DEVICE void dropout_words(const Key& key,
                                         int64_t row,
                                         Word lane_counter,
                                         Word (&words)[4]) {
  const Word zero = {};
  words[0] = lane_counter;
  words[1] = zero + static_cast<uint32_t>(row);
  words[2] = zero + static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  words[3] = zero;
  philox4x32<Multiply>(words, key);
}

// The multiplier of one element, 0 or scale.
GAUGE_EXT_HOST_DEVICE double dropout_element(const Dropout& dropout, int64_t row, int64_t column) {
  const int64_t block = column / kDropoutBlock;
  const int element = static_cast<int>(column % kDropoutBlock);
  uint32_t words[4];
  dropout_words(PhiloxKey{dropout.seed}, row,
                static_cast<uint32_t>(block * kDropoutLanes + element % kDropoutLanes), words);
  const int draw = element / kDropoutLanes;
  const uint32_t word = words[draw / 2];
  const uint32_t value = draw % 2 ? word >> 16 : word & 0xFFFFu;
  return value >= dropout.threshold ? dropout.scale : 0.0;
}

}  // namespace gauge_ext
