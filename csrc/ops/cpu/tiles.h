#pragma once

// The register tiles of the skinny products, over panels in acc_t. A panel is row-major without
// gaps; X is (rows, columns), R is (rank, columns), L is (rows, rank), S is (rank, columns).

#include <algorithm>
#include <cstdint>

#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// With 3 x 4 accumulators and their operands 16 registers are full, and a load feeds more than one
// multiply-add; 32 registers hold 4 x 4.
constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
constexpr int kDotRank = 4;
constexpr int kExpandRows = 4;
constexpr int kExpandVectors = 2;
constexpr int kReduceRows = 4;
constexpr int kReduceRank = 2;

// S is walked in pieces of so many bytes a row, which stay in the first-level cache over the panel.
constexpr int64_t kReduceBytes = 1024;

// H[i, j] = sum_c X[i, c] R[j, c] for ROWS x RANK of them
template <int ROWS, int RANK, typename acc_t>
void dot_tile(const acc_t* x, const acc_t* right, int64_t columns, acc_t* hidden, int64_t rank) {
  Vec<acc_t> sum[ROWS][RANK] = {};
  int64_t column = 0;
  for (; column + kWidth<acc_t> <= columns; column += kWidth<acc_t>) {
    Vec<acc_t> r[RANK];
    for (int j = 0; j < RANK; ++j) {
      r[j] = load<acc_t>(right + j * columns + column);
    }
    for (int i = 0; i < ROWS; ++i) {
      const Vec<acc_t> value = load<acc_t>(x + i * columns + column);
      for (int j = 0; j < RANK; ++j) {
        sum[i][j] += value * r[j];
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < RANK; ++j) {
      acc_t total = horizontal_sum<acc_t>(sum[i][j]);
      for (int64_t c = column; c < columns; ++c) {
        total += x[i * columns + c] * right[j * columns + c];
      }
      hidden[i * rank + j] = total;
    }
  }
}

template <int ROWS, typename acc_t>
void dot_rows(const acc_t* x, const acc_t* right, int64_t columns, acc_t* hidden, int64_t rank) {
  int64_t j = 0;
  for (; j + kDotRank <= rank; j += kDotRank) {
    dot_tile<ROWS, kDotRank>(x, right + j * columns, columns, hidden + j, rank);
  }
  for (; j < rank; ++j) {
    dot_tile<ROWS, 1>(x, right + j * columns, columns, hidden + j, rank);
  }
}

// H = X Rᵀ
template <typename acc_t>
void dot_panel(const acc_t* x,
               int64_t rows,
               int64_t columns,
               const acc_t* right,
               int64_t rank,
               acc_t* hidden) {
  int64_t i = 0;
  for (; i + kDotRows <= rows; i += kDotRows) {
    dot_rows<kDotRows>(x + i * columns, right, columns, hidden + i * rank, rank);
  }
  for (; i < rows; ++i) {
    dot_rows<1>(x + i * columns, right, columns, hidden + i * rank, rank);
  }
}

// What `expand` adds its product to, and what it multiplies it with first.
template <typename acc_t>
struct Expand {
  acc_t scale;
  const acc_t* mask;  // (rows, columns), or null: ones
  const acc_t* bias;  // (columns), or null: zeros; not used when adding
  bool add;           // Y += ..., instead of Y = bias + ...
};

// Y = bias + scale · L R ∘ M, or Y += the same, for ROWS x VECTORS registers summed over the rank
template <int ROWS, int VECTORS, typename scalar_t, typename acc_t>
void expand_tile(scalar_t* y,
                 int64_t column,
                 int64_t columns,
                 const acc_t* left,
                 const acc_t* right,
                 int64_t rank,
                 const Expand<acc_t>& how) {
  Vec<acc_t> sum[ROWS][VECTORS] = {};
  for (int64_t j = 0; j < rank; ++j) {
    Vec<acc_t> r[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      r[v] = load<acc_t>(right + j * columns + column + v * kWidth<acc_t>);
    }
    for (int i = 0; i < ROWS; ++i) {
      const acc_t l = left[i * rank + j];
      for (int v = 0; v < VECTORS; ++v) {
        sum[i][v] += l * r[v];
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t c = column + v * kWidth<acc_t>;
      Vec<acc_t> value = sum[i][v] * how.scale;
      if (how.mask != nullptr) {
        value *= load<acc_t>(how.mask + i * columns + c);
      }
      scalar_t* to = y + i * columns + c;
      if (how.add) {
        value += load_as<scalar_t, acc_t>(to);
      } else if (how.bias != nullptr) {
        value += load<acc_t>(how.bias + c);
      }
      store_as<scalar_t, acc_t>(to, value);
    }
  }
}

template <int ROWS, typename scalar_t, typename acc_t>
void expand_rows(scalar_t* y,
                 int64_t columns,
                 const acc_t* left,
                 const acc_t* right,
                 int64_t rank,
                 const Expand<acc_t>& how) {
  constexpr int64_t kStep = kExpandVectors * kWidth<acc_t>;
  int64_t c = 0;
  for (; c + kStep <= columns; c += kStep) {
    expand_tile<ROWS, kExpandVectors>(y, c, columns, left, right, rank, how);
  }
  for (; c + kWidth<acc_t> <= columns; c += kWidth<acc_t>) {
    expand_tile<ROWS, 1>(y, c, columns, left, right, rank, how);
  }
  for (; c < columns; ++c) {
    for (int i = 0; i < ROWS; ++i) {
      acc_t value = 0;
      for (int64_t j = 0; j < rank; ++j) {
        value += left[i * rank + j] * right[j * columns + c];
      }
      value *= how.mask == nullptr ? how.scale : how.scale * how.mask[i * columns + c];
      scalar_t* to = y + i * columns + c;
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
void expand_panel(scalar_t* y,
                  int64_t rows,
                  int64_t columns,
                  const acc_t* left,
                  const acc_t* right,
                  int64_t rank,
                  const Expand<acc_t>& how) {
  const auto from = [&](int64_t i) {
    Expand<acc_t> part = how;
    part.mask = how.mask == nullptr ? nullptr : how.mask + i * columns;
    return part;
  };
  int64_t i = 0;
  for (; i + kExpandRows <= rows; i += kExpandRows) {
    expand_rows<kExpandRows>(y + i * columns, columns, left + i * rank, right, rank, from(i));
  }
  for (; i < rows; ++i) {
    expand_rows<1>(y + i * columns, columns, left + i * rank, right, rank, from(i));
  }
}

// S[j, c] += sum_i L[i, j] X[i, c] for ROWS x RANK weights held in registers, along `width` columns
template <int ROWS, int RANK, typename acc_t>
void reduce_tile(const acc_t* x,
                 int64_t width,
                 int64_t columns,
                 const acc_t* left,
                 int64_t rank,
                 acc_t* sum) {
  Vec<acc_t> l[ROWS][RANK];
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < RANK; ++j) {
      l[i][j] = Vec<acc_t>{} + left[i * rank + j];
    }
  }
  int64_t c = 0;
  for (; c + kWidth<acc_t> <= width; c += kWidth<acc_t>) {
    Vec<acc_t> s[RANK];
    for (int j = 0; j < RANK; ++j) {
      s[j] = load<acc_t>(sum + j * columns + c);
    }
    for (int i = 0; i < ROWS; ++i) {
      const Vec<acc_t> value = load<acc_t>(x + i * columns + c);
      for (int j = 0; j < RANK; ++j) {
        s[j] += l[i][j] * value;
      }
    }
    for (int j = 0; j < RANK; ++j) {
      store<acc_t>(sum + j * columns + c, s[j]);
    }
  }
  for (; c < width; ++c) {
    for (int j = 0; j < RANK; ++j) {
      acc_t total = sum[j * columns + c];
      for (int i = 0; i < ROWS; ++i) {
        total += left[i * rank + j] * x[i * columns + c];
      }
      sum[j * columns + c] = total;
    }
  }
}

template <int ROWS, typename acc_t>
void reduce_rows(const acc_t* x,
                 int64_t width,
                 int64_t columns,
                 const acc_t* left,
                 int64_t rank,
                 acc_t* sum) {
  int64_t j = 0;
  for (; j + kReduceRank <= rank; j += kReduceRank) {
    reduce_tile<ROWS, kReduceRank>(x, width, columns, left + j, rank, sum + j * columns);
  }
  for (; j < rank; ++j) {
    reduce_tile<ROWS, 1>(x, width, columns, left + j, rank, sum + j * columns);
  }
}

// S += Lᵀ X
template <typename acc_t>
void reduce_panel(const acc_t* x,
                  int64_t rows,
                  int64_t columns,
                  const acc_t* left,
                  int64_t rank,
                  acc_t* sum) {
  constexpr int64_t kStep = kReduceBytes / sizeof(acc_t);
  for (int64_t c = 0; c < columns; c += kStep) {
    const int64_t width = std::min(kStep, columns - c);
    int64_t i = 0;
    for (; i + kReduceRows <= rows; i += kReduceRows) {
      const acc_t* from = x + i * columns + c;
      reduce_rows<kReduceRows>(from, width, columns, left + i * rank, rank, sum + c);
    }
    for (; i < rows; ++i) {
      reduce_rows<1>(x + i * columns + c, width, columns, left + i * rank, rank, sum + c);
    }
  }
}

}  // namespace
}  // namespace gauge_ext
