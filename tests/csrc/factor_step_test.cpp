// The algebra of the optimizer steps against plain loops, over ranks with tails.

#include <cstdint>
#include <random>
#include <vector>

#include "check_main.h"
#include "ops/cpu/factor_step.h"

namespace {

using gauge_ext::FactorLayer;
using gauge_ext::FactorStep;

template <typename T>
std::vector<T> random(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(static_cast<T>(normal(generator)));
  }
  return values;
}

// A layer with its memory.
template <typename T>
struct Problem {
  int64_t rows, columns, rank;
  std::vector<T> a = random<T>(rank * columns, 1), b = random<T>(rows * rank, 2);
  std::vector<T> grad_a = random<T>(rank * columns, 3), grad_b = random<T>(rows * rank, 4);
  std::vector<double> e_a = std::vector<double>(rank * rank), e_m = e_a;
  double root_damping = 0;

  FactorLayer<T> layer() {
    return {a.data(), b.data(), grad_a.data(), grad_b.data(), nullptr, nullptr, nullptr,
            nullptr,  rows,     columns,       rank,          0.5,     false};
  }
};

template <typename T>
void check_whitening(int64_t rank, double tolerance) {
  Problem<T> p{2 * rank + 5, 3 * rank + 7, rank};
  const double damping = 0.3;
  const auto layer = p.layer();
  REQUIRE(gauge_ext::factor_step_kernels<T>().whiten(layer, damping, p.e_a.data(), p.e_m.data(),
                                                     &p.root_damping));
  // E_Aᵀ (A Aᵀ) E_A = I, by three plain loops
  std::vector<double> gram(rank * rank);
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      for (int64_t c = 0; c < p.columns; ++c) {
        gram[i * rank + j] += double(p.a[i * p.columns + c]) * p.a[j * p.columns + c];
      }
    }
  }
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      double value = 0;
      for (int64_t k = 0; k < rank; ++k) {
        for (int64_t l = 0; l < rank; ++l) {
          value += p.e_a[k * rank + i] * gram[k * rank + l] * p.e_a[l * rank + j];
        }
      }
      CHECK_CLOSE(value, i == j ? 1.0 : 0.0, tolerance);
    }
  }
}

TEST_CASE("whitening makes the Gram matrix the identity") {
  for (const int64_t rank : {1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33}) {
    check_whitening<float>(rank, 1e-9);
    check_whitening<double>(rank, 1e-11);
  }
}

template <typename T>
void check_step(int64_t rank, double tolerance) {
  Problem<T> p{2 * rank + 5, 3 * rank + 7, rank};
  const auto old_a = p.a, old_b = p.b;
  const auto& kernels = gauge_ext::factor_step_kernels<T>();
  REQUIRE(kernels.whiten(p.layer(), 0.3, p.e_a.data(), p.e_m.data(), &p.root_damping));
  const FactorStep step = {0.1, 0.9, 2.0, 0, 0, 0, 1, 1, false};
  kernels.scaled_gd(p.layer(), p.e_a.data(), p.e_m.data(), step);
  const auto inverse = [&](const std::vector<double>& e, int64_t i, int64_t j) {
    double value = 0;
    for (int64_t k = 0; k < rank; ++k) {
      value += e[i * rank + k] * e[j * rank + k];
    }
    return value;
  };
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      double moved = 0;
      for (int64_t k = 0; k < rank; ++k) {
        moved += p.grad_b[i * rank + k] * inverse(p.e_a, k, j);
      }
      // lora_B moves by the effective step over the scaling, and so does its gradient.
      const double want = 0.9 * old_b[i * rank + j] - 0.1 * 2.0 * moved / 0.25;
      CHECK_CLOSE(p.b[i * rank + j], want, tolerance);
    }
  }
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t c = 0; c < p.columns; ++c) {
      double moved = 0;
      for (int64_t k = 0; k < rank; ++k) {
        moved += inverse(p.e_m, j, k) * p.grad_a[k * p.columns + c];
      }
      const double want = 0.9 * old_a[j * p.columns + c] - 0.1 * 2.0 * moved;
      CHECK_CLOSE(p.a[j * p.columns + c], want, tolerance);
    }
  }
}

TEST_CASE("a step is the gradient times the inverse metric") {
  for (const int64_t rank : {1, 2, 3, 4, 6, 7, 8, 9, 16, 19, 33}) {
    check_step<float>(rank, 1e-4);
    check_step<double>(rank, 1e-11);
  }
}

TEST_CASE("a factor of lower rank is refused") {
  Problem<float> p{9, 8, 3};
  for (int64_t c = 0; c < 8; ++c) {
    p.a[2 * 8 + c] = p.a[c];
  }
  CHECK(!gauge_ext::factor_step_kernels<float>().whiten(p.layer(), 0.1, p.e_a.data(), p.e_m.data(),
                                                        &p.root_damping));
}

}  // namespace
