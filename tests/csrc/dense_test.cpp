// W + s·L R, products for few rows, transposition and conversion against plain loops.

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check_main.h"
#include "ops/cpu/low_rank.h"

namespace {

using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;

template <typename scalar_t>
std::vector<scalar_t> small_integers(int64_t count, unsigned seed) {
  // Small integers are exact in every type, and so are the sums of their products here.
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> draw(-4, 4);
  std::vector<scalar_t> values;
  for (int64_t i = 0; i < count; ++i) {
    const auto value = static_cast<float>(draw(generator));
    if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      values.push_back({static_cast<uint16_t>(bits >> 16)});
    } else {
      values.push_back(value);
    }
  }
  return values;
}

double number(float value) {
  return value;
}
double number(double value) {
  return value;
}
double number(BFloat16Bits value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename scalar_t>
void check_products(int64_t rows, int64_t columns, int64_t count, int64_t rank) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = gauge_ext::low_rank_kernels<scalar_t>();
  const int64_t stride = columns + 3, y_stride = count + 5;
  const auto weight = small_integers<scalar_t>(count * stride, 1);
  const auto x = small_integers<acc_t>(rows * columns, 2);
  const auto left = small_integers<acc_t>(count * rank, 3);
  const auto right = small_integers<acc_t>(rank * columns, 4);

  std::vector<acc_t> y(rows * y_stride, 2);
  kernels.skinny(x.data(), rows, columns, weight.data(), stride, count, y.data(), y_stride);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < y_stride; ++j) {
      double expected = 2;
      for (int64_t c = 0; j < count && c < columns; ++c) {
        expected += double(x[i * columns + c]) * number(weight[j * stride + c]);
      }
      CHECK_CLOSE(y[i * y_stride + j], expected, 0);
    }
  }

  std::vector<acc_t> merged(count * columns, -1);
  kernels.merge(weight.data(), stride, count, columns, left.data(), right.data(), rank, acc_t(0.5),
                merged.data());
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t c = 0; c < columns; ++c) {
      double expected = number(weight[j * stride + c]);
      for (int64_t k = 0; k < rank; ++k) {
        expected += 0.5 * left[j * rank + k] * right[k * columns + c];
      }
      CHECK_CLOSE(merged[j * columns + c], expected, 0);
    }
  }
}

template <typename scalar_t>
void check_conversion(int64_t rows, int64_t columns) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = gauge_ext::low_rank_kernels<scalar_t>();
  const auto x = small_integers<scalar_t>(rows * columns, 5);
  std::vector<acc_t> turned(rows * columns, -9), wide(rows * columns, -9);
  kernels.transpose(x.data(), rows, columns, acc_t(2), turned.data());
  kernels.widen(x.data(), rows * columns, wide.data());
  std::vector<scalar_t> back = small_integers<scalar_t>(rows * columns, 6);
  kernels.narrow(wide.data(), rows * columns, back.data());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      const double value = number(x[i * columns + c]);
      CHECK_CLOSE(turned[c * rows + i], 2 * value, 0);
      CHECK_CLOSE(wide[i * columns + c], value, 0);
      CHECK_CLOSE(number(back[i * columns + c]), value, 0);
    }
  }
}

template <typename scalar_t>
void check_type() {
  for (int64_t rows = 1; rows <= 17; ++rows) {
    check_products<scalar_t>(rows, 37, 27, 3);
  }
  check_products<scalar_t>(4, 64, 12, 8);
  check_products<scalar_t>(3, 5, 1, 1);
  check_conversion<scalar_t>(1, 1);
  check_conversion<scalar_t>(8, 16);
  check_conversion<scalar_t>(13, 21);
}

TEST_CASE("dense products for few rows and merged weights in float32") {
  check_type<float>();
}
TEST_CASE("dense products for few rows and merged weights in float64") {
  check_type<double>();
}
TEST_CASE("dense products for few rows and merged weights in bfloat16") {
  check_type<BFloat16Bits>();
}

TEST_CASE("narrowing rounds to the nearest bfloat16, ties to even, and keeps a NaN") {
  const auto& kernels = gauge_ext::low_rank_kernels<BFloat16Bits>();
  const float ulp = std::ldexp(1.0f, -7);
  for (int at = 0; at < 40; ++at) {  // in vectors and in the tail after them
    std::vector<float> from(40, 0.0f);
    std::vector<BFloat16Bits> to(40);
    const std::pair<float, float> cases[] = {{1 + 0.25f * ulp, 1.0f},
                                             {1 + 0.5f * ulp, 1.0f},
                                             {1 + 0.75f * ulp, 1 + ulp},
                                             {1 + 1.5f * ulp, 1 + 2 * ulp}};
    for (const auto& [value, expected] : cases) {
      from[at] = value;
      kernels.narrow(from.data(), 40, to.data());
      CHECK_CLOSE(number(to[at]), expected, 0);
    }
    from[at] = std::nanf("");
    kernels.narrow(from.data(), 40, to.data());
    CHECK(std::isnan(number(to[at])));
  }
}

}  // namespace
