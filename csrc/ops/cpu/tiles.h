#pragma once

// The register tiles of the skinny products, over panels in acc_t: X is (rows, width), R is
// (rank, width), L is (rows, rank), S is (rank, width). All are row-major; all but L and H may be
// parts of wider matrices.

#include <algorithm>
#include <cstdint>

#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// The upper left corner of a row-major matrix whose rows lie `stride` elements apart.
template <typename T>
struct View {
  T* data;
  int64_t stride;

  T* row(int64_t i) const { return data + i * stride; }
  View from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};
template <typename T>
using ConstView = View<const T>;

// With 3 x 4 accumulators and their operands 16 registers are full, and a load feeds more than one
// multiply-add; 32 registers hold more.
constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
constexpr int kDotRank = 4;
constexpr int kExpandRows = kVectorRegisters == 32 ? 8 : 6;
constexpr int kExpandVectors = 2;
constexpr int kReduceRank = 4;
constexpr int kReduceVectors = kVectorRegisters == 32 ? 4 : 3;

// H[i, j] = sum_c X[i, c] R[j, c], or, where `add`, H += the same, for ROWS x RANK of them
template <int ROWS, int RANK, typename right_t, typename acc_t>
void dot_tile(ConstView<acc_t> x,
              ConstView<right_t> right,
              int64_t width,
              bool add,
              acc_t* hidden,
              int64_t rank) {
  Vec<acc_t> sum[ROWS][RANK];
  repeat<ROWS * RANK>([&](int n) GAUGE_EXT_INLINE { sum[n / RANK][n % RANK] = Vec<acc_t>{}; });
  int64_t column = 0;
  for (; column + kWidth<acc_t> <= width; column += kWidth<acc_t>) {
    // The fewer operands wait in registers for the others, which come one by one.
    if constexpr (ROWS < RANK) {
      Vec<acc_t> value[ROWS];
      repeat<ROWS>([&](int i) GAUGE_EXT_INLINE { value[i] = load<acc_t>(x.row(i) + column); });
      repeat<RANK>([&](int j) GAUGE_EXT_INLINE {
        const Vec<acc_t> r = load_as<right_t, acc_t>(right.row(j) + column);
        repeat<ROWS>([&](int i) GAUGE_EXT_INLINE { sum[i][j] += value[i] * r; });
      });
    } else {
      Vec<acc_t> r[RANK];
      repeat<RANK>([&](int j)
                       GAUGE_EXT_INLINE { r[j] = load_as<right_t, acc_t>(right.row(j) + column); });
      repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
        const Vec<acc_t> value = load<acc_t>(x.row(i) + column);
        repeat<RANK>([&](int j) GAUGE_EXT_INLINE { sum[i][j] += value * r[j]; });
      });
    }
  }
  repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
    acc_t total[RANK];
    horizontal_sums<RANK, acc_t>(sum[i], total);
    for (int j = 0; j < RANK; ++j) {
      for (int64_t c = column; c < width; ++c) {
        total[j] += x.row(i)[c] * to_acc(right.row(j)[c]);
      }
      acc_t* to = hidden + i * rank + j;
      *to = add ? *to + total[j] : total[j];
    }
  });
}

template <int ROWS, typename acc_t>
void dot_rows(ConstView<acc_t> x,
              ConstView<acc_t> right,
              int64_t width,
              bool add,
              acc_t* hidden,
              int64_t rank) {
  int64_t j = 0;
  for (; j + kDotRank <= rank; j += kDotRank) {
    dot_tile<ROWS, kDotRank>(x, right.from(j, 0), width, add, hidden + j, rank);
  }
  for (; j < rank; ++j) {
    dot_tile<ROWS, 1>(x, right.from(j, 0), width, add, hidden + j, rank);
  }
}

// H = X Rᵀ, or H += X Rᵀ
template <typename acc_t>
void dot_panel(ConstView<acc_t> x,
               int64_t rows,
               int64_t width,
               ConstView<acc_t> right,
               int64_t rank,
               bool add,
               acc_t* hidden) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows) {
    dot_rows<kDotRows>(x.from(i, 0), right, width, add, hidden + i * rank, rank);
  }
  for (; i < rows; ++i) {
    dot_rows<1>(x.from(i, 0), right, width, add, hidden + i * rank, rank);
  }
}

// What `expand` adds its product to, and what it multiplies it with first.
template <typename acc_t>
struct Expand {
  acc_t scale;
  ConstView<acc_t> mask;  // (rows, width), or null: ones
  const acc_t* bias;      // (width), or null: zeros; not used when adding
  bool add;               // Y += ..., instead of Y = bias + ...
};

// Y = bias + scale · L R ∘ M, or Y += the same, for ROWS x VECTORS registers summed over the rank
template <int ROWS, int VECTORS, typename scalar_t, typename acc_t>
void expand_tile(View<scalar_t> y,
                 int64_t column,
                 const acc_t* left,
                 ConstView<acc_t> right,
                 int64_t rank,
                 const Expand<acc_t>& how) {
  // A sum that starts from the bias saves a pass over the tile.
  const bool plain = !how.add && how.mask.data == nullptr && how.scale == acc_t(1);
  const acc_t* start = plain ? how.bias : nullptr;
  Vec<acc_t> sum[ROWS][VECTORS];
  repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
    const Vec<acc_t> first =
        start != nullptr ? load<acc_t>(start + column + v * kWidth<acc_t>) : Vec<acc_t>{};
    repeat<ROWS>([&](int i) GAUGE_EXT_INLINE { sum[i][v] = first; });
  });
  for (int64_t j = 0; j < rank; ++j) {
    Vec<acc_t> r[VECTORS];
    repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
      r[v] = load<acc_t>(right.row(j) + column + v * kWidth<acc_t>);
    });
    repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
      const acc_t l = left[i * rank + j];
      repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE { sum[i][v] += l * r[v]; });
    });
  }
  repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
    repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
      const int64_t c = column + v * kWidth<acc_t>;
      scalar_t* to = y.row(i) + c;
      Vec<acc_t> value = sum[i][v];
      if (!plain) {
        value *= how.scale;
        if (how.mask.data != nullptr) {
          value *= load<acc_t>(how.mask.row(i) + c);
        }
        if (how.add) {
          value += load_as<scalar_t, acc_t>(to);
        } else if (how.bias != nullptr) {
          value += load<acc_t>(how.bias + c);
        }
      }
      store_as<scalar_t, acc_t>(to, value);
    });
  });
}

template <int ROWS, typename scalar_t, typename acc_t>
void expand_rows(View<scalar_t> y,
                 int64_t width,
                 const acc_t* left,
                 ConstView<acc_t> right,
                 int64_t rank,
                 const Expand<acc_t>& how) {
  constexpr int64_t kStep = kExpandVectors * kWidth<acc_t>;
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    expand_tile<ROWS, kExpandVectors>(y, c, left, right, rank, how);
  }
  for (; c + kWidth<acc_t> <= width; c += kWidth<acc_t>) {
    expand_tile<ROWS, 1>(y, c, left, right, rank, how);
  }
  for (; c < width; ++c) {
    for (int i = 0; i < ROWS; ++i) {
      acc_t value = 0;
      for (int64_t j = 0; j < rank; ++j) {
        value += left[i * rank + j] * right.row(j)[c];
      }
      value *= how.mask.data == nullptr ? how.scale : how.scale * how.mask.row(i)[c];
      scalar_t* to = y.row(i) + c;
      if (how.add) {
        value += to_acc(*to);
      } else if (how.bias != nullptr) {
        value += how.bias[c];
      }
      *to = from_acc<scalar_t>(value);
    }
  }
}

// Y = bias + scale · L R ∘ M, or Y += the same
template <typename scalar_t, typename acc_t>
void expand_panel(View<scalar_t> y,
                  int64_t rows,
                  int64_t width,
                  const acc_t* left,
                  ConstView<acc_t> right,
                  int64_t rank,
                  const Expand<acc_t>& how) {
  const auto from = [&](int64_t i) {
    Expand<acc_t> part = how;
    part.mask = how.mask.data == nullptr ? how.mask : how.mask.from(i, 0);
    return part;
  };
  int64_t i = 0;
  for (; i + kExpandRows <= rows; i += kExpandRows) {
    expand_rows<kExpandRows>(y.from(i, 0), width, left + i * rank, right, rank, from(i));
  }
  for (; i < rows; ++i) {
    expand_rows<1>(y.from(i, 0), width, left + i * rank, right, rank, from(i));
  }
}

// S[j, c] += sum_i L[i, j] X[i, c] for RANK x VECTORS sums held in registers, over all rows
template <int RANK, int VECTORS, typename acc_t>
void reduce_tile(ConstView<acc_t> x,
                 int64_t rows,
                 const acc_t* left,
                 int64_t rank,
                 View<acc_t> sum) {
  Vec<acc_t> s[RANK][VECTORS];
  repeat<RANK * VECTORS>([&](int n) GAUGE_EXT_INLINE {
    const int j = n / VECTORS, v = n % VECTORS;
    s[j][v] = load<acc_t>(sum.row(j) + v * kWidth<acc_t>);
  });
  for (int64_t i = 0; i < rows; ++i) {
    Vec<acc_t> value[VECTORS];
    repeat<VECTORS>([&](int v)
                        GAUGE_EXT_INLINE { value[v] = load<acc_t>(x.row(i) + v * kWidth<acc_t>); });
    repeat<RANK>([&](int j) GAUGE_EXT_INLINE {
      const acc_t l = left[i * rank + j];
      repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE { s[j][v] += l * value[v]; });
    });
  }
  repeat<RANK * VECTORS>([&](int n) GAUGE_EXT_INLINE {
    const int j = n / VECTORS, v = n % VECTORS;
    store<acc_t>(sum.row(j) + v * kWidth<acc_t>, s[j][v]);
  });
}

template <int VECTORS, typename acc_t>
void reduce_strip(ConstView<acc_t> x,
                  int64_t rows,
                  const acc_t* left,
                  int64_t rank,
                  View<acc_t> sum) {
  int64_t j = 0;
  for (; j + kReduceRank <= rank; j += kReduceRank) {
    reduce_tile<kReduceRank, VECTORS>(x, rows, left + j, rank, sum.from(j, 0));
  }
  for (; j < rank; ++j) {
    reduce_tile<1, VECTORS>(x, rows, left + j, rank, sum.from(j, 0));
  }
}

// S += Lᵀ X
template <typename acc_t>
void reduce_panel(ConstView<acc_t> x,
                  int64_t rows,
                  int64_t width,
                  const acc_t* left,
                  int64_t rank,
                  View<acc_t> sum) {
  constexpr int64_t kStep = kReduceVectors * kWidth<acc_t>;
  int64_t c = 0;
  for (; c + kStep <= width; c += kStep) {
    reduce_strip<kReduceVectors>(x.from(0, c), rows, left, rank, sum.from(0, c));
  }
  for (; c + kWidth<acc_t> <= width; c += kWidth<acc_t>) {
    reduce_strip<1>(x.from(0, c), rows, left, rank, sum.from(0, c));
  }
  for (; c < width; ++c) {
    for (int64_t j = 0; j < rank; ++j) {
      acc_t total = sum.row(j)[c];
      for (int64_t i = 0; i < rows; ++i) {
        total += left[i * rank + j] * x.row(i)[c];
      }
      sum.row(j)[c] = total;
    }
  }
}

}  // namespace
}  // namespace gauge_ext
