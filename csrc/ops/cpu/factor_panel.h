#pragma once

// A factor or its gradient as panels: (rank, width) in acc_t, one vector in each column, whether
// the factor has its vectors in columns, as A, or in rows, as B.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "math/storage.h"
#include "ops/cpu/triangle.h"

namespace gauge_ext {
namespace {

// The part of the vectors that a panel holds. Columns from `count` to `width` are zero.
struct PanelRange {
  int64_t first;
  int64_t count;
  int64_t width;
};

template <typename acc_t>
int64_t panel_width(int64_t count) {
  constexpr int64_t kUnit = kTriangleVectors * kWidth<acc_t>;
  return (count + kUnit - 1) / kUnit * kUnit;
}

template <typename acc_t>
void clear_columns(acc_t* panel, int64_t rank, const PanelRange& range) {
  for (int64_t k = 0; k < rank; ++k) {
    std::fill(panel + k * range.width + range.count, panel + (k + 1) * range.width, acc_t(0));
  }
}

template <typename scalar_t>
struct FactorVectors {
  using acc_t = typename AccOf<std::remove_const_t<scalar_t>>::type;

  scalar_t* data;
  int64_t rank;
  int64_t length;  // the number of vectors
  bool in_rows;

  void read(const PanelRange& range, acc_t* panel) const {
    clear_columns(panel, rank, range);
    if (!in_rows) {
      for (int64_t k = 0; k < rank; ++k) {
        const scalar_t* from = data + k * length + range.first;
        acc_t* to = panel + k * range.width;
        for (int64_t i = 0; i < range.count; ++i) {
          to[i] = widen(from[i]);
        }
      }
      return;
    }
    const int64_t width = range.width;
    const scalar_t* rows = data + range.first * rank;
    for_each_block(range.count, [&](int64_t begin, int64_t end) {
      int64_t k = 0;
      for (; k + 4 <= rank; k += 4) {
        acc_t* to = panel + k * width;
        for (int64_t i = begin; i < end; ++i) {
          const scalar_t* from = rows + i * rank + k;
          to[i] = widen(from[0]);
          to[width + i] = widen(from[1]);
          to[2 * width + i] = widen(from[2]);
          to[3 * width + i] = widen(from[3]);
        }
      }
      for (; k < rank; ++k) {
        for (int64_t i = begin; i < end; ++i) {
          panel[k * width + i] = widen(rows[i * rank + k]);
        }
      }
    });
  }

  // Fetches what the panel after this one has in the place of (k, c), or as much of other columns.
  void prefetch_next(const PanelRange& range, int64_t k, int64_t c) const {
    const int64_t next = range.first + range.count;
    prefetch(in_rows ? data + next * rank + k * range.width + c : data + k * length + next + c);
  }

  void write(const PanelRange& range, const acc_t* panel) const {
    if (!in_rows) {
      for (int64_t k = 0; k < rank; ++k) {
        const acc_t* from = panel + k * range.width;
        scalar_t* to = data + k * length + range.first;
        for (int64_t i = 0; i < range.count; ++i) {
          to[i] = narrow<scalar_t>(from[i]);
        }
      }
      return;
    }
    const int64_t width = range.width;
    scalar_t* rows = data + range.first * rank;
    for_each_block(range.count, [&](int64_t begin, int64_t end) {
      int64_t k = 0;
      for (; k + 4 <= rank; k += 4) {
        const acc_t* from = panel + k * width;
        for (int64_t i = begin; i < end; ++i) {
          scalar_t* to = rows + i * rank + k;
          to[0] = narrow<scalar_t>(from[i]);
          to[1] = narrow<scalar_t>(from[width + i]);
          to[2] = narrow<scalar_t>(from[2 * width + i]);
          to[3] = narrow<scalar_t>(from[3 * width + i]);
        }
      }
      for (; k < rank; ++k) {
        for (int64_t i = begin; i < end; ++i) {
          rows[i * rank + k] = narrow<scalar_t>(panel[k * width + i]);
        }
      }
    });
  }

 private:
  // Vectors that fill a cache line of each row of a panel: the factor's rows are then read one
  // after the other, and a panel's lines once.
  template <typename F>
  static void for_each_block(int64_t count, const F& body) {
    constexpr int64_t kBlock = 64 / static_cast<int64_t>(sizeof(acc_t));
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      body(begin, std::min(begin + kBlock, count));
    }
  }
};

// Rows of a kept (rank, length) matrix to a panel
template <typename acc_t>
void read_kept(const acc_t* kept, int64_t length, int64_t rank, const PanelRange& p, acc_t* panel) {
  for (int64_t k = 0; k < rank; ++k) {
    const acc_t* from = kept + k * length + p.first;
    std::copy(from, from + p.count, panel + k * p.width);
  }
  clear_columns(panel, rank, p);
}

// One vector of a panel to where its columns are kept
template <typename acc_t>
inline GAUGE_EXT_INLINE void store_kept(const Vec<acc_t>& value,
                                        int64_t k,
                                        int64_t c,
                                        const PanelRange& p,
                                        int64_t length,
                                        acc_t* kept) {
  acc_t* to = kept + k * length + p.first + c;
  if (c + kWidth<acc_t> <= p.count) {
    store<acc_t>(to, value);
    return;
  }
  acc_t lanes[kWidth<acc_t>];
  store<acc_t>(lanes, value);
  for (int64_t lane = 0; lane < kWidth<acc_t> && c + lane < p.count; ++lane) {
    to[lane] = lanes[lane];
  }
}

}  // namespace
}  // namespace gauge_ext
