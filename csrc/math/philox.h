#pragma once

// Philox4x32-10: a counter-based random generator (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011, section 4.3). A draw is a function of (key, counter) alone, so that it can
// be made again in the backward pass, in any order, on any device.

#include <cstdint>

#include "math/host_device.h"

namespace gauge_ext {

// LANES counters at a time, word by word, so that a compiler turns each line into vector code.
// On entry counter[i][lane] is word i of the lane's counter; on return it is output word i.
template <int LANES>
GAUGE_EXT_HOST_DEVICE void philox4x32(uint32_t (&counter)[4][LANES], uint64_t key) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53u;
  constexpr uint64_t kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u;
  constexpr uint32_t kWeyl1 = 0xBB67AE85u;
  constexpr int kRounds = 10;
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    for (int lane = 0; lane < LANES; ++lane) {
      const uint64_t low = kMultiplier0 * counter[0][lane];
      const uint64_t high = kMultiplier1 * counter[2][lane];
      counter[0][lane] = static_cast<uint32_t>(high >> 32) ^ counter[1][lane] ^ key0;
      counter[1][lane] = static_cast<uint32_t>(high);
      counter[2][lane] = static_cast<uint32_t>(low >> 32) ^ counter[3][lane] ^ key1;
      counter[3][lane] = static_cast<uint32_t>(low);
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

}  // namespace gauge_ext
