#pragma once

// Inverse triangular factors of the metric, see factor_step.h.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ops/cpu/factor_gram.h"
#include "ops/cpu/factor_step.h"
#include "ops/cpu/small_matrix.h"

namespace gauge_ext {
namespace {

void set_zero(double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] = 0;
  }
}

// E with Eᵀ S E = I, where collect(E, S) adds to S the Gram matrix of the rows times E. Factors in
// float64 are orthogonalized a second time (CholeskyQR2), as their Gram matrix has the square of
// their condition; in float32 the rounding of the factors themselves is coarser than that.
template <bool TWICE, typename F>
bool inverse_factor(int64_t rank, double* gram, double* e, double* work, const F& collect) {
  const int64_t size = rank * rank;
  bool full = cholesky_upper(gram, rank);
  invert_upper(gram, rank, e);
  if constexpr (TWICE) {
    double* second = work;
    double* inverse = work + size;
    set_zero(second, size);
    collect(e, second);
    full = cholesky_upper(second, rank) && full;
    invert_upper(second, rank, inverse);
    multiply_upper(e, inverse, rank, second);
    std::copy(second, second + size, e);
  }
  return full;
}

// E of the anchor, and E of the other factor with the damping, see factor_step.h. Each collects its
// own Gram matrix; `other_collect` is given rows to add as well.
template <bool TWICE, typename F, typename G>
bool whiten_pair(int64_t r,
                 double damping,
                 const F& anchor_collect,
                 const G& other_collect,
                 double* e_anchor,
                 double* e_other,
                 double* root_damping) {
  const int64_t size = r * r;
  static thread_local Scratch<double> scratch;
  double* anchor = scratch.reserve(5 * size);
  double* other = anchor + size;
  double* lower = other + size;
  double* work = lower + size;
  set_zero(anchor, 2 * size);
  anchor_collect(nullptr, anchor);
  other_collect(nullptr, other, nullptr);
  const double square = symmetric_dot(anchor, other, r);
  const bool full = inverse_factor<TWICE>(r, anchor, e_anchor, work, anchor_collect);
  double delta = std::max(damping, kPivotTolerance * square);
  if (delta == 0) {
    delta = 1;  // X = 0, and so is the other factor's gradient
  }
  const double root = square_root(delta);
  *root_damping = root;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      lower[i * r + j] = root * e_anchor[j * r + i];
    }
  }
  GramSum(r, nullptr, other).add_rows(lower, r, 1.0);  // δ E Eᵀ
  inverse_factor<TWICE>(r, other, e_other, work,
                        [&](const double* e, double* sum) { other_collect(e, sum, lower); });
  double check = 0;  // NaN unless all are finite
  for (int64_t i = 0; i < size; ++i) {
    check += e_anchor[i] * 0 + e_other[i] * 0;
  }
  return full && square == square && check == 0;
}

template <typename scalar_t>
bool whiten(const FactorLayer<scalar_t>& layer,
            double damping,
            double* e_a,
            double* e_m,
            double* root_damping) {
  constexpr bool kTwice = std::is_same_v<scalar_t, double>;
  const int64_t r = layer.rank;
  const auto collect_a = [&](const double* e, double* sum, const double* more = nullptr) {
    GramSum gram(r, e, sum);
    gram.add_columns(layer.lora_A, layer.columns);
    if (more != nullptr) {
      gram.add_rows(more, r, 1.0);
    }
  };
  const auto collect_b = [&](const double* e, double* sum, const double* more = nullptr) {
    GramSum gram(r, e, sum);
    gram.add_rows(layer.lora_B, layer.rows, layer.scaling);
    if (more != nullptr) {
      gram.add_rows(more, r, 1.0);
    }
  };
  return layer.anchor_B
             ? whiten_pair<kTwice>(r, damping, collect_b, collect_a, e_m, e_a, root_damping)
             : whiten_pair<kTwice>(r, damping, collect_a, collect_b, e_a, e_m, root_damping);
}

}  // namespace
}  // namespace gauge_ext
