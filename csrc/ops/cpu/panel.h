#pragma once

// Panels: a few rows of a large matrix at a time, converted to acc_t and masked where need be, so
// that what follows reads them from the cache as often as it likes.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "math/dropout.h"
#include "ops/cpu/tiles.h"
#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// A panel is of so many rows and columns at most: 144 KiB of float32, which stay in the
// second-level cache while they are read twice. With fewer rows the sums over rows are fetched too
// often, with fewer columns those over columns.
constexpr int64_t kPanelRows = 48;
constexpr int64_t kPanelColumns = 768;

// Calls body(first row, rows, first column, columns) for the panels, row by row of panels.
template <typename F>
void for_each_panel(int64_t rows, int64_t columns, const F& body) {
  for (int64_t row = 0; row < rows; row += kPanelRows) {
    for (int64_t column = 0; column < columns; column += kPanelColumns) {
      body(row, std::min(kPanelRows, rows - row), column,
           std::min(kPanelColumns, columns - column));
    }
  }
}

// The multipliers, 0 or scale, of the 128 columns of one block of one row.
inline __attribute__((always_inline)) void draw_block(const Dropout& dropout,
                                                      int64_t row,
                                                      int64_t block,
                                                      float* multiplier) {
  static_assert(kDropoutLanes % kWords == 0);
  const Vec<float> zero = {};
  const Words kept = reinterpret_cast<Words>(zero + static_cast<float>(dropout.scale));
  // Draws have 16 bits and the threshold 17 at most, so they compare as signed words, which is one
  // instruction.
  const auto below = static_cast<int32_t>(dropout.threshold) - 1;
  Words lane = {};
  for (int i = 0; i < kWords; ++i) {
    lane[i] = static_cast<uint32_t>(i);
  }
  for (int first = 0; first < kDropoutLanes; first += kWords) {
    SplitWords words[4];
    const Words counter = lane + static_cast<uint32_t>(block * kDropoutLanes + first);
    dropout_words<MultiplySplitWords>(dropout, row, SplitWords::from(counter), words);
    for (int word = 0; word < 4; ++word) {
      const Words drawn = words[word].joined();
      float* even = multiplier + 2 * word * kDropoutLanes + first;
      // Comparing gives all ones where true.
      const Words low =
          reinterpret_cast<Words>(reinterpret_cast<SignedWords>(drawn & 0xFFFFu) > below);
      const Words high =
          reinterpret_cast<Words>(reinterpret_cast<SignedWords>(drawn >> 16) > below);
      store<float>(even, reinterpret_cast<Vec<float>>(low & kept));
      store<float>(even + kDropoutLanes, reinterpret_cast<Vec<float>>(high & kept));
    }
  }
}

inline void draw_block(const Dropout& dropout, int64_t row, int64_t block, double* multiplier) {
  float narrow[kDropoutBlock];
  draw_block(dropout, row, block, narrow);
  for (int i = 0; i < kDropoutBlock; ++i) {
    multiplier[i] = narrow[i] == 0.0f ? 0.0 : dropout.scale;
  }
}

// The multipliers of whole rows
template <typename acc_t>
void draw_rows(const Dropout& dropout,
               int64_t first_row,
               int64_t rows,
               int64_t columns,
               acc_t* multiplier) {
  for (int64_t row = 0; row < rows; ++row) {
    acc_t* to = multiplier + row * columns;
    int64_t column = 0;
    for (; column + kDropoutBlock <= columns; column += kDropoutBlock) {
      draw_block(dropout, first_row + row, column / kDropoutBlock, to + column);
    }
    if (column < columns) {
      acc_t tail[kDropoutBlock];
      draw_block(dropout, first_row + row, column / kDropoutBlock, tail);
      std::copy(tail, tail + (columns - column), to + column);
    }
  }
}

// Memory that stays with the thread, as fresh pages would cost more than the work done in them. No
// standard container: its code would be shared with other instruction sets.
template <typename acc_t>
class Scratch {
 public:
  ~Scratch() { delete[] memory_; }

  acc_t* reserve(int64_t count) {
    if (count > capacity_) {
      delete[] memory_;
      memory_ = nullptr;
      capacity_ = 0;
      memory_ = new acc_t[count];
      capacity_ = count;
    }
    return memory_;
  }

 private:
  acc_t* memory_ = nullptr;
  int64_t capacity_ = 0;
};

// Reads panels as acc_t: the caller's own memory where nothing is to be done, else a copy.
template <typename scalar_t, typename acc_t>
class Panel {
 public:
  explicit Panel(const Dropout& dropout) : dropout_(dropout) {}

  // X ∘ M of the given panel of X, whose first row and column are those of the whole matrix
  ConstView<acc_t> read(ConstView<scalar_t> x,
                        int64_t first_row,
                        int64_t rows,
                        int64_t first_column,
                        int64_t columns) {
    if (dropout_.active()) {
      const Memory own = memory();
      for (int64_t i = 0; i < rows; ++i) {
        acc_t* mask = own.mask + i * kStride;
        acc_t* values = own.values + i * kStride;
        for (int64_t c = 0; c < columns; c += kDropoutBlock) {
          draw_block(dropout_, first_row + i, (first_column + c) / kDropoutBlock, mask + c);
          multiply(x.row(i) + c, mask + c, std::min<int64_t>(kDropoutBlock, columns - c),
                   values + c);
        }
      }
      return {own.values, kStride};
    }
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return x;
    } else {
      acc_t* copy = memory().values;
      for (int64_t i = 0; i < rows; ++i) {
        acc_t* values = copy + i * kStride;
        for (int64_t c = 0; c < columns; ++c) {
          values[c] = to_acc(x.row(i)[c]);
        }
      }
      return {copy, kStride};
    }
  }

  // The multipliers of the panel last read, or null without dropout
  ConstView<acc_t> mask() const { return {dropout_.active() ? memory().mask : nullptr, kStride}; }

 private:
  // Odd multiples of a cache line apart, so that rows don't fall on each other in the cache.
  static constexpr int64_t kStride = kPanelColumns + 16;
  static_assert(kPanelColumns % kDropoutBlock == 0);  // as whole blocks of dropout are drawn

  struct Memory {
    acc_t* values;
    acc_t* mask;
  };
  static Memory memory() {
    static thread_local Scratch<acc_t> scratch;
    acc_t* values = scratch.reserve(2 * kPanelRows * kStride);
    return {values, values + kPanelRows * kStride};
  }

  static void multiply(const scalar_t* x, const acc_t* mask, int64_t count, acc_t* to) {
    int64_t i = 0;
    for (; i + kWidth<acc_t> <= count; i += kWidth<acc_t>) {
      store<acc_t>(to + i, load_as<scalar_t, acc_t>(x + i) * load<acc_t>(mask + i));
    }
    for (; i < count; ++i) {
      to[i] = to_acc(x[i]) * mask[i];
    }
  }

  const Dropout& dropout_;
};

}  // namespace
}  // namespace gauge_ext
