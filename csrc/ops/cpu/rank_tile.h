#pragma once

// Tiles of L R, (rows, columns), for a short rank: what passes over a whole weight with a low-rank
// update are made of. L is (rows, rank), R is (rank, columns).

#include <algorithm>
#include <cstdint>

#include "math/dropout.h"
#include "ops/cpu/panel.h"
#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// 6 x 2 accumulators, two vectors of R and one entry of L fill 16 registers.
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;

// R is walked in blocks of columns of about this size, packed in the order in which it is read,
// which stay in the second-level cache over all the rows. A multiple of a rounding block, so that
// none is drawn twice.
constexpr int64_t kBlockBytes = 128 * 1024;

template <typename acc_t>
int64_t block_columns(int64_t rank) {
  const int64_t fitting = kBlockBytes / (std::max<int64_t>(rank, 1) * sizeof(acc_t));
  return std::max<int64_t>(fitting / kDropoutBlock, 1) * kDropoutBlock;
}

// The columns [begin, end) of scale · R: for each tile of columns its piece of every row, padded
// with zeros. The rows of R lie `stride` entries apart.
template <typename acc_t>
struct Block {
  static constexpr int64_t kColumns = kTileVectors * kWidth<acc_t>;
  int64_t begin, end;
  int64_t rank;
  const acc_t* packed;

  Block(const acc_t* right,
        int64_t stride,
        int64_t rank,
        int64_t begin,
        int64_t end,
        acc_t scale = acc_t(1))
      : begin(begin), end(end), rank(rank) {
    static thread_local Scratch<acc_t> scratch;
    const int64_t tiles = (end - begin + kColumns - 1) / kColumns;
    acc_t* to = scratch.reserve(tiles * rank * kColumns);
    packed = to;
    for (int64_t column = begin; column < end; column += kColumns) {
      const int64_t width = std::min(kColumns, end - column);
      for (int64_t j = 0; j < rank; ++j, to += kColumns) {
        const acc_t* from = right + j * stride + column;
        for (int64_t c = 0; c < width; ++c) {
          to[c] = scale * from[c];
        }
        std::fill(to + width, to + kColumns, acc_t(0));
      }
    }
  }

  // Where the tile of `column` begins; a row of it is kColumns long.
  const acc_t* tile(int64_t column) const {
    const int64_t offset = column - begin;
    return packed + offset / kColumns * rank * kColumns + offset % kColumns;
  }
};

// ROWS rows of L, of which `left` is the first, in the order in which tiles read them.
template <int ROWS, typename acc_t>
struct LeftRows {
  const acc_t* packed;

  LeftRows(const acc_t* left, int64_t rank) {
    static thread_local Scratch<acc_t> scratch;
    acc_t* to = scratch.reserve(ROWS * rank);
    packed = to;
    for (int64_t j = 0; j < rank; ++j) {
      for (int i = 0; i < ROWS; ++i) {
        *to++ = left[i * rank + j];
      }
    }
  }
};

// sum += L R for those rows and VECTORS vectors from `column` on
template <int ROWS, int VECTORS, typename acc_t>
inline GAUGE_EXT_INLINE void multiply(const Block<acc_t>& block,
                                      const LeftRows<ROWS, acc_t>& rows,
                                      int64_t column,
                                      Vec<acc_t> (&sum)[ROWS][VECTORS]) {
  const acc_t* left = rows.packed;
  const acc_t* const end = left + ROWS * block.rank;
  const acc_t* right = block.tile(column);
  for (; left != end; left += ROWS, right += Block<acc_t>::kColumns) {
    Vec<acc_t> r[VECTORS];
    repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE { r[v] = load<acc_t>(right + v * kWidth<acc_t>); });
    repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
      repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE { sum[i][v] += left[i] * r[v]; });
    });
  }
}

}  // namespace
}  // namespace gauge_ext
