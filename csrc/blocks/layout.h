#pragma once

// A weight as groups of blocks, one block to a lane, and the memory that a group is worked on in.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "blocks/lanes.h"
#include "blocks/requantize.h"

namespace gauge_ext {
namespace {

// Rows whose products share a load of R, as in ops/cpu/tiles.h, and tiles that share a group of it
// while it is in the first-level cache.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 6;
constexpr int kTiles = 8;

struct Layout {
  const BlockRows& weight;
  int64_t blocks;       // in a row
  int64_t groups;       // in a row
  int64_t last;         // blocks in the last group
  int64_t edge;         // columns in the last block; what follows is padding
  int64_t cells;        // entries in a group, a vector for each entry of a block
  int64_t words;        // of codes, in a block
  int64_t block_bytes;  // of codes
  int64_t scale_bytes;  // of a scale
  int64_t zero_bytes;   // of the zero points of a row

  explicit Layout(const BlockRows& w)
      : weight(w),
        blocks(w.blocks()),
        groups((blocks + kLanes - 1) / kLanes),
        last(blocks - (groups - 1) * kLanes),
        edge(w.columns - (blocks - 1) * w.block_size),
        cells(kLanes * w.block_size),
        words(w.block_bytes() / 4),
        block_bytes(w.block_bytes()),
        scale_bytes(w.scale_bytes()),
        zero_bytes(w.zero_row_bytes()) {}

  int64_t right_floats() const { return groups * cells * weight.rank; }
  // Between the values of one row of a tile and those of the next.
  int64_t row_cells() const { return weight.magnitude == nullptr ? cells : groups * cells; }
};

// Where the blocks of a group lie.
struct Place {
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* zeros;
};

struct Scratch {
  float* right;         // R, see pack_right
  float* values;        // of a tile of rows
  uint32_t* old_words;  // codes for the old scales
  uint32_t* new_words;  // codes for the new ones
  Place spare;          // for a group that is not full

  static int64_t bytes(const Layout& layout) {
    const int64_t floats = layout.right_floats() + kTileRows * layout.row_cells();
    return 4 * (floats + 2 * kLanes) + 3 * kLanes * layout.block_bytes;
  }

  Scratch(const Layout& layout, unsigned char* memory)
      : right(reinterpret_cast<float*>(memory)),
        values(right + layout.right_floats()),
        old_words(reinterpret_cast<uint32_t*>(values + kTileRows * layout.row_cells())),
        new_words(old_words + layout.words * kLanes),
        spare{} {
    spare.codes = reinterpret_cast<uint8_t*>(new_words + layout.words * kLanes);
    spare.scales = spare.codes + kLanes * layout.block_bytes;
    spare.zeros = spare.scales + 4 * kLanes;
  }
};

// R as [group][j / 2][rank][2][lane]: what a tile reads lies in a row. Zeros beyond the columns.
inline void pack_right(const Layout& layout, const Scratch& scratch) {
  const BlockRows& weight = layout.weight;
  const int64_t rank = weight.rank;
  float* padded = scratch.values;
  float* vectors = padded + layout.cells;
  float* to = scratch.right;
  for (int64_t group = 0; group < layout.groups; ++group, to += layout.cells * rank) {
    const int64_t first = group * layout.cells;
    const int64_t count = std::min(layout.cells, weight.columns - first);
    for (int64_t k = 0; k < rank; ++k) {
      const float* from = weight.right + k * weight.columns + first;
      if (count < layout.cells) {
        std::memcpy(padded, from, count * sizeof(float));
        std::memset(padded + count, 0, (layout.cells - count) * sizeof(float));
        from = padded;
      }
      load_blocks(reinterpret_cast<const uint8_t*>(from), 4 * weight.block_size,
                  reinterpret_cast<uint32_t*>(vectors));
      for (int64_t j = 0; j < weight.block_size; ++j) {
        store<float>(to + ((j / 2 * rank + k) * 2 + j % 2) * kLanes,
                     load<float>(vectors + j * kLanes));
      }
    }
  }
}

// The blocks of a group. Where there are fewer than lanes, they are worked on in spare memory, and
// the lanes without one hold zeros, which stay zeros.
class Group {
 public:
  Group(const Layout& layout, const Scratch& scratch, int64_t row, int64_t group)
      : place(home(layout, row, group)),
        layout_(layout),
        count_(group + 1 < layout.groups ? kLanes : layout.last) {
    if (count_ < kLanes) {
      borrow(scratch.spare);
    }
  }

  void finish() const {
    if (count_ < kLanes) {
      copy(place, home_);
    }
  }

  Place place;

 private:
  static Place home(const Layout& layout, int64_t row, int64_t group) {
    const BlockRows& weight = layout.weight;
    const int64_t first = group * kLanes, block = row * layout.blocks + first;
    const int64_t zero = row * layout.zero_bytes + some_zero_bytes(layout, first);
    return {weight.codes + block * layout.block_bytes, weight.scales + block * layout.scale_bytes,
            weight.zeros == ZeroPoints::kNone ? nullptr : weight.zero_points + zero};
  }

  // Of some blocks, the first of which starts on a whole byte.
  static int64_t some_zero_bytes(const Layout& layout, int64_t blocks) {
    return layout.weight.zeros == ZeroPoints::kCodes ? (blocks * layout.weight.bits + 7) / 8
                                                     : blocks * layout.scale_bytes;
  }

  void borrow(const Place& spare) {
    const BlockRows& weight = layout_.weight;
    home_ = place;
    std::memset(spare.codes, 0, kLanes * (layout_.block_bytes + 8));
    copy(home_, spare);
    if (weight.zeros == ZeroPoints::kCodes && count_ * weight.bits % 8 != 0) {
      spare.zeros[some_zero_bytes(layout_, count_) - 1] &= 15;  // the other half is no block's
    }
    place = spare;
  }

  void copy(const Place& from, const Place& to) const {
    const BlockRows& weight = layout_.weight;
    std::memcpy(to.codes, from.codes, count_ * layout_.block_bytes);
    std::memcpy(to.scales, from.scales, count_ * layout_.scale_bytes);
    if (weight.zeros != ZeroPoints::kNone) {
      std::memcpy(to.zeros, from.zeros, some_zero_bytes(layout_, count_));
    }
  }

  const Layout& layout_;
  int64_t count_;
  Place home_;  // where the blocks of a group that is not full belong
};

}  // namespace
}  // namespace gauge_ext
