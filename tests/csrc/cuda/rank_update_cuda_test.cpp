// The CUDA update of a weight, run on the CPU by an emulation, against a plain loop that does the
// same arithmetic: every bit must agree.

#include "ops/cuda/rank_update.h"

#include <random>
#include <vector>

#include "check_main.h"
#include "cuda/cuda_emulation.h"
#include "ops/cuda/rank_update.cuh"

namespace {

using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::Float16Bits;
using gauge_ext::narrow;
using gauge_ext::Rounding;
using gauge_ext::widen;
using gauge_ext::emulation::Order;

template <typename scalar_t>
std::vector<scalar_t> random(int64_t count, unsigned seed, double spread) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, spread);
  std::vector<scalar_t> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(narrow<scalar_t>(normal(generator)));
  }
  return values;
}

template <typename scalar_t>
bool same_bits(scalar_t a, scalar_t b) {
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

template <typename scalar_t>
void check(int64_t rows, int64_t columns, int64_t rank, bool stochastic, double spread = 1) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int64_t kApart = 3;
  const int64_t stride = columns + kApart;
  const auto weight = random<scalar_t>(rows * stride, 1, spread);
  const auto left = random<acc_t>(rows * rank, 2, spread),
             right = random<acc_t>(rank * columns, 3, 1);
  const Rounding rounding = {0x123456789ABCDEF0, 2, 70};
  const auto seed = static_cast<int64_t>(rounding.seed);
  for (const Order order : {Order::kDescending, Order::kAscending}) {
    gauge_ext::emulation::order = order;
    // In place with rows apart, and into rows without gaps
    for (const bool in_place : {true, false}) {
      std::vector<scalar_t> changed = weight, dense(rows * columns, scalar_t{});
      std::vector<double> result(4, -1);
      std::vector<double> partial(gauge_ext::cuda::rank_update_size<scalar_t>(rows, columns), NAN);
      gauge_ext::cuda::RankUpdate<scalar_t> update = {};
      update.weight = changed.data();
      update.weight_stride = stride;
      update.out = in_place ? changed.data() : dense.data();
      update.out_stride = in_place ? stride : columns;
      update.rows = rows;
      update.columns = columns;
      update.left = left.data();
      update.right = right.data();
      update.rank = rank;
      update.stochastic = stochastic;
      update.rounding = rounding;
      update.rounding.seed = 0;  // read from the device's memory
      update.seed = &seed;
      update.fidelity = true;
      update.result = result.data();
      update.partial = partial.data();
      gauge_ext::cuda::rank_update(update, nullptr);

      double sums[3] = {};
      int64_t wrong = 0;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < columns; ++c) {
          acc_t delta = 0;
          for (int64_t j = 0; j < rank; ++j) {
            delta = std::fma(left[i * rank + j], right[j * columns + c], delta);
          }
          const acc_t before = widen(weight[i * stride + c]);
          acc_t exact = before + delta;
          if constexpr (sizeof(scalar_t) == 2) {
            if (stochastic) {
              exact = gauge_ext::round_stochastic<scalar_t>(
                  exact, gauge_ext::rounding_bits(rounding, i, c));
            }
          }
          const scalar_t expected = narrow<scalar_t>(exact);
          wrong += !same_bits(update.out[i * update.out_stride + c], expected);
          const acc_t kept = widen(expected) - before, lost = delta - kept;
          sums[0] += delta * delta;
          sums[1] += kept * kept;
          sums[2] += lost * lost;
        }
        for (int64_t c = columns; c < stride; ++c) {
          wrong += !same_bits(changed[i * stride + c], weight[i * stride + c]);
        }
      }
      CHECK(wrong == 0);
      CHECK(result[0] == 1.0);
      for (int k = 0; k < 3; ++k) {
        CHECK_CLOSE(result[k + 1], sums[k], 1e-6 * sums[k]);
      }
    }
  }
}

template <typename scalar_t>
void check_sizes(bool stochastic) {
  check<scalar_t>(1, 1, 1, stochastic);
  check<scalar_t>(5, 128, 16, stochastic);
  check<scalar_t>(70, 131, 5, stochastic);
  check<scalar_t>(33, 300, 19, stochastic);
}

TEST_CASE("CUDA rank update, emulated: float32 and float64") {
  check_sizes<float>(false);
  check_sizes<double>(false);
}
TEST_CASE("CUDA rank update, emulated: bfloat16") {
  check_sizes<BFloat16Bits>(false);
  check_sizes<BFloat16Bits>(true);
}
TEST_CASE("CUDA rank update, emulated: float16") {
  check_sizes<Float16Bits>(false);
  check_sizes<Float16Bits>(true);
  check<Float16Bits>(9, 40, 2, true, 1e-6);  // subnormal
}

TEST_CASE("CUDA rank update, emulated: rank 0, and infinity is told") {
  check<float>(3, 5, 0, false);
  for (const float value : {INFINITY, NAN, 3e38f}) {
    std::vector<float> weight(300, value);
    const std::vector<float> left = {1.0f}, right(300, 3e38f);
    double result[4];
    std::vector<double> partial(gauge_ext::cuda::rank_update_size<float>(1, 300));
    gauge_ext::cuda::RankUpdate<float> update = {};
    update.weight = update.out = weight.data();
    update.weight_stride = update.out_stride = update.columns = 300;
    update.rows = update.rank = 1;
    update.left = left.data();
    update.right = right.data();
    update.result = result;
    update.partial = partial.data();
    gauge_ext::cuda::rank_update(update, nullptr);
    CHECK(result[0] == 0.0);
  }
}

TEST_CASE("rounding by chance takes a neighbour, as often as it should") {
  // A quarter of the way from 1 to its neighbour in bfloat16, 1 + 2^-7: up for a quarter of draws.
  int up = 0;
  for (uint32_t draw = 0; draw < 65536; ++draw) {
    const float rounded = gauge_ext::round_stochastic<BFloat16Bits>(1.0f + 0x1p-9f, draw);
    CHECK(rounded == 1.0f || rounded == 1.0f + 0x1p-7f);
    up += rounded > 1.0f;
  }
  CHECK(up == 16384);
  // And below float16's least normal number, half way between 3 and 4 steps
  up = 0;
  for (uint32_t draw = 0; draw < 65536; ++draw) {
    const float rounded = gauge_ext::round_stochastic<Float16Bits>(-3.5f * 0x1p-24f, draw);
    up += rounded == -0x1p-22f;
  }
  CHECK(up == 32768);
  CHECK(std::isinf(gauge_ext::round_stochastic<BFloat16Bits>(INFINITY, 65535)));
  CHECK(std::isnan(gauge_ext::round_stochastic<Float16Bits>(NAN, 65535)));
}

}  // namespace
