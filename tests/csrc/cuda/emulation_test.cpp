// What the emulation of CUDA's language, and the numbers that the kernels store, are held to.

#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "check_main.h"
#include "cuda/cuda_emulation.h"
#include "math/storage.h"
#include "ops/cuda/device.cuh"

namespace {

using gauge_ext::BFloat16Bits;
using gauge_ext::Float16Bits;
using gauge_ext::narrow;
using gauge_ext::widen;
using gauge_ext::emulation::Order;

std::vector<double> random(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(count);
  for (auto& value : values) {
    value = normal(generator);
  }
  return values;
}

TEST_CASE("the shuffled matrix product is the tensor core's") {
  const auto a = random(32 * 4, 1), b = random(32 * 2, 2);
  std::vector<double> shuffled(32 * 4, 0.25), expected(32 * 4, 0.25);
  gauge_ext::emulation::launch(dim3(1), 32, [&] {
    const int lane = threadIdx.x;
    double left[4], right[2];
    std::copy_n(&a[4 * lane], 4, left);
    std::copy_n(&b[2 * lane], 2, right);
    gauge_ext::mma_by_shuffles(reinterpret_cast<double (&)[4]>(shuffled[4 * lane]), left, right);
    gauge_ext::emulated_mma(reinterpret_cast<double (&)[4]>(expected[4 * lane]), left, right);
  });
  for (int i = 0; i < 32 * 4; ++i) {
    CHECK_CLOSE(shuffled[i], expected[i], 1e-14);
  }
}

TEST_CASE("the emulation refuses barriers that not every thread reaches") {
  CHECK_THROWS((gauge_ext::emulation::launch(dim3(1), 32,
                                             [] {
                                               if (threadIdx.x < 16) {
                                                 __syncthreads();
                                               }
                                             }),
                0));
}

// Each warp shuffles, writes, and reads what the next one writes: without the barrier it reads what
// was there before.
std::vector<int> exchanged(bool barrier) {
  std::vector<int> shared(64, -1), got(64, -1);
  gauge_ext::emulation::launch(dim3(1), 64, [&] {
    const int thread = threadIdx.x;
    shared[thread] = __shfl_sync(0xFFFFFFFFu, thread, thread % 32);
    if (barrier) {
      __syncthreads();
    }
    got[thread] = shared[63 - thread];
  });
  return got;
}

TEST_CASE("the emulation shows a missing barrier in one of its orders") {
  std::vector<int> expected;
  for (int thread = 0; thread < 64; ++thread) {
    expected.push_back(63 - thread);
  }
  for (const auto way : {Order::kDescending, Order::kAscending}) {
    gauge_ext::emulation::order = way;
    CHECK(exchanged(true) == expected);
    CHECK(exchanged(false) != expected);
  }
}

TEST_CASE("half-precision numbers widen and round as IEEE 754 says") {
  // From the standard's tables: one, the largest, the smallest normal and subnormal, infinity.
  const std::vector<std::pair<uint16_t, double>> known = {
      {0x3C00, 1.0},     {0xC000, -2.0},       {0x7BFF, 65504.0},  {0x0400, 0x1p-14},
      {0x0001, 0x1p-24}, {0x83FF, -0x3FFp-24}, {0x7C00, INFINITY}, {0x3555, 0.333251953125}};
  for (const auto& [bits, value] : known) {
    CHECK(widen(Float16Bits{bits}) == value);
    CHECK(narrow<Float16Bits>(float(value)).bits == bits);
  }
  // Halfway between 1 and its neighbour, 1 + 2^-10: to even; a little above: up.
  CHECK(narrow<Float16Bits>(1.0f + 0x1p-11f).bits == 0x3C00);
  CHECK(narrow<Float16Bits>(1.0f + 0x3p-11f).bits == 0x3C02);
  CHECK(narrow<Float16Bits>(1.0f + 0x1p-11f + 0x1p-20f).bits == 0x3C01);
  CHECK(narrow<Float16Bits>(0x1p-25f).bits == 0);
  CHECK(narrow<Float16Bits>(0x3p-25f).bits == 2);
  CHECK(narrow<Float16Bits>(65519.0f).bits == 0x7BFF);
  CHECK(narrow<Float16Bits>(65520.0f).bits == 0x7C00);
  CHECK(std::isnan(widen(narrow<Float16Bits>(NAN))));
  CHECK(std::isnan(widen(narrow<BFloat16Bits>(NAN))));
  CHECK(narrow<BFloat16Bits>(1.0f + 0x1p-8f).bits == 0x3F80);
  CHECK(narrow<BFloat16Bits>(1.0f + 0x3p-8f).bits == 0x3F82);
}

}  // namespace
