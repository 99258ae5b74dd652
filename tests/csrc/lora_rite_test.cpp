// LoRA-RITE's kernels against plain loops, over ranks with tails.

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check_main.h"
#include "ops/cpu/lora_rite.h"

namespace {

using gauge_ext::FactorMetric;
using gauge_ext::FactorStep;
using gauge_ext::RiteLayer;
using gauge_ext::RiteMoment;
using gauge_ext::RiteTurns;

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

// Number j of Eᵀ x
double entry(const std::vector<double>& e, int64_t r, const std::vector<double>& x, int64_t j) {
  double value = 0;
  for (int64_t k = 0; k < r; ++k) {
    value += e[k * r + j] * x[k];
  }
  return value;
}

// A first step, in which nothing turns, with second moments that are told to be the identity.
template <typename T>
void check_first_step(int64_t rank, double tolerance) {
  const int64_t rows = 2 * rank + 5, columns = 3 * rank + 7, r = rank;
  const double scaling = 0.5, damping = 0.3;
  auto a = random<T>(r * columns, 1), b = random<T>(rows * r, 2);
  const auto old_a = a, old_b = b;
  const auto grad_a = random<T>(r * columns, 3), grad_b = random<T>(rows * r, 4);
  std::vector<T> avg_a(r * columns), frame_a = avg_a, avg_b(rows * r), frame_b = avg_b;
  std::vector<double> square_a(r * r), square_b = square_a, rest = square_a, e_a = square_a,
                                       e_m = square_a, moment_a = square_a, moment_b = square_a;
  double root_damping = 0;
  const gauge_ext::FactorLayer<T> factors = {a.data(),
                                             b.data(),
                                             grad_a.data(),
                                             grad_b.data(),
                                             avg_a.data(),
                                             avg_b.data(),
                                             nullptr,
                                             nullptr,
                                             rows,
                                             columns,
                                             r,
                                             scaling,
                                             false};
  REQUIRE(gauge_ext::factor_step_kernels<T>().whiten(factors, damping, e_a.data(), e_m.data(),
                                                     &root_damping));
  CHECK_CLOSE(root_damping * root_damping, damping, 1e-12);
  const RiteLayer<T> layer = {factors,         frame_a.data(),  frame_b.data(),
                              square_a.data(), square_b.data(), rest.data()};
  const FactorMetric metric = {e_a.data(), e_m.data(), root_damping};
  const FactorStep step = {0.1, 0.9, 2.0, 0.5, 0.75, 0.0, 0.5, 0.25, false};
  std::vector<double> memory(3 * gauge_ext::rite_square(r));
  const RiteTurns turns = {memory.data(), memory.data() + gauge_ext::rite_square(r),
                           memory.data() + 2 * gauge_ext::rite_square(r)};
  const auto& kernels = gauge_ext::rite_kernels<T>();
  REQUIRE(kernels.measure(layer, metric, step, turns, moment_a.data(), moment_b.data()));

  // The whitened gradients and the frames, vector by vector
  std::vector<double> white_a(columns * r), white_b(rows * r);
  for (int64_t c = 0; c < columns; ++c) {
    std::vector<double> g(r);
    for (int64_t k = 0; k < r; ++k) {
      g[k] = 2.0 * grad_a[k * columns + c];
    }
    for (int64_t j = 0; j < r; ++j) {
      white_a[c * r + j] = entry(e_m, r, g, j);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<double> g(r);
    for (int64_t k = 0; k < r; ++k) {
      g[k] = 2.0 / scaling * grad_b[i * r + k];
    }
    for (int64_t j = 0; j < r; ++j) {
      white_b[i * r + j] = entry(e_a, r, g, j);
    }
  }
  const auto check_moment = [&](const std::vector<double>& white, int64_t count,
                                const std::vector<double>& moment) {
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        double sum = 0;
        for (int64_t v = 0; v < count; ++v) {
          sum += white[v * r + i] * white[v * r + j];
        }
        CHECK_CLOSE(moment[i * r + j], 0.25 * sum / count, 1e-4 * tolerance + 1e-9);
      }
    }
  };
  check_moment(white_a, columns, moment_a);
  check_moment(white_b, rows, moment_b);

  std::vector<double> quarter(r * r), identity(r * r);  // and the correction is 1/4
  for (int64_t i = 0; i < r; ++i) {
    quarter[i * r + i] = 0.25;
  }
  REQUIRE(kernels.inverse_roots(quarter.data(), r, step, identity.data()));
  kernels.descend(layer, metric, step, turns, RiteMoment{moment_a.data(), identity.data()},
                  RiteMoment{moment_b.data(), identity.data()});
  CHECK(square_a == moment_a);
  CHECK(square_b == moment_b);

  // K = √δ E_Aᵀ E_M, and E_M (I - Kᵀ K)
  std::vector<double> held(r * r), filtered(r * r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      double value = 0;
      for (int64_t k = 0; k < r; ++k) {
        value += root_damping * e_a[k * r + i] * e_m[k * r + j];
      }
      CHECK_CLOSE(rest[i * r + j], value, 1e-9);
    }
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      held[i * r + j] = i == j ? 1 : 0;
      for (int64_t k = 0; k < r; ++k) {
        held[i * r + j] -= rest[k * r + i] * rest[k * r + j];
      }
    }
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t k = 0; k < r; ++k) {
        filtered[i * r + j] += e_m[i * r + k] * held[k * r + j];
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t j = 0; j < r; ++j) {
      double frame = 0, moved = 0;
      for (int64_t k = 0; k < r; ++k) {
        frame += e_a[k * r + j] * old_a[k * columns + c];
        moved += filtered[j * r + k] * 0.5 * white_a[c * r + k];
      }
      CHECK_CLOSE(frame_a[j * columns + c], frame, tolerance);
      CHECK_CLOSE(avg_a[j * columns + c], 0.5 * white_a[c * r + j], 10 * tolerance);
      CHECK_CLOSE(a[j * columns + c], 0.9 * old_a[j * columns + c] - 0.1 / 0.5 * moved,
                  10 * tolerance);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      double frame = 0, moved = 0;
      for (int64_t k = 0; k < r; ++k) {
        frame += e_m[k * r + j] * scaling * old_b[i * r + k];
        moved += e_a[j * r + k] * 0.5 * white_b[i * r + k];
      }
      CHECK_CLOSE(frame_b[j * rows + i], frame, tolerance);
      CHECK_CLOSE(b[i * r + j], 0.9 * old_b[i * r + j] - 0.1 / 0.5 / scaling * moved,
                  10 * tolerance);
    }
  }

  // Nothing has moved since but by the step: from the same factors the frames have not turned.
  std::vector<T> again_a = old_a, again_b = old_b;
  auto unmoved = factors;
  unmoved.lora_A = again_a.data();
  unmoved.lora_B = again_b.data();
  const RiteLayer<T> second = {unmoved,         frame_a.data(),  frame_b.data(),
                               square_a.data(), square_b.data(), rest.data()};
  REQUIRE(kernels.measure(second, metric, step, turns, moment_a.data(), moment_b.data()));
  for (int64_t i = 0; i < r; ++i) {
    const int64_t stride = gauge_ext::rite_square(r) / r;
    CHECK(stride >= r);
    for (int64_t j = 0; j < r; ++j) {
      // The second moment of the same gradients: 3/4 of the old and 1/4 of what it was made of
      CHECK_CLOSE(moment_a[i * r + j], 1.75 * square_a[i * r + j], 1e-2 * tolerance + 1e-9);
      CHECK_CLOSE(moment_b[i * r + j], 1.75 * square_b[i * r + j], 1e-2 * tolerance + 1e-9);
    }
  }
}

TEST_CASE("a first step and its moments are those of plain loops") {
  for (const int64_t rank : {1, 2, 3, 4, 6, 7, 8, 9, 16, 19, 33, 64}) {
    check_first_step<float>(rank, 1e-4);
    check_first_step<double>(rank, 1e-9);
  }
}

// (v̂^½ + ε) root is the identity; the root of v is told, as it was squared to v.
void check_inverse_root(const std::vector<double>& half, int64_t r, double eps) {
  std::vector<double> moment(r * r), root(r * r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t k = 0; k < r; ++k) {
        moment[i * r + j] += 0.25 * half[i * r + k] * half[k * r + j];
      }
    }
  }
  const FactorStep step = {0.1, 0.9, 2.0, 0.5, 0.75, eps, 0.5, 0.25, false};
  REQUIRE(gauge_ext::rite_kernels<float>().inverse_roots(moment.data(), r, step, root.data()));
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      double value = eps * root[i * r + j];
      for (int64_t k = 0; k < r; ++k) {
        value += half[i * r + k] * root[k * r + j];
      }
      CHECK_CLOSE(value, i == j ? 1 : 0, 1e-9);
      CHECK(root[i * r + j] == root[j * r + i]);
    }
  }
}

TEST_CASE("inverse roots of matrices with tails, gaps, and eigenvalues that are many times there") {
  for (const int64_t r : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 97}) {
    const auto x = random<double>(r * r, static_cast<unsigned>(r));
    std::vector<double> full(r * r), blocks(r * r), close(r * r);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        for (int64_t k = 0; k < r; ++k) {
          full[i * r + j] += x[i * r + k] * x[j * r + k] / static_cast<double>(r);
        }
        close[i * r + j] = (i == j ? 1 : 0) + 1e-9 * (x[i * r + j] + x[j * r + i]);
      }
      full[i * r + i] += 0.1;
      blocks[i * r + i] = i % 3 == 0 ? 1e-3 : 2;  // which no reflection changes
    }
    for (const double eps : {0.0, 0.5}) {
      check_inverse_root(full, r, eps);
      check_inverse_root(blocks, r, eps);
      check_inverse_root(close, r, eps);
    }
  }
}

TEST_CASE("moments of no gradient have no inverse root, and those with NaN are refused") {
  const int64_t r = 5;
  std::vector<double> moment(r * r), root(r * r, 1.0);
  const FactorStep step = {0.1, 0.9, 2.0, 0.5, 0.75, 0.0, 0.5, 0.25, false};
  const auto& kernels = gauge_ext::rite_kernels<float>();
  REQUIRE(kernels.inverse_roots(moment.data(), r, step, root.data()));
  CHECK(root == moment);
  for (const double tiny : {1e-305, 4.0}) {  // numbers whose squares would vanish
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        moment[i * r + j] = 0.25 * tiny * (i == j ? 2 : 1);  // eigenvalues r + 1 and 1
      }
    }
    REQUIRE(kernels.inverse_roots(moment.data(), r, step, root.data()));
    const double far = 1 / std::sqrt(r + 1.0), mean = (far - 1) / r;
    CHECK_CLOSE(root[0] * std::sqrt(tiny), 1 + mean, 1e-12);
    CHECK_CLOSE(root[1] * std::sqrt(tiny), mean, 1e-12);
  }
  moment[1] = moment[r] = NAN;
  CHECK(!kernels.inverse_roots(moment.data(), r, step, root.data()));
}

TEST_CASE("a gradient that is not finite is said to be none") {
  float a[6] = {1, 0, 2, 0, 1, 3}, b[4] = {}, grad_a[6] = {}, grad_b[4] = {1, 2, NAN, 4};
  float frames[6] = {}, avg[6] = {}, other_frames[4] = {}, other_avg[4] = {};
  double squares[7][4] = {}, root = 0;
  const gauge_ext::FactorLayer<float> factors = {
      a, b, grad_a, grad_b, avg, other_avg, nullptr, nullptr, 2, 3, 2, 1.0, false};
  REQUIRE(
      gauge_ext::factor_step_kernels<float>().whiten(factors, 0.1, squares[0], squares[1], &root));
  std::vector<double> memory(3 * gauge_ext::rite_square(2));
  const RiteTurns turns = {memory.data(), memory.data() + gauge_ext::rite_square(2),
                           memory.data() + 2 * gauge_ext::rite_square(2)};
  const RiteLayer<float> layer = {factors,    frames,     other_frames,
                                  squares[2], squares[3], squares[4]};
  CHECK(!gauge_ext::rite_kernels<float>().measure(layer, {squares[0], squares[1], root},
                                                  {0.1, 1, 1, 0.9, 0.99, 0, 1, 1, false}, turns,
                                                  squares[5], squares[6]));
}

}  // namespace
