// The CUDA steps of the optimizers, run on the CPU by an emulation, against their formulas with
// dense inverses in float64.

#define GAUGE_EXT_CUDA_GRAM_BLOCKS 24

#include "ops/cuda/factor_step.h"

#include <random>
#include <vector>

#include "check_main.h"
#include "cuda/cuda_emulation.h"
#include "ops/cuda/factor_step.cuh"

namespace {

using namespace gauge_ext::cuda;
using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::FactorStep;
using gauge_ext::Float16Bits;
using gauge_ext::narrow;
using gauge_ext::StepRule;
using gauge_ext::widen;
using gauge_ext::emulation::Order;

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
Dense inverse(Dense a, int64_t r) {
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

struct Room {
  FactorSizes n;
  std::vector<double> grams, inverses, deltas, factors, norms;
  int refused = 0, report = 0;
  FactorWork work;

  explicit Room(const FactorSizes& n) : n(n) {
    const auto sizes = work_sizes(n);
    grams.assign(sizes.grams, NAN);
    inverses.assign(sizes.inverses, NAN);
    deltas.assign(sizes.deltas, NAN);
    factors.assign(sizes.factors, NAN);
    norms.assign(sizes.norms, NAN);
    work = {grams.data(), inverses.data(), deltas.data(), factors.data(),
            norms.data(), &refused,        &report};
  }
};

template <typename T>
double worst(const std::vector<T>& got, const Dense& want, double scale) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    const double off = std::abs(scale * widen(got[i]) - want[i]);
    error = off <= error ? error : off;  // NaN stays
    size = std::max(size, std::abs(want[i]));
  }
  return error / size;
}

const std::vector<Shape> kShapes = {{37, 29, 5, false},
                                    {9, 12, 1, true},
                                    {70, 300, 17, true},
                                    {40, 33, 8, false},
                                    {600, 5, 4, false}};

template <typename scalar_t>
void check(StepRule rule, bool momentum, bool nesterov, double tolerance) {
  const FactorStep step = {0.05, 0.9, 0.7, 0.8, 0.6, 1e-3, 1, 1, nesterov};
  constexpr double kDamping = 0.125;
  std::vector<scalar_t> before;
  for (const Order order : {Order::kDescending, Order::kAscending}) {
    gauge_ext::emulation::order = order;
    std::vector<Layer<scalar_t>> layers;
    std::vector<Expected> expected;
    std::vector<FactorPair> pairs;
    FactorSizes n = {static_cast<int64_t>(kShapes.size()), 0, 0};
    layers.reserve(kShapes.size());
    for (size_t i = 0; i < kShapes.size(); ++i) {
      layers.push_back({kShapes[i], static_cast<unsigned>(10 * i)});
      expected.emplace_back(layers[i]);
      expected[i].descend(step, rule, momentum, kDamping);
      pairs.push_back(layers[i].pair(momentum));
      n.max_rank = std::max(n.max_rank, kShapes[i].rank);
      n.max_length = std::max({n.max_length, kShapes[i].rows, kShapes[i].columns});
    }
    Room room(n);
    const auto& kernels = factor_step_kernels<scalar_t>();
    kernels.whiten(pairs.data(), n, kDamping, /*wide=*/true, room.work, nullptr);
    double norm = -1, want = 0;
    kernels.gradient_norm(pairs.data(), n, room.work, &norm, nullptr);
    for (const auto& one : expected) {
      want += one.norm;
    }
    CHECK_CLOSE(norm, want, 1e-9 * want);
    kernels.whiten(pairs.data(), n, kDamping, /*wide=*/false, room.work, nullptr);
    kernels.step(pairs.data(), n, rule, step, room.work, nullptr);
    CHECK(room.refused == 0 && room.report == 0);
    std::vector<scalar_t> after;
    for (size_t i = 0; i < layers.size(); ++i) {
      const double state = sizeof(scalar_t) == 8 ? tolerance : 1e-5;
      CHECK_CLOSE(worst(layers[i].A, expected[i].A, 1), 0, tolerance);
      CHECK_CLOSE(worst(layers[i].B, expected[i].B, layers[i].scaling), 0, tolerance);
      CHECK_CLOSE(worst(layers[i].avg_A, expected[i].qA, 1), 0, state);
      CHECK_CLOSE(worst(layers[i].avg_B, expected[i].qB, 1), 0, state);
      CHECK_CLOSE(worst(layers[i].sq_A, expected[i].vA, 1), 0, state);
      CHECK_CLOSE(worst(layers[i].sq_B, expected[i].vB, 1), 0, state);
      after.insert(after.end(), layers[i].A.begin(), layers[i].A.end());
      after.insert(after.end(), layers[i].B.begin(), layers[i].B.end());
    }
    CHECK(before.empty() ||
          std::memcmp(before.data(), after.data(), after.size() * sizeof(scalar_t)) == 0);
    before = after;
  }
}

TEST_CASE("CUDA factor steps, emulated: float32") {
  check<float>(StepRule::kGaugeAdam, true, false, 1e-5);
  check<float>(StepRule::kScaledGd, true, true, 1e-5);
  check<float>(StepRule::kScaledGd, false, false, 1e-5);
}
TEST_CASE("CUDA factor steps, emulated: float64") {
  check<double>(StepRule::kGaugeAdam, true, false, 1e-11);
  check<double>(StepRule::kScaledGd, true, false, 1e-11);
}
TEST_CASE("CUDA factor steps, emulated: bfloat16 and float16") {
  check<BFloat16Bits>(StepRule::kGaugeAdam, true, false, 5e-3);
  check<Float16Bits>(StepRule::kScaledGd, true, true, 1e-3);
}

TEST_CASE("CUDA factor steps, emulated: what has no full rank is refused and nothing written") {
  for (const bool nan : {false, true}) {
    Layer<float> good = {{20, 30, 4, false}, 1}, bad = {{20, 30, 4, false}, 2};
    for (int64_t c = 0; c < 30; ++c) {
      bad.A[2 * 30 + c] = nan ? bad.A[2 * 30 + c] : bad.A[c] + bad.A[30 + c];
    }
    if (nan) {
      bad.B[7] = NAN;
    }
    const auto good_A = good.A, bad_A = bad.A;
    const std::vector<FactorPair> pairs = {good.pair(true), bad.pair(true)};
    const FactorSizes n = {2, 4, 30};
    Room room(n);
    const auto& kernels = factor_step_kernels<float>();
    kernels.whiten(pairs.data(), n, 0, false, room.work, nullptr);
    kernels.step(pairs.data(), n, StepRule::kGaugeAdam, {0.1, 1, 1, 0.9, 0.9, 0, 1, 1, false},
                 room.work, nullptr);
    CHECK(room.refused == 2 && room.report == 2);
    CHECK(good.A == good_A && bad.A == bad_A);
    double norm = 0;
    kernels.whiten(pairs.data(), n, 0, true, room.work, nullptr);
    kernels.gradient_norm(pairs.data(), n, room.work, &norm, nullptr);
    CHECK(std::isnan(norm));
  }
}

// In a gauge of condition 1e5 one Cholesky factorization would leave six digits of the metric.
TEST_CASE("CUDA factor steps, emulated: float64 in a bad gauge") {
  Layer<double> layer = {{40, 50, 3, false}, 5};
  Layer<double> turned = layer;
  // A → G A, B → B G⁻¹ with a lower triangular G, gradients contravariantly
  const double scale = 1e5;
  for (int64_t c = 0; c < 50; ++c) {
    turned.A[c] *= scale;
    turned.A[100 + c] += layer.A[c] * scale;
  }
  for (int64_t i = 0; i < 40; ++i) {
    turned.B[3 * i] = (layer.B[3 * i] - layer.B[3 * i + 2] * scale) / scale;
  }
  for (int64_t i = 0; i < 40; ++i) {  // gB Gᵀ
    turned.grad_B[3 * i] = layer.grad_B[3 * i] * scale;
    turned.grad_B[3 * i + 2] += layer.grad_B[3 * i] * scale;
  }
  for (int64_t c = 0; c < 50; ++c) {  // G⁻ᵀ gA
    turned.grad_A[c] = (layer.grad_A[c] - scale * layer.grad_A[100 + c]) / scale;
  }
  const FactorSizes n = {1, 3, 50};
  double norms[2];
  int at = 0;
  for (auto* one : {&layer, &turned}) {
    const std::vector<FactorPair> pairs = {one->pair(false)};
    Room room(n);
    const auto& kernels = factor_step_kernels<double>();
    kernels.whiten(pairs.data(), n, 1e-3, true, room.work, nullptr);
    kernels.gradient_norm(pairs.data(), n, room.work, &norms[at++], nullptr);
    CHECK(room.refused == 0);
  }
  CHECK_CLOSE(norms[1] / norms[0], 1, 1e-9);
}

}  // namespace
