#pragma once

// Panels: a few rows of a large matrix at a time, converted to acc_t and masked where need be, so
// that what follows reads them from the cache as often as it likes.

#include <algorithm>
#include <cstdint>
#include <new>
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

// A Dropout as blocks are drawn from it: filling registers with a round's key for each block anew
// would cost a quarter of the drawing.
class Draws {
 public:
  explicit Draws(const Dropout& dropout)
      : scale_(dropout.scale), below_(static_cast<int32_t>(dropout.threshold) - 1) {
    const PhiloxKey key{dropout.seed};
    for (int round = 0; round < kPhiloxRounds; ++round) {
      first_[round] = WideWords{} + key.first(round);
      second_[round] = WideWords{} + key.second(round);
    }
  }

  const WideWords& first(int round) const { return first_[round]; }
  const WideWords& second(int round) const { return second_[round]; }

  // to(e, multipliers, 0 or scale, of columns e, e + 1, ... of the 128 of one block of one row), a
  // register at a time
  template <typename F>
  inline GAUGE_EXT_INLINE void block(int64_t row, int64_t block, const F& to) const {
    static_assert(kDropoutLanes % kWords == 0);
    const Words kept = reinterpret_cast<Words>(Vec<float>{} + static_cast<float>(scale_));
    Words lane = {};
    for (int i = 0; i < kWords; ++i) {
      lane[i] = static_cast<uint32_t>(i);
    }
    for (int first = 0; first < kDropoutLanes; first += kWords) {
      SplitWords words[4];
      const Words counter = lane + static_cast<uint32_t>(block * kDropoutLanes + first);
      dropout_words<MultiplySplitWords>(*this, row, SplitWords::from(counter), words);
      repeat<4>([&](int word) GAUGE_EXT_INLINE {
        const Words drawn = words[word].joined();
        const int even = 2 * word * kDropoutLanes + first;
        // Draws have 16 bits and the threshold 17 at most, so they compare as signed words, which
        // is one instruction; comparing gives all ones where true.
        const Words low =
            reinterpret_cast<Words>(reinterpret_cast<SignedWords>(drawn & 0xFFFFu) > below_);
        const Words high =
            reinterpret_cast<Words>(reinterpret_cast<SignedWords>(drawn >> 16) > below_);
        to(even, reinterpret_cast<Vec<float>>(low & kept));
        to(even + kDropoutLanes, reinterpret_cast<Vec<float>>(high & kept));
      });
    }
  }

  // The same into memory
  inline GAUGE_EXT_INLINE void block(int64_t row, int64_t block, float* multiplier) const {
    this->block(row, block, [&](int at, const Vec<float>& value) GAUGE_EXT_INLINE {
      store<float>(multiplier + at, value);
    });
  }
  void block(int64_t row, int64_t block, double* multiplier) const {
    float narrow[kDropoutBlock];
    this->block(row, block, narrow);
    for (int i = 0; i < kDropoutBlock; ++i) {
      multiplier[i] = narrow[i] == 0.0f ? 0.0 : scale_;
    }
  }

 private:
  WideWords first_[kPhiloxRounds], second_[kPhiloxRounds];
  double scale_;
  int32_t below_;
};

// The multipliers of whole rows
template <typename acc_t>
void draw_rows(const Dropout& dropout,
               int64_t first_row,
               int64_t rows,
               int64_t columns,
               acc_t* multiplier) {
  const Draws draws(dropout);
  for (int64_t row = 0; row < rows; ++row) {
    acc_t* to = multiplier + row * columns;
    int64_t column = 0;
    for (; column + kDropoutBlock <= columns; column += kDropoutBlock) {
      draws.block(first_row + row, column / kDropoutBlock, to + column);
    }
    if (column < columns) {
      acc_t tail[kDropoutBlock];
      draws.block(first_row + row, column / kDropoutBlock, tail);
      std::copy(tail, tail + (columns - column), to + column);
    }
  }
}

// Memory that stays with the thread, as fresh pages would cost more than the work done in them, on
// cache lines, as loads that cross them take twice as long. No standard container: its code would
// be shared with other instruction sets.
template <typename acc_t>
class Scratch {
 public:
  ~Scratch() { free(); }

  acc_t* reserve(int64_t count) {
    if (count > capacity_) {
      free();
      memory_ = nullptr;
      capacity_ = 0;
      memory_ = static_cast<acc_t*>(::operator new(sizeof(acc_t) * count, kAlignment));
      capacity_ = count;
    }
    return memory_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void free() { ::operator delete(memory_, kAlignment); }

  acc_t* memory_ = nullptr;
  int64_t capacity_ = 0;
};

// Reads panels as acc_t: the caller's own memory where nothing is to be done, else a copy. The
// multipliers themselves are kept, for mask(), only where KEEPS_MASK.
template <typename scalar_t, typename acc_t, bool KEEPS_MASK = false>
class Panel {
 public:
  explicit Panel(const Dropout& dropout) : active_(dropout.active()), draws_(dropout) {}

  // X ∘ M of the given panel of X, whose first row and column are those of the whole matrix
  ConstView<acc_t> read(ConstView<scalar_t> x,
                        int64_t first_row,
                        int64_t rows,
                        int64_t first_column,
                        int64_t columns) {
    if (active_) {
      const Memory own = memory();
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < columns; c += kDropoutBlock) {
          read_block(x.row(i) + c, first_row + i, (first_column + c) / kDropoutBlock,
                     std::min<int64_t>(kDropoutBlock, columns - c), own.values + i * kStride + c,
                     own.mask + (KEEPS_MASK ? i * kStride + c : 0));
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
  ConstView<acc_t> mask() const {
    static_assert(KEEPS_MASK);
    return {active_ ? memory().mask : nullptr, kStride};
  }

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

  // `count` columns of one block of one row; a whole block's worth of mask is written.
  void read_block(const scalar_t* x,
                  int64_t row,
                  int64_t block,
                  int64_t count,
                  acc_t* values,
                  acc_t* mask) const {
    if constexpr (std::is_same_v<acc_t, float>) {
      if (count == kDropoutBlock) {
        draws_.block(row, block, [&](int at, const Vec<float>& multiplier) GAUGE_EXT_INLINE {
          if constexpr (KEEPS_MASK) {
            store<float>(mask + at, multiplier);
          }
          store<float>(values + at, load_as<scalar_t, float>(x + at) * multiplier);
        });
        return;
      }
    }
    draws_.block(row, block, mask);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = to_acc(x[i]) * mask[i];
    }
  }

  bool active_;
  Draws draws_;
};

}  // namespace
}  // namespace gauge_ext
