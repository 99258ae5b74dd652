#pragma once

// Algebra of r x r matrices in float64, row-major without gaps, one at a time: in register tiles,
// or with inner loops along rows, so that the compiler makes vector code of them.

#include <cstdint>

#include "math/factor_step.h"
#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// A pivot below this part of its diagonal entry is lost in the rounding of a Gram matrix.
constexpr double kPivotTolerance = 1e-14;

// Y[a, c] -= sum over k < count of F[a, k] X[k, c] for ROWS rows and VECTORS vectors of c; F[a, k]
// is f[a * f_row + k * f_step]
template <int ROWS, int VECTORS>
inline void subtract_tile(double* y,
                          const double* f,
                          int64_t f_row,
                          int64_t f_step,
                          const double* x,
                          int64_t count,
                          int64_t r) {
  Vec<double> sum[ROWS][VECTORS];
  set_zero(sum);
  for (int64_t k = 0; k < count; ++k) {
    Vec<double> right[VECTORS];
    repeat<VECTORS>(
        [&](int v) GAUGE_EXT_INLINE { right[v] = load<double>(x + k * r + v * kWidth<double>); });
    repeat<ROWS>([&](int a) GAUGE_EXT_INLINE {
      const double left = f[a * f_row + k * f_step];
      repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE { sum[a][v] += left * right[v]; });
    });
  }
  repeat<ROWS * VECTORS>([&](int n) GAUGE_EXT_INLINE {
    double* to = y + n / VECTORS * r + n % VECTORS * kWidth<double>;
    store<double>(to, load<double>(to) - sum[n / VECTORS][n % VECTORS]);
  });
}

// The same for the columns of Y from `from` on, and for up to a vector of them before it. Columns
// before c are sums over rows_before(c) rows of X.
template <int ROWS, typename F>
inline void subtract_products(double* y,
                              const double* f,
                              int64_t f_row,
                              int64_t f_step,
                              const double* x,
                              int64_t r,
                              int64_t from,
                              const F& rows_before) {
  constexpr int64_t kStep = kWidth<double>;
  int64_t c = from / kStep * kStep;
  for (; c + 3 * kStep <= r; c += 3 * kStep) {
    subtract_tile<ROWS, 3>(y + c, f, f_row, f_step, x + c, rows_before(c + 3 * kStep), r);
  }
  for (; c + kStep <= r; c += kStep) {
    subtract_tile<ROWS, 1>(y + c, f, f_row, f_step, x + c, rows_before(c + kStep), r);
  }
  for (; c < r; ++c) {
    const int64_t count = rows_before(c + 1);
    for (int64_t a = 0; a < ROWS; ++a) {
      for (int64_t k = 0; k < count; ++k) {
        y[a * r + c] -= f[a * f_row + k * f_step] * x[k * r + c];
      }
    }
  }
}

// Replaces the upper triangle of the symmetric S by R, S = Rᵀ R, and the rest by zeros. Pivots that
// are too small are raised to the tolerance; returns whether there were none, NaN among them. The
// rows above are taken off four rows at once, which are finished then one after the other.
inline bool cholesky_upper(double* s, int64_t r) {
  bool full = true;
  for (int64_t first = 0; first < r; first += 4) {
    const int64_t end = first + 4 < r ? first + 4 : r;
    double least[4];
    for (int64_t j = first; j < end; ++j) {
      least[j - first] = kPivotTolerance * s[j * r + j];
    }
    const auto above = [first](int64_t) { return first; };
    if (end - first == 4) {
      subtract_products<4>(s + first * r, s + first, 1, r, s, r, first, above);
    } else {
      for (int64_t j = first; j < end; ++j) {
        subtract_products<1>(s + j * r, s + j, 1, r, s, r, j, above);
      }
    }
    for (int64_t j = first; j < end; ++j) {
      double* row = s + j * r;
      if (!(row[j] > least[j - first])) {
        full = false;
        row[j] = least[j - first] > 0 ? least[j - first] : 1.0;
      }
      const double pivot = square_root(row[j]);
      const double inverse = 1.0 / pivot;
      row[j] = pivot;
      for (int64_t k = j + 1; k < r; ++k) {
        row[k] *= inverse;
      }
      for (int64_t i = j + 1; i < end; ++i) {
        double* below = s + i * r;
        const double factor = row[i];
        for (int64_t k = i; k < r; ++k) {
          below[k] -= factor * row[k];
        }
      }
    }
  }
  for (int64_t i = 1; i < r; ++i) {
    for (int64_t k = 0; k < i; ++k) {
      s[i * r + k] = 0;
    }
  }
  return full;
}

// E = R⁻¹ for an upper triangular R, four rows at once from the last ones up
inline void invert_upper(const double* upper, int64_t r, double* e) {
  for (int64_t k = 0; k < r * r; ++k) {
    e[k] = 0;
  }
  for (int64_t end = r; end > 0;) {
    const int64_t first = (end - 1) / 4 * 4;
    if (end < r) {  // E has nothing but zeros before column k in row k
      subtract_products<4>(e + first * r, upper + first * r + end, r, 1, e + end * r, r, end,
                           [end](int64_t c) { return c > end ? c - end : 0; });
    }
    for (int64_t i = end - 1; i >= first; --i) {
      double* row = e + i * r;
      row[i] = 1;
      for (int64_t k = i + 1; k < end; ++k) {
        const double factor = upper[i * r + k];
        const double* other = e + k * r;
        for (int64_t c = k; c < r; ++c) {
          row[c] -= factor * other[c];
        }
      }
      const double inverse = 1.0 / upper[i * r + i];
      for (int64_t c = i; c < r; ++c) {
        row[c] *= inverse;
      }
    }
    end = first;
  }
}

// P = E F for upper triangular E and F
inline void multiply_upper(const double* e, const double* f, int64_t r, double* p) {
  for (int64_t i = 0; i < r; ++i) {
    double* row = p + i * r;
    for (int64_t c = 0; c < r; ++c) {
      row[c] = 0;
    }
    for (int64_t k = i; k < r; ++k) {
      const double factor = e[i * r + k];
      for (int64_t c = k; c < r; ++c) {
        row[c] += factor * f[k * r + c];
      }
    }
  }
}

// The sum of the products of entries of two symmetric matrices given by their upper triangles
inline double symmetric_dot(const double* s, const double* t, int64_t r) {
  double sum = 0;
  for (int64_t i = 0; i < r; ++i) {
    sum += s[i * r + i] * t[i * r + i];
    for (int64_t j = i + 1; j < r; ++j) {
      sum += 2 * s[i * r + j] * t[i * r + j];
    }
  }
  return sum;
}

}  // namespace
}  // namespace gauge_ext
