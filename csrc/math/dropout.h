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

// The multipliers, 0 or scale, of all 128 columns of one block of one row.
template <typename acc_t>
GAUGE_EXT_HOST_DEVICE void dropout_block(const Dropout& dropout,
                                         int64_t row,
                                         int64_t block,
                                         acc_t* multiplier) {
  uint32_t words[4][kDropoutLanes];
  for (int lane = 0; lane < kDropoutLanes; ++lane) {
    words[0][lane] = static_cast<uint32_t>(block * kDropoutLanes + lane);
    words[1][lane] = static_cast<uint32_t>(row);
    words[2][lane] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
    words[3][lane] = 0;
  }
  philox4x32(words, dropout.seed);
  const acc_t scale = static_cast<acc_t>(dropout.scale);
  for (int word = 0; word < 4; ++word) {
    acc_t* even = multiplier + (2 * word) * kDropoutLanes;
    acc_t* odd = even + kDropoutLanes;
    for (int lane = 0; lane < kDropoutLanes; ++lane) {
      even[lane] = (words[word][lane] & 0xFFFFu) >= dropout.threshold ? scale : acc_t(0);
    }
    for (int lane = 0; lane < kDropoutLanes; ++lane) {
      odd[lane] = (words[word][lane] >> 16) >= dropout.threshold ? scale : acc_t(0);
    }
  }
}

// The multiplier of one element; the form that a thread of a GPU uses, and tests.
GAUGE_EXT_HOST_DEVICE double dropout_element(const Dropout& dropout, int64_t row, int64_t column) {
  const int64_t block = column / kDropoutBlock;
  const int element = static_cast<int>(column % kDropoutBlock);
  uint32_t words[4][1] = {
      {static_cast<uint32_t>(block * kDropoutLanes + element % kDropoutLanes)},
      {static_cast<uint32_t>(row)},
      {static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32)},
      {0},
  };
  philox4x32(words, dropout.seed);
  const int draw = element / kDropoutLanes;
  const uint32_t word = words[draw / 2][0];
  const uint32_t value = draw % 2 ? word >> 16 : word & 0xFFFFu;
  return value >= dropout.threshold ? dropout.scale : 0.0;
}

}  // namespace gauge_ext
