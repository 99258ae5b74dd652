// The CUDA steps of the optimizers, run on the CPU by an emulation, against their formulas with
// dense inverses in float64.

#define GAUGE_EXT_CUDA_GRAM_BLOCKS 24

#include "ops/cuda/factor_step.h"

#include <random>
#include <vector>

#include "check_main.h"
#include "cuda/cuda_emulation.h"
#include "cuda/factor_step_expected.h"
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

using namespace gauge_ext::test;

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
