#include "blocks/requantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "blocks/lanes.h"
#include "blocks/layout.h"
#include "blocks/product.h"
#include "blocks/round.h"
#include "blocks/steps.h"

namespace gauge_ext {
namespace {

// body(j, (q - z) s) for entry j of the blocks, whose codes are in `words`.
template <int BITS, typename F>
inline GAUGE_EXT_INLINE void decode(const Layout& layout,
                                    const uint32_t* words,
                                    const Steps& steps,
                                    const F& body) {
  for (int64_t word = 0; word < layout.words; ++word) {
    Words packed;
    std::memcpy(&packed, words + word * kLanes, sizeof(packed));
    repeat<kPerWord<BITS>>([&](int k) GAUGE_EXT_INLINE {
      const auto code = reinterpret_cast<SignedWords>((packed >> (k * BITS)) & kTop<BITS>);
      body(word * kPerWord<BITS> + k,
           (__builtin_convertvector(code, Floats) - steps.zero) * steps.scale);
    });
  }
}

// W + L R in place of L R, and the sum of its squares within the columns.
template <int BITS>
double add_weight(const Layout& layout,
                  const Scratch& scratch,
                  const Place& place,
                  bool with_edge,
                  float* values) {
  load_blocks(place.codes, layout.block_bytes, scratch.old_words);
  const Steps steps = stored_steps<BITS>(layout.weight, place);
  Floats inside = broadcast(1);
  inside[layout.last - 1] = 0;
  const int64_t edge = with_edge ? layout.edge : layout.weight.block_size;
  double squares = 0;
  Floats partial = {};
  decode<BITS>(layout, scratch.old_words, steps, [&](int64_t j, Floats held) GAUGE_EXT_INLINE {
    const Floats value = held + load<float>(values + j * kLanes);
    store<float>(values + j * kLanes, value);
    const Floats counted = j < edge ? value : value * inside;
    partial = fused(counted, counted, partial);
    if (j % kPerWord<BITS> == kPerWord<BITS> - 1) {
      squares += double(horizontal_sum<float>(partial));
      partial = Floats{};
    }
  });
  return squares;
}

// What a row is multiplied with for DoRA.
struct Gain {
  Floats inside;
  Floats beyond;  // from `edge` on: 1 in the last lane, which leaves padding as it is
  int64_t edge;
};

struct Changed {
  Floats low, high, moved, total;
};

// A group's new values: W + L R in place of L R, or, with a gain, that times W + L R in its own.
template <int BITS, bool GAIN>
inline GAUGE_EXT_INLINE Changed change(const Layout& layout,
                                       const uint32_t* words,
                                       const Steps& steps,
                                       const Gain& gain,
                                       float* values) {
  Changed found{broadcast(INFINITY), broadcast(-INFINITY), {}, {}};
  decode<BITS>(layout, words, steps, [&](int64_t j, Floats held) GAUGE_EXT_INLINE {
    const Floats given = load<float>(values + j * kLanes);
    Floats value, moved;
    if constexpr (GAIN) {
      value = given * (j < gain.edge ? gain.inside : gain.beyond);
      moved = value - held;
    } else {
      value = held + given;
      moved = given;
    }
    store<float>(values + j * kLanes, value);
    found.moved = fused(moved, moved, found.moved);
    found.total = fused(value, value, found.total);
    found.low = lesser(found.low, value);
    found.high = greater(found.high, value);
  });
  return found;
}

bool all_finite(const float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) {
      return false;
    }
  }
  return true;
}

template <int BITS, bool GAIN>
void requantize_group(const Layout& layout,
                      const Scratch& scratch,
                      const Place& place,
                      const Gain& gain,
                      float* values,
                      BlockSums& sums) {
  const BlockRows& weight = layout.weight;
  load_blocks(place.codes, layout.block_bytes, scratch.old_words);
  Steps before = stored_steps<BITS>(weight, place);
  const Changed changed = change<BITS, GAIN>(layout, scratch.old_words, before, gain, values);
  Steps after = spanning_steps<BITS>(weight, changed.low, changed.high);
  Floats old_errors, new_errors;
  if (invertible(before.by) && invertible(after.by)) {
    before.by = broadcast(1) / before.by;
    after.by = broadcast(1) / after.by;
    const auto stored = weight.zeros == ZeroPoints::kNumbers
                            ? &round_group<BITS, false, Kind::kStored>
                            : &round_group<BITS, false, Kind::kStoredWhole>;
    old_errors = stored(layout, values, before, scratch.old_words);
    new_errors = round_group<BITS, false, Kind::kFresh>(layout, values, after, scratch.new_words);
  } else {
    old_errors = round_group<BITS, true, Kind::kStored>(layout, values, before, scratch.old_words);
    new_errors = round_group<BITS, true, Kind::kFresh>(layout, values, after, scratch.new_words);
  }
  const auto better = new_errors < old_errors;
  const Floats all[4] = {better ? new_errors : old_errors, changed.moved, changed.total, {}};
  float found[4];
  horizontal_sums<4, float>(all, found);
  sums.error += double(found[0]);
  sums.moved += double(found[1]);
  sums.total += double(found[2]);
  // A square may exceed float32 where the number itself does not.
  if (!std::isfinite(found[2]) && !all_finite(values, layout.cells)) {
    sums.finite = false;
    return;
  }
  const Words mask = reinterpret_cast<Words>(better);
  for (int64_t at = 0; at < layout.words * kLanes; at += kLanes) {
    Words one, two;
    std::memcpy(&one, scratch.old_words + at, sizeof(one));
    std::memcpy(&two, scratch.new_words + at, sizeof(two));
    one = (one & ~mask) | (two & mask);
    std::memcpy(scratch.old_words + at, &one, sizeof(one));
  }
  store_blocks(scratch.old_words, place.codes, layout.block_bytes);
  store_steps<BITS>(weight, place, better ? after.scale : before.scale,
                    better ? after.zero : before.zero);
}

// Every cache line of some bytes, to be written too.
inline GAUGE_EXT_INLINE void prefetch_bytes(const uint8_t* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(from + at, 1, 3);
  }
  __builtin_prefetch(from + bytes - 1, 1, 3);  // where they do not start with a line
}

// The rows of a tile lie apart, and each is short: they come while the product is computed.
inline GAUGE_EXT_INLINE void prefetch_group(const Layout& layout, int64_t row, int64_t group) {
  const BlockRows& weight = layout.weight;
  const int64_t block = row * layout.blocks + group * kLanes;
  prefetch_bytes(weight.scales + block * layout.scale_bytes, kLanes * layout.scale_bytes);
  prefetch_bytes(weight.codes + block * layout.block_bytes, kLanes * layout.block_bytes);
}

template <int BITS>
void requantize_plain(const Layout& layout, const Scratch& scratch, BlockSums& sums) {
  constexpr int64_t kRows = kTileRows * kTiles;
  const int64_t rows = layout.weight.rows;
  for (int64_t batch = 0; batch < rows; batch += kRows) {
    const int64_t end = std::min(rows, batch + kRows);
    for (int64_t group = 0; group < layout.groups; ++group) {
      for (int64_t first = batch; first < end; first += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, end - first);
        for (int64_t i = 0; i < count; ++i) {
          prefetch_group(layout, first + i, group);
        }
        multiply(layout, scratch, first, count, group, scratch.values);
        for (int64_t i = 0; i < count; ++i) {
          const Group blocks(layout, scratch, first + i, group);
          requantize_group<BITS, false>(layout, scratch, blocks.place, Gain{},
                                        scratch.values + i * layout.cells, sums);
          if (!sums.finite) {
            return;
          }
          blocks.finish();
        }
      }
    }
  }
}

// With DoRA the length of a row has to be known before any of its codes can be written.
template <int BITS>
void requantize_with_gain(const Layout& layout, const Scratch& scratch, BlockSums& sums) {
  const BlockRows& weight = layout.weight;
  for (int64_t first = 0; first < weight.rows; first += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, weight.rows - first);
    for (int64_t group = 0; group < layout.groups; ++group) {
      multiply(layout, scratch, first, count, group, scratch.values + group * layout.cells);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* values = scratch.values + i * layout.row_cells();
      double squares = 0;
      for (int64_t group = 0; group < layout.groups; ++group) {
        const Group blocks(layout, scratch, first + i, group);
        squares += add_weight<BITS>(layout, scratch, blocks.place, group + 1 == layout.groups,
                                    values + group * layout.cells);
      }
      // Zeros stay zeros.
      const double factor = squares > 0 ? weight.magnitude[first + i] / std::sqrt(squares) : 0.0;
      Gain gain{broadcast(static_cast<float>(factor)), {}, weight.block_size};
      gain.beyond = gain.inside;
      gain.beyond[layout.last - 1] = 1;
      for (int64_t group = 0; group < layout.groups; ++group) {
        gain.edge = group + 1 < layout.groups ? weight.block_size : layout.edge;
        const Group blocks(layout, scratch, first + i, group);
        requantize_group<BITS, true>(layout, scratch, blocks.place, gain,
                                     values + group * layout.cells, sums);
        if (!sums.finite) {
          return;
        }
        blocks.finish();
      }
    }
  }
}

template <int BITS>
BlockSums requantize_bits(const Layout& layout, const Scratch& scratch) {
  BlockSums sums;
  pack_right(layout, scratch);
  if (layout.weight.magnitude == nullptr) {
    requantize_plain<BITS>(layout, scratch, sums);
  } else {
    requantize_with_gain<BITS>(layout, scratch, sums);
  }
  return sums;
}

BlockSums requantize(const BlockRows& weight, unsigned char* memory) {
  const Layout layout(weight);
  const Scratch scratch(layout, memory);
  return weight.bits == 4 ? requantize_bits<4>(layout, scratch)
                          : requantize_bits<8>(layout, scratch);
}

int64_t scratch_bytes(const BlockRows& weight) {
  return Scratch::bytes(Layout(weight));
}

}  // namespace

namespace CPU_CAPABILITY {
extern const RequantizeKernels requantize_kernels_;
const RequantizeKernels requantize_kernels_ = {kLanes, &scratch_bytes, &requantize};
}  // namespace CPU_CAPABILITY

}  // namespace gauge_ext
