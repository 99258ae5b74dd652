#pragma once

// Philox4x32-10: a counter-based random generator (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011, section 4.3). A draw is a function of (key, counter) alone, so that it can
// be made again in the backward pass, in any order, on any device.

#include <cstdint>

#include "math/host_device.h"

namespace gauge_ext {

// The 64-bit product of a constant and a word, in halves.
struct MultiplyWide {
  GAUGE_EXT_HOST_DEVICE void operator()(uint32_t factor,
                                        uint32_t word,
                                        uint32_t& high,
                                        uint32_t& low) const {
    const uint64_t product = static_cast<uint64_t>(factor) * word;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

constexpr int kPhiloxRounds = 10;

// The two words of key that go into each round.
struct PhiloxKey {
  uint64_t key;

  GAUGE_EXT_HOST_DEVICE uint32_t first(int round) const {
    return static_cast<uint32_t>(key) + static_cast<uint32_t>(round) * 0x9E3779B9u;
  }
  GAUGE_EXT_HOST_DEVICE uint32_t second(int round) const {
    return static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(round) * 0xBB67AE85u;
  }
};

// Replaces the four words of a counter by four random ones. Word is uint32_t, or a vector of them
// for as many counters at a time, with a Multiply that knows it (ops/cpu/vec.h); Key is PhiloxKey,
// or holds the words of one in vectors.
template <typename Multiply = MultiplyWide, typename Word, typename Key>
GAUGE_EXT_HOST_DEVICE void philox4x32(Word (&counter)[4], const Key& key) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u;
  constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Multiply multiply_wide;
    Word high0, low0, high1, low1;
    multiply_wide(kMultiplier0, counter[0], high0, low0);
    multiply_wide(kMultiplier1, counter[2], high1, low1);
    counter[0] = high1 ^ counter[1] ^ key.first(round);
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key.second(round);
    counter[3] = low0;
  }
}

}  // namespace gauge_ext
