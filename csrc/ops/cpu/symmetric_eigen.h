#pragma once

// Eigenvalues and eigenvectors of a symmetric matrix in float64: Householder reflections to a
// tridiagonal matrix, then QL steps with implicit shifts (Golub and Van Loan, Matrix Computations,
// 8.3), whose rotations go over the eigenvectors a whole step at a time. Errors are of the rounding
// of the largest eigenvalue. Rows lie `stride` apart, a multiple of two vectors, with zeros behind
// their entries.

#include <algorithm>
#include <cstdint>

#include "math/factor_step.h"
#include "ops/cpu/triangle.h"

namespace gauge_ext {
namespace {

constexpr int64_t kEigenStep = 2 * kWidth<double>;
constexpr int kQlSteps = 60;  // for one eigenvalue; two are usual

// y = sum over `count` rows i of f[i] X[i, :], for VECTORS vectors
template <int VECTORS>
void combine_strip(const double* f, const double* x, int64_t count, int64_t stride, double* y) {
  Vec<double> sum[1][VECTORS];
  set_zero(sum);
  for (int64_t i = 0; i < count; ++i) {
    const double factor = f[i];
    repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
      sum[0][v] += factor * load<double>(x + i * stride + v * kWidth<double>);
    });
  }
  repeat<VECTORS>([&](int v)
                      GAUGE_EXT_INLINE { store<double>(y + v * kWidth<double>, sum[0][v]); });
}

inline void combine_rows(const double* f,
                         const double* x,
                         int64_t count,
                         int64_t width,
                         int64_t stride,
                         double* y) {
  int64_t c = 0;
  for (; c + 4 * kEigenStep <= width; c += 4 * kEigenStep) {
    combine_strip<8>(f, x + c, count, stride, y + c);
  }
  for (; c + 2 * kEigenStep <= width; c += 2 * kEigenStep) {
    combine_strip<4>(f, x + c, count, stride, y + c);
  }
  for (; c < width; c += kEigenStep) {
    combine_strip<2>(f, x + c, count, stride, y + c);
  }
}

// X[i, :] -= f[i] w + g[i] v for `count` rows, strip by strip
inline void subtract_pair(const double* f,
                          const double* w,
                          const double* g,
                          const double* v,
                          int64_t count,
                          int64_t width,
                          int64_t stride,
                          double* x) {
  for (int64_t c = 0; c < width; c += kEigenStep) {
    const Vec<double> w0 = load<double>(w + c), w1 = load<double>(w + c + kWidth<double>);
    const Vec<double> v0 = load<double>(v + c), v1 = load<double>(v + c + kWidth<double>);
    for (int64_t i = 0; i < count; ++i) {
      double* row = x + i * stride + c;
      const double a = f[i], b = g[i];
      store<double>(row, load<double>(row) - a * w0 - b * v0);
      double* next = row + kWidth<double>;
      store<double>(next, load<double>(next) - a * w1 - b * v1);
    }
  }
}

// X[i, :] -= factor (X[i, :] · v) v for ROWS rows
template <int ROWS>
void reflect_rows(const double* v, double factor, int64_t width, int64_t stride, double* x) {
  Vec<double> sum[1][ROWS];
  set_zero(sum);
  for (int64_t c = 0; c < width; c += kWidth<double>) {
    const Vec<double> right = load<double>(v + c);
    repeat<ROWS>([&](int i)
                     GAUGE_EXT_INLINE { sum[0][i] += load<double>(x + i * stride + c) * right; });
  }
  double products[ROWS];
  horizontal_sums<ROWS, double>(sum[0], products);
  repeat<ROWS>([&](int i) GAUGE_EXT_INLINE { products[i] *= factor; });
  for (int64_t c = 0; c < width; c += kWidth<double>) {
    const Vec<double> right = load<double>(v + c);
    repeat<ROWS>([&](int i) GAUGE_EXT_INLINE {
      double* to = x + i * stride + c;
      store<double>(to, load<double>(to) - products[i] * right);
    });
  }
}

// The diagonal and what is beside it of a tridiagonal matrix T with A = Q T Qᵀ, and Qᵀ. A is
// overwritten: row k keeps the vector of reflection k from column k + 1 on. `work` has 2 stride.
inline void tridiagonalize(double* a,
                           int64_t r,
                           int64_t stride,
                           double* diagonal,
                           double* beside,
                           double* qt,
                           double* work) {
  double* factors = work;  // of the reflections
  double* moved = work + stride;
  for (int64_t k = 0; k + 2 < r; ++k) {
    double* v = a + k * stride;
    diagonal[k] = v[k];
    const int64_t from = (k + 1) / kEigenStep * kEigenStep, width = stride - from;
    std::fill(v + from, v + k + 1, 0.0);
    double tail = 0;
    for (int64_t i = k + 2; i < r; ++i) {
      tail += v[i] * v[i];
    }
    const double first = v[k + 1];
    if (tail == 0) {
      beside[k] = first;
      factors[k] = 0;
      continue;
    }
    const double length = square_root(first * first + tail);
    const double beta = first > 0 ? -length : length;
    beside[k] = beta;
    const double factor = factors[k] = (beta - first) / beta;
    const double inverse = 1 / (first - beta);
    for (int64_t i = k + 2; i < r; ++i) {
      v[i] *= inverse;
    }
    v[k + 1] = 1;
    double* below = a + (k + 1) * stride + from;
    combine_rows(v + k + 1, below, r - k - 1, width, stride, moved + from);
    double dot = 0;
    for (int64_t i = k + 1; i < r; ++i) {
      moved[i] *= factor;
      dot += moved[i] * v[i];
    }
    for (int64_t i = k + 1; i < r; ++i) {
      moved[i] -= 0.5 * factor * dot * v[i];
    }
    std::fill(moved + from, moved + k + 1, 0.0);
    subtract_pair(v + k + 1, moved + from, moved + k + 1, v + from, r - k - 1, width, stride,
                  below);
  }
  if (r > 1) {
    diagonal[r - 2] = a[(r - 2) * stride + r - 2];
    beside[r - 2] = a[(r - 2) * stride + r - 1];
  }
  diagonal[r - 1] = a[(r - 1) * stride + r - 1];

  std::fill(qt, qt + r * stride, 0.0);
  for (int64_t i = 0; i < r; ++i) {
    qt[i * stride + i] = 1;
  }
  for (int64_t k = r - 3; k >= 0; --k) {
    const int64_t from = (k + 1) / kEigenStep * kEigenStep, width = stride - from;
    const double* v = a + k * stride + from;
    int64_t i = k + 1;
    for (; i + 4 <= r; i += 4) {
      reflect_rows<4>(v, factors[k], width, stride, qt + i * stride + from);
    }
    for (; i < r; ++i) {
      reflect_rows<1>(v, factors[k], width, stride, qt + i * stride + from);
    }
  }
}

// Rows i and i + 1 of Z turn by (cosines[i], sines[i]), for i from `last` down to `first`.
template <int VECTORS>
void rotate_strip(const double* cosines,
                  const double* sines,
                  int64_t first,
                  int64_t last,
                  int64_t stride,
                  double* z) {
  Vec<double> carried[VECTORS];
  repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
    carried[v] = load<double>(z + (last + 1) * stride + v * kWidth<double>);
  });
  for (int64_t i = last; i >= first; --i) {
    const double c = cosines[i], s = sines[i];
    double* row = z + i * stride;
    repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
      const Vec<double> upper = load<double>(row + v * kWidth<double>);
      store<double>(row + stride + v * kWidth<double>, s * upper + c * carried[v]);
      carried[v] = c * upper - s * carried[v];
    });
  }
  repeat<VECTORS>([&](int v) GAUGE_EXT_INLINE {
    store<double>(z + first * stride + v * kWidth<double>, carried[v]);
  });
}

inline void rotate_rows(const double* cosines,
                        const double* sines,
                        int64_t first,
                        int64_t last,
                        int64_t stride,
                        double* z) {
  int64_t c = 0;
  for (; c + 2 * kEigenStep <= stride; c += 2 * kEigenStep) {
    rotate_strip<4>(cosines, sines, first, last, stride, z + c);
  }
  for (; c < stride; c += kEigenStep) {
    rotate_strip<2>(cosines, sines, first, last, stride, z + c);
  }
}

// Turns the diagonal of a tridiagonal matrix into its eigenvalues and the rows of Z with it; false
// where they do not converge. `beside` has r, of which the last counts for nothing; `work` 2 r.
inline bool diagonalize_tridiagonal(double* diagonal,
                                    double* beside,
                                    int64_t r,
                                    int64_t stride,
                                    double* z,
                                    double* work) {
  double *cosines = work, *sines = work + r;
  double largest = __builtin_fabs(diagonal[0]);
  for (int64_t i = 1; i < r; ++i) {
    largest = std::max(largest, __builtin_fabs(diagonal[i]));
    largest = std::max(largest, __builtin_fabs(beside[i - 1]));
  }
  const double least = 0x1p-53 * largest;
  for (int64_t l = 0; l < r; ++l) {
    for (int steps = 0;; ++steps) {
      int64_t end = l;
      while (end + 1 < r && !(__builtin_fabs(beside[end]) <= least)) {
        ++end;
      }
      if (end == l) {
        break;
      }
      if (steps == kQlSteps) {
        return false;
      }
      const double half = (diagonal[l + 1] - diagonal[l]) / (2 * beside[l]);
      const double root = square_root(half * half + 1);
      double g = diagonal[end] - diagonal[l] + beside[l] / (half < 0 ? half - root : half + root);
      double s = 1, c = 1, shift = 0;
      int64_t i = end - 1;
      for (; i >= l; --i) {
        const double f = s * beside[i], b = c * beside[i];
        const double length = square_root(f * f + g * g);
        beside[i + 1] = length;
        if (length == 0) {  // the matrix falls apart here
          break;
        }
        const double inverse = 1 / length;
        cosines[i] = c = g * inverse;
        sines[i] = s = f * inverse;
        g = diagonal[i + 1] - shift;
        const double turn = (diagonal[i] - g) * s + 2 * c * b;
        shift = s * turn;
        diagonal[i + 1] = g + shift;
        g = c * turn - b;
      }
      if (i + 1 < end) {
        rotate_rows(cosines, sines, i + 1, end - 1, stride, z);
      }
      if (i >= l) {
        diagonal[i + 1] -= shift;
      } else {
        diagonal[l] -= shift;
        beside[l] = g;
      }
      beside[end] = 0;
    }
  }
  return true;
}

// Writes the eigenvalues of A, in any order, and its eigenvectors as rows; A is overwritten. False
// where they do not converge, as with NaN. `work` has 3 stride.
inline bool symmetric_eigen(double* a,
                            int64_t r,
                            int64_t stride,
                            double* eigenvalues,
                            double* eigenvectors,
                            double* work) {
  double scale = 0;
  for (int64_t i = 0; i < r * stride; ++i) {
    scale = std::max(scale, __builtin_fabs(a[i]));
  }
  scale = std::max(scale, 0x1p-1000);
  const double inverse = 1 / scale;  // squares neither overflow nor vanish then
  for (int64_t i = 0; i < r * stride; ++i) {
    a[i] *= inverse;
  }
  double* beside = work + 2 * stride;
  tridiagonalize(a, r, stride, eigenvalues, beside, eigenvectors, work);
  if (!diagonalize_tridiagonal(eigenvalues, beside, r, stride, eigenvectors, work)) {
    return false;
  }
  for (int64_t i = 0; i < r; ++i) {
    eigenvalues[i] *= scale;
  }
  return true;
}

}  // namespace
}  // namespace gauge_ext
