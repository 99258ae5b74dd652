#pragma once

// Panels: a few rows of a large matrix at a time, converted to acc_t and masked where need be, so
// that what follows reads them from the cache as often as it likes.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "math/dropout.h"
#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// A panel of about this many bytes stays in the second-level cache while it is read twice.
constexpr int64_t kPanelBytes = 96 * 1024;

template <typename acc_t>
int64_t panel_rows(int64_t rows, int64_t columns) {
  const int64_t fitting = kPanelBytes / (std::max<int64_t>(columns, 1) * sizeof(acc_t));
  return std::min(rows, std::clamp<int64_t>(fitting / 12 * 12, 12, 96));
}

// Calls body(first, count) for the panels of `rows`.
template <typename acc_t, typename F>
void for_each_panel(int64_t rows, int64_t columns, const F& body) {
  const int64_t step = panel_rows<acc_t>(rows, columns);
  for (int64_t row = 0; row < rows; row += step) {
    body(row, std::min(step, rows - row));
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
  Words lane = {};
  for (int i = 0; i < kWords; ++i) {
    lane[i] = static_cast<uint32_t>(i);
  }
  for (int first = 0; first < kDropoutLanes; first += kWords) {
    Words words[4];
    const Words counter = lane + static_cast<uint32_t>(block * kDropoutLanes + first);
    dropout_words<MultiplyWideWords>(dropout, row, counter, words);
    for (int word = 0; word < 4; ++word) {
      float* even = multiplier + 2 * word * kDropoutLanes + first;
      // Comparing gives all ones where true.
      const Words low = reinterpret_cast<Words>((words[word] & 0xFFFFu) >= dropout.threshold);
      const Words high = reinterpret_cast<Words>((words[word] >> 16) >= dropout.threshold);
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

// Reads rows as acc_t: the caller's own memory where nothing is to be done, else a copy.
template <typename scalar_t, typename acc_t>
class Panel {
 public:
  Panel(int64_t rows, int64_t columns, const Dropout& dropout)
      : columns_(columns), dropout_(dropout) {
    const bool copies = dropout.active() || !std::is_same_v<scalar_t, acc_t>;
    if (copies) {
      static thread_local Scratch<acc_t> scratch;
      values_ = scratch.reserve(rows * columns * (dropout.active() ? 2 : 1));
    }
    if (dropout.active()) {
      mask_ = values_ + rows * columns;
    }
  }

  // X ∘ M of the given rows
  const acc_t* read(const scalar_t* x, int64_t first_row, int64_t rows) {
    const int64_t count = rows * columns_;
    if (dropout_.active()) {
      draw_rows(dropout_, first_row, rows, columns_, mask_);
      for (int64_t i = 0; i < count; ++i) {
        values_[i] = to_acc(x[i]) * mask_[i];
      }
      return values_;
    }
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return x;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        values_[i] = to_acc(x[i]);
      }
      return values_;
    }
  }

  // The multipliers of the rows last read, or null without dropout
  const acc_t* mask() const { return mask_; }

 private:
  int64_t columns_;
  const Dropout& dropout_;
  acc_t* values_ = nullptr;
  acc_t* mask_ = nullptr;
};

}  // namespace
}  // namespace gauge_ext
