#pragma once

// A layer with its state, and the optimizers' steps by their formulas, with dense inverses in
// float64.

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "math/factor_step.h"
#include "math/storage.h"
#include "ops/cuda/factor_step.h"

namespace gauge_ext::test {

using cuda::FactorPair;

using Dense = std::vector<double>;  // (r, r)

struct Shape {
  int64_t rows, columns, rank;
  bool anchor_B;
};

template <typename T>
std::vector<T> random(int64_t count, unsigned seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(narrow<T>(normal(generator)));
  }
  return values;
}

// By Gauss and Jordan; no pivoting, as the matrix is positive definite
inline Dense inverse(Dense a, int64_t r) {
  Dense inverse(r * r, 0.0);
  for (int64_t i = 0; i < r; ++i) {
    inverse[i * r + i] = 1;
  }
  for (int64_t j = 0; j < r; ++j) {
    const double pivot = a[j * r + j];
    for (int64_t k = 0; k < r; ++k) {
      a[j * r + k] /= pivot;
      inverse[j * r + k] /= pivot;
    }
    for (int64_t i = 0; i < r; ++i) {
      const double factor = i == j ? 0 : a[i * r + j];
      for (int64_t k = 0; k < r; ++k) {
        a[i * r + k] -= factor * a[j * r + k];
        inverse[i * r + k] -= factor * inverse[j * r + k];
      }
    }
  }
  return inverse;
}

template <typename scalar_t>
struct Layer {
  using acc_t = typename AccOf<scalar_t>::type;
  Shape n;
  unsigned seed;
  double scaling = 1.5;
  std::vector<scalar_t> A = random<scalar_t>(n.rank * n.columns, seed);
  std::vector<scalar_t> B = random<scalar_t>(n.rows * n.rank, seed + 1);
  std::vector<scalar_t> grad_A = random<scalar_t>(n.rank * n.columns, seed + 2);
  std::vector<scalar_t> grad_B = random<scalar_t>(n.rows * n.rank, seed + 3);
  std::vector<acc_t> avg_A = random<acc_t>(n.rank * n.columns, seed + 4);
  std::vector<acc_t> avg_B = random<acc_t>(n.rows * n.rank, seed + 5);
  std::vector<acc_t> sq_A = std::vector<acc_t>(n.columns, acc_t(0.5));
  std::vector<acc_t> sq_B = std::vector<acc_t>(n.rows, acc_t(0.25));

  FactorPair pair(bool momentum) {
    return {A.data(),
            B.data(),
            grad_A.data(),
            grad_B.data(),
            momentum ? avg_A.data() : nullptr,
            momentum ? avg_B.data() : nullptr,
            sq_A.data(),
            sq_B.data(),
            n.rows,
            n.columns,
            n.rank,
            n.anchor_B,
            scaling,
            0.3,
            0.2};
  }
};

// A layer's numbers as those of the effective factors, in float64, and the step by the book
struct Expected {
  Shape n;
  double s;
  Dense A, B, gA, gB, qA, qB, vA, vB;
  double norm = 0;

  template <typename scalar_t>
  explicit Expected(const Layer<scalar_t>& l) : n(l.n), s(l.scaling) {
    const auto copy = [](const auto& from, double scale) {
      Dense to;
      for (const auto& value : from) {
        to.push_back(scale * widen(value));
      }
      return to;
    };
    A = copy(l.A, 1), B = copy(l.B, s), gA = copy(l.grad_A, 1), gB = copy(l.grad_B, 1 / s);
    qA = copy(l.avg_A, 1), qB = copy(l.avg_B, 1), vA = copy(l.sq_A, 1), vB = copy(l.sq_B, 1);
  }

  // The inverses of the metric of A's rows and of B's columns
  std::pair<Dense, Dense> metric(double damping) const {
    const int64_t r = n.rank;
    Dense gram_A(r * r, 0.0), gram_B(r * r, 0.0);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        for (int64_t c = 0; c < n.columns; ++c) {
          gram_A[i * r + j] += A[i * n.columns + c] * A[j * n.columns + c];
        }
        for (int64_t row = 0; row < n.rows; ++row) {
          gram_B[i * r + j] += B[row * r + i] * B[row * r + j];
        }
      }
    }
    Dense& other = n.anchor_B ? gram_A : gram_B;
    const Dense anchor = inverse(n.anchor_B ? gram_B : gram_A, r);
    for (int64_t i = 0; i < r * r; ++i) {
      other[i] += damping * anchor[i];
    }
    return {inverse(gram_A, r), inverse(gram_B, r)};
  }

  // v ← factor's step, and the vector's squared length in the inverse metric
  static double length(const Dense& metric, const Dense& v) {
    const auto r = static_cast<int64_t>(v.size());
    double sum = 0;
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        sum += v[i] * metric[i * r + j] * v[j];
      }
    }
    return sum;
  }

  void descend(const FactorStep& step, StepRule rule, bool momentum, double damping) {
    const auto [of_A, of_B] = metric(damping);
    const int64_t r = n.rank;
    const auto move = [&](Dense& factor, const Dense& g, Dense& q, Dense& v, const Dense& m,
                          int64_t count, int64_t across, int64_t along) {
      for (int64_t t = 0; t < count; ++t) {
        Dense gradient(r), source(r);
        for (int64_t k = 0; k < r; ++k) {
          const int64_t at = t * across + k * along;
          gradient[k] = step.grad_scale * g[at];
          source[k] = gradient[k];
          if (momentum) {
            const double fresh = rule == StepRule::kGaugeAdam ? 1 - step.average : 1;
            q[at] = step.average * q[at] + fresh * gradient[k];
            source[k] = step.nesterov ? gradient[k] + step.average * q[at] : q[at];
          }
        }
        norm += length(m, gradient) / (step.grad_scale * step.grad_scale);
        double rate = step.lr;
        if (rule == StepRule::kGaugeAdam) {
          v[t] = step.second * v[t] + (1 - step.second) * length(m, gradient) / double(r);
          rate /= 0.3 * (std::sqrt(v[t] / 0.2) + step.eps);
        }
        for (int64_t k = 0; k < r; ++k) {
          double whitened = 0;
          for (int64_t j = 0; j < r; ++j) {
            whitened += m[k * r + j] * source[j];
          }
          double& to = factor[t * across + k * along];
          to = step.keep * to - rate * whitened;
        }
      }
    };
    move(B, gB, qB, vB, of_A, n.rows, r, 1);
    move(A, gA, qA, vA, of_B, n.columns, 1, n.columns);
  }
};

}  // namespace gauge_ext::test
