#pragma once

// Products of panels with r x r triangular matrices, and Gram matrices of panels, in register
// tiles. E is (rank, stride) with zeros from column `rank` on; `stride` is a multiple of the vector
// width.

#include <cstdint>

#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

enum class Triangle { kUpper, kLower };  // which half of E is not zero

// 6 x 2 accumulators and their operands fit 16 registers.
constexpr int kTriangleRows = 6;
constexpr int kTriangleVectors = 2;

template <typename acc_t>
constexpr int64_t padded(int64_t count) {
  return (count + kWidth<acc_t> - 1) / kWidth<acc_t> * kWidth<acc_t>;
}

// Hands out(i, c, Y[i, c]), Y[i, c] = sum over k in [from, to) of X[i, k] E[k, c], for ROWS rows
// and VECTORS vectors of c
template <int ROWS, int VECTORS, typename acc_t, typename F>
void right_tile(const acc_t* x,
                int64_t x_stride,
                const acc_t* e,
                int64_t stride,
                int64_t from,
                int64_t to,
                int64_t row,
                int64_t column,
                const F& out) {
  Vec<acc_t> sum[ROWS][VECTORS];
  set_zero(sum);
  for (int64_t k = from; k < to; ++k) {
    Vec<acc_t> right[VECTORS];
    repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
      right[v] = load<acc_t>(e + k * stride + v * kWidth<acc_t>);
    });
    repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
      const acc_t left = x[i * x_stride + k];
      repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE { sum[i][v] += left * right[v]; });
    });
  }
  repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
    repeat<VECTORS>([&](int v)
                        GAUGE_EXT_INLINE { out(row + i, column + v * kWidth<acc_t>, sum[i][v]); });
  });
}

template <int VECTORS, typename acc_t, typename F>
void right_strip(const acc_t* x,
                 int64_t x_stride,
                 int64_t rows,
                 const acc_t* e,
                 int64_t stride,
                 int64_t from,
                 int64_t to,
                 int64_t column,
                 const F& out) {
  int64_t i = 0;
  for (; i + kTriangleRows <= rows; i += kTriangleRows) {
    right_tile<kTriangleRows, VECTORS>(x + i * x_stride, x_stride, e, stride, from, to, i, column,
                                       out);
  }
  for (; i < rows; ++i) {
    right_tile<1, VECTORS>(x + i * x_stride, x_stride, e, stride, from, to, i, column, out);
  }
}

// Hands out(i, c, vector) each vector of Y = X E from (i, c) on: X is (rows, rank), Y is
// (rows, stride)
template <typename acc_t, typename F>
void right_product(const acc_t* x,
                   int64_t x_stride,
                   int64_t rows,
                   const acc_t* e,
                   int64_t rank,
                   int64_t stride,
                   Triangle triangle,
                   const F& out) {
  constexpr int64_t kStep = kTriangleVectors * kWidth<acc_t>;
  const bool upper = triangle == Triangle::kUpper;
  int64_t c = 0;
  for (; c + kStep <= stride; c += kStep) {
    const int64_t end = c + kStep < rank ? c + kStep : rank;
    right_strip<kTriangleVectors>(x, x_stride, rows, e + c, stride, upper ? 0 : c,
                                  upper ? end : rank, c, out);
  }
  for (; c < stride; c += kWidth<acc_t>) {
    right_strip<1>(x, x_stride, rows, e + c, stride, upper ? 0 : c, rank, c, out);
  }
}

// Hands out(j, c, Y[j, c]), Y[j, c] = sum over k in [from, to) of E[k, j] X[k, c], for ROWS rows j
// and two vectors of c
template <int ROWS, typename acc_t, typename F>
void left_tile(const acc_t* x,
               int64_t width,
               const acc_t* e,
               int64_t stride,
               int64_t from,
               int64_t to,
               int64_t row,
               int64_t column,
               const F& out) {
  Vec<acc_t> sum[ROWS][kTriangleVectors];
  set_zero(sum);
  for (int64_t k = from; k < to; ++k) {
    Vec<acc_t> right[kTriangleVectors];
    repeat<kTriangleVectors>(
        [&](int v) GAUGE_EXT_INLINE { right[v] = load<acc_t>(x + k * width + v * kWidth<acc_t>); });
    repeat<ROWS>([&](int j) GAUGE_EXT_INLINE {
      const acc_t left = e[k * stride + j];
      repeat<kTriangleVectors>([&](int v) GAUGE_EXT_INLINE { sum[j][v] += left * right[v]; });
    });
  }
  repeat<ROWS>([&](int j) GAUGE_EXT_INLINE {
    repeat<kTriangleVectors>(
        [&](int v) GAUGE_EXT_INLINE { out(row + j, column + v * kWidth<acc_t>, sum[j][v]); });
  });
}

template <int ROWS, typename acc_t, typename F>
void left_strip(const acc_t* x,
                int64_t width,
                const acc_t* e,
                int64_t stride,
                int64_t from,
                int64_t to,
                int64_t row,
                const F& out) {
  for (int64_t c = 0; c < width; c += kTriangleVectors * kWidth<acc_t>) {
    left_tile<ROWS>(x + c, width, e, stride, from, to, row, c, out);
  }
}

// Hands out(j, c, vector) each vector of Y = Eᵀ X from (j, c) on: X and Y are (rank, width), width
// a multiple of two vectors
template <typename acc_t, typename F>
void left_product(const acc_t* x,
                  int64_t width,
                  const acc_t* e,
                  int64_t rank,
                  int64_t stride,
                  Triangle triangle,
                  const F& out) {
  const bool upper = triangle == Triangle::kUpper;
  int64_t j = 0;
  for (; j + kTriangleRows <= rank; j += kTriangleRows) {
    left_strip<kTriangleRows>(x, width, e + j, stride, upper ? 0 : j,
                              upper ? j + kTriangleRows : rank, j, out);
  }
  if (j + 4 <= rank) {
    left_strip<4>(x, width, e + j, stride, upper ? 0 : j, upper ? j + 4 : rank, j, out);
    j += 4;
  }
  for (; j + 2 <= rank; j += 2) {
    left_strip<2>(x, width, e + j, stride, upper ? 0 : j, upper ? j + 2 : rank, j, out);
  }
  for (; j < rank; ++j) {
    left_strip<1>(x, width, e + j, stride, upper ? 0 : j, upper ? j + 1 : rank, j, out);
  }
}

// Stores what a product hands out into rows that lie `stride` apart.
template <typename acc_t>
struct StoreTo {
  acc_t* y;
  int64_t stride;

  inline GAUGE_EXT_INLINE void operator()(int64_t i, int64_t c, const Vec<acc_t>& value) const {
    store<acc_t>(y + i * stride + c, value);
  }
};

// S[j, c] += sum_i X[i, j] X[i, c] for ROWS values of j and VECTORS vectors of c
template <int ROWS, int VECTORS>
void gram_tile(const double* x,
               int64_t rows,
               int64_t stride,
               int64_t j,
               int64_t c,
               double* sum,
               int64_t count) {
  Vec<double> total[ROWS][VECTORS];
  set_zero(total);
  for (int64_t i = 0; i < rows; ++i) {
    const double* row = x + i * stride;
    Vec<double> right[VECTORS];
    repeat<VECTORS>(
        [&](int v) GAUGE_EXT_INLINE { right[v] = load<double>(row + c + v * kWidth<double>); });
    repeat<ROWS>([&](int a) GAUGE_EXT_INLINE {
      const double left = row[j + a];
      repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE { total[a][v] += left * right[v]; });
    });
  }
  repeat<ROWS>([&](int a) GAUGE_EXT_INLINE {
    repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
      const int64_t column = c + v * kWidth<double>;
      double* to = sum + (j + a) * count + column;
      if (j + a < count && column + kWidth<double> <= count) {
        store<double>(to, load<double>(to) + total[a][v]);
        return;
      }
      double lanes[kWidth<double>];
      store<double>(lanes, total[a][v]);
      for (int lane = 0; lane < kWidth<double> && j + a < count && column + lane < count; ++lane) {
        to[lane] += lanes[lane];
      }
    });
  });
}

// The upper triangle of S += Xᵀ X: X is (rows, stride) with zeros from column `rank` on, S is
// (rank, rank); stride is a multiple of four and of the vector width
inline void add_gram(const double* x, int64_t rows, int64_t rank, int64_t stride, double* sum) {
  constexpr int64_t kStep = kWidth<double>;
  for (int64_t j = 0; j < rank; j += 4) {
    int64_t c = j / kStep * kStep;
    for (; c + 3 * kStep <= stride; c += 3 * kStep) {
      gram_tile<4, 3>(x, rows, stride, j, c, sum, rank);
    }
    for (; c + 2 * kStep <= stride; c += 2 * kStep) {
      gram_tile<4, 2>(x, rows, stride, j, c, sum, rank);
    }
    for (; c < stride; c += kStep) {
      gram_tile<4, 1>(x, rows, stride, j, c, sum, rank);
    }
  }
}

// S[i, j] += the products of two rows i of X with four rows j
inline void dot_tile(const double* x,
                     int64_t width,
                     int64_t i,
                     int64_t j,
                     int64_t rank,
                     double* sum) {
  Vec<double> total[2][4];
  set_zero(total);
  for (int64_t c = 0; c < width; c += kWidth<double>) {
    Vec<double> left[2];
    repeat<2>([&](int a) GAUGE_EXT_INLINE { left[a] = load<double>(x + (i + a) * width + c); });
    repeat<4>([&](int b) GAUGE_EXT_INLINE {
      const Vec<double> right = load<double>(x + (j + b) * width + c);
      repeat<2>([&](int a) GAUGE_EXT_INLINE { total[a][b] += left[a] * right; });
    });
  }
  repeat<2>([&](int a) GAUGE_EXT_INLINE {
    double products[4];
    horizontal_sums<4, double>(total[a], products);
    for (int b = 0; b < 4 && i + a < rank && j + b < rank; ++b) {
      sum[(i + a) * rank + j + b] += products[b];
    }
  });
}

// The upper triangle of S += X Xᵀ: X is (rank, width) with zeros in rows up to a multiple of four,
// S is (rank, rank); width is a multiple of the vector width. Eight rows stay in the first-level
// cache while those above them pass by.
inline void add_row_products(const double* x, int64_t width, int64_t rank, double* sum) {
  for (int64_t first = 0; first < rank; first += 8) {
    const int64_t end = first + 8 < rank ? first + 8 : rank;
    for (int64_t i = 0; i < end; i += 2) {
      for (int64_t j = i > first ? i / 4 * 4 : first; j < end; j += 4) {
        dot_tile(x, width, i, j, rank, sum);
      }
    }
  }
}

}  // namespace
}  // namespace gauge_ext
