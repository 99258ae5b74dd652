// Rows scaled entry by entry against plain loops, for every storage type, with tails.

#include "ops/cpu/scale.h"

#include <cmath>
#include <vector>

#include "check_main.h"

namespace {

using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::widen;

template <typename scalar_t>
void check_scale(double tolerance) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = gauge_ext::scale_kernels<scalar_t>();
  const int64_t rows = 5;
  for (const int64_t columns : {1, 3, 16, 39}) {
    std::vector<scalar_t> y, grad, z(rows * columns), grad_y(rows * columns);
    std::vector<acc_t> gain, bias, sum(columns, acc_t(2));
    for (int64_t i = 0; i < rows * columns; ++i) {
      y.push_back(gauge_ext::narrow<scalar_t>(static_cast<acc_t>(std::sin(double(i)))));
      grad.push_back(gauge_ext::narrow<scalar_t>(static_cast<acc_t>(std::cos(double(i)))));
    }
    for (int64_t j = 0; j < columns; ++j) {
      gain.push_back(static_cast<acc_t>(1 + 0.25 * double(j)));
      bias.push_back(static_cast<acc_t>(-0.5 * double(j)));
    }
    kernels.scale(y.data(), rows, columns, gain.data(), bias.data(), z.data());
    kernels.scale_backward(grad.data(), y.data(), rows, columns, gain.data(), grad_y.data(),
                           sum.data());
    std::vector<scalar_t> alone(rows * columns);
    std::vector<acc_t> sum_alone(columns, acc_t(2));
    kernels.scale_backward(grad.data(), y.data(), rows, columns, gain.data(), alone.data(),
                           nullptr);
    kernels.scale_backward(grad.data(), y.data(), rows, columns, gain.data(), nullptr,
                           sum_alone.data());
    for (int64_t j = 0; j < columns; ++j) {
      double expected_sum = 2;
      for (int64_t i = j; i < rows * columns; i += columns) {
        const double value = widen(y[i]), from = widen(grad[i]);
        const double scaled = value * double(gain[j]) + double(bias[j]);
        CHECK(std::abs(widen(z[i]) - scaled) <= tolerance * (1 + std::abs(scaled)));
        const double given = from * double(gain[j]);
        CHECK(std::abs(widen(grad_y[i]) - given) <= tolerance * (1 + std::abs(given)));
        CHECK(widen(alone[i]) == widen(grad_y[i]));
        expected_sum += from * value;
      }
      CHECK(std::abs(sum[j] - expected_sum) <= 1e-5);
      CHECK(sum_alone[j] == sum[j]);
    }
  }
}

TEST_CASE("rows scaled, and both gradients, together and alone") {
  check_scale<float>(1e-6);
  check_scale<double>(1e-14);
  check_scale<BFloat16Bits>(5e-3);
}

}  // namespace
