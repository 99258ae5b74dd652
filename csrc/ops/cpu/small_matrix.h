#pragma once

// Algebra of r x r matrices in float64, row-major without gaps, one at a time. Inner loops run
// along rows, so that the compiler makes vector code of them.

#include <cstdint>

#include "math/factor_step.h"

namespace gauge_ext {
namespace {

// A pivot below this part of its diagonal entry is lost in the rounding of a Gram matrix.
constexpr double kPivotTolerance = 1e-14;

// y -= f_0 x_0 + ... + f_3 x_3 from entry `from` on, for four rows x that follow one another
inline void subtract_four(double* y, const double* f, const double* x, int64_t r, int64_t from) {
  const double *x1 = x + r, *x2 = x1 + r, *x3 = x2 + r;
  for (int64_t k = from; k < r; ++k) {
    y[k] -= f[0] * x[k] + f[1] * x1[k] + f[2] * x2[k] + f[3] * x3[k];
  }
}

// Replaces the upper triangle of the symmetric S by R, S = Rᵀ R, and the rest by zeros. Pivots that
// are too small are raised to the tolerance; returns whether there were none, NaN among them. Four
// rows are finished before those below them change, which then are read and written once for four.
inline bool cholesky_upper(double* s, int64_t r) {
  bool full = true;
  for (int64_t first = 0; first < r; first += 4) {
    const int64_t end = first + 4 < r ? first + 4 : r;
    for (int64_t j = first; j < end; ++j) {
      double* row = s + j * r;
      // The diagonal entry as it was: what was taken off is the sum of squares above it.
      double taken = 0;
      for (int64_t k = 0; k < j; ++k) {
        taken += s[k * r + j] * s[k * r + j];
      }
      const double least = kPivotTolerance * (row[j] + taken);
      if (!(row[j] > least)) {
        full = false;
        row[j] = least > 0 ? least : 1.0;
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
    for (int64_t i = end; i < r; ++i) {  // there are rows below four only
      const double* above = s + first * r;
      const double factors[4] = {above[i], above[r + i], above[2 * r + i], above[3 * r + i]};
      subtract_four(s + i * r, factors, above, r, i);
    }
  }
  for (int64_t i = 1; i < r; ++i) {
    for (int64_t k = 0; k < i; ++k) {
      s[i * r + k] = 0;
    }
  }
  return full;
}

// E = R⁻¹ for an upper triangular R
inline void invert_upper(const double* upper, int64_t r, double* e) {
  for (int64_t i = r - 1; i >= 0; --i) {
    double* row = e + i * r;
    for (int64_t k = 0; k < r; ++k) {
      row[k] = 0;
    }
    row[i] = 1;
    int64_t k = i + 1;
    for (; k + 4 <= r; k += 4) {
      subtract_four(row, upper + i * r + k, e + k * r, r, k);
    }
    for (; k < r; ++k) {
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
