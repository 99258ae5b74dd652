// The low-rank update of a weight against plain loops, for every storage type, over sizes with
// tails; and the sums that it takes on the way.

#include "ops/cpu/rank_update.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check_main.h"
#include "to_double.h"

namespace {

using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::Float16Bits;
using gauge_ext::Rounding;
using gauge_ext::UpdateSums;
using gauge_ext::test::to_double;

// Bits of small numbers of either sign, whatever the type.
template <typename scalar_t>
scalar_t number(std::mt19937& generator) {
  std::normal_distribution<double> normal;
  const auto value = static_cast<float>(normal(generator));
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return {static_cast<uint16_t>(bits >> 16)};
  } else if constexpr (std::is_same_v<scalar_t, Float16Bits>) {
    return {static_cast<uint16_t>(generator() & 0xBFFFu)};  // below 2
  } else {
    return value;
  }
}

// One unit in the last place of `value`
template <typename scalar_t>
double unit(double value) {
  const int exponent = value == 0 ? -200 : std::ilogb(value);
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    return std::ldexp(1.0, std::max(exponent - 7, -133));
  } else if constexpr (std::is_same_v<scalar_t, Float16Bits>) {
    return std::ldexp(1.0, std::max(exponent - 10, -24));
  } else {
    return 0.0;
  }
}

template <typename scalar_t>
void check_update(int64_t rows, int64_t columns, int64_t rank, bool stochastic) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int64_t kApart = 3;  // entries between the rows
  std::mt19937 generator(static_cast<unsigned>(rows + columns));
  const int64_t stride = columns + kApart;
  std::vector<scalar_t> weight, out(static_cast<size_t>(rows * stride));
  for (int64_t i = 0; i < rows * stride; ++i) {
    weight.push_back(number<scalar_t>(generator));
  }
  const auto untouched = out;
  std::vector<acc_t> left, right;
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < rows * rank; ++i) {
    left.push_back(static_cast<acc_t>(normal(generator)));
  }
  for (int64_t i = 0; i < rank * columns; ++i) {
    right.push_back(static_cast<acc_t>(normal(generator)));
  }
  const Rounding rounding = {17, 2, 1000};
  const auto& kernels = gauge_ext::rank_update_kernels<scalar_t>();
  UpdateSums sums;
  // In two pieces, as two threads would.
  for (int64_t first = 0; first < rows; first += (rows + 1) / 2) {
    kernels.update(weight.data(), stride, out.data(), stride, first,
                   std::min((rows + 1) / 2, rows - first), columns, left.data(), right.data(), rank,
                   stochastic ? &rounding : nullptr, true, sums);
  }
  CHECK(sums.finite);
  double delta_sum = 0, kept_sum = 0, lost_sum = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < stride; ++c) {
      const auto at = static_cast<size_t>(i * stride + c);
      if (c >= columns) {
        CHECK(std::memcmp(&out[at], &untouched[at], sizeof(scalar_t)) == 0);
        continue;
      }
      double delta = 0, size_of_terms = std::abs(to_double(weight[at]));
      for (int64_t j = 0; j < rank; ++j) {
        const double term = double(left[i * rank + j]) * right[j * columns + c];
        delta += term;
        size_of_terms += std::abs(term);
      }
      const double before = to_double(weight[at]), exact = before + delta;
      const double after = to_double(out[at]), step = unit<scalar_t>(exact);
      // The bound on the rounding errors of a sum of rank + 1 terms (Higham, 2002, section 4.2)
      const double narrow =
          double(rank + 1) * size_of_terms * std::numeric_limits<acc_t>::epsilon();
      CHECK_CLOSE(after, exact, (stochastic ? step : step / 2) + narrow);
      if (stochastic && step > 0) {
        // The upper neighbour just where the random bits say so; a hair's breadth is left open.
        const double size = std::abs(exact), share = size / step - std::floor(size / step);
        uint32_t draw = gauge_ext::rounding_bits(rounding, i, c);
        if (std::is_same_v<scalar_t, Float16Bits> && step > 0x1p-24) {
          draw = draw / 8 * 8;
        }
        const double margin = share * 65536 - (65535.0 - draw);
        if (std::abs(margin) > 65536 * narrow / step + 8) {
          CHECK((std::abs(after) > size) == (margin > 0));
        }
      }
      delta_sum += delta * delta;
      kept_sum += (after - before) * (after - before);
      lost_sum += (delta - (after - before)) * (delta - (after - before));
    }
  }
  CHECK_CLOSE(sums.delta, delta_sum, 1e-4 * delta_sum);
  CHECK_CLOSE(sums.kept, kept_sum, 1e-4 * kept_sum);
  if (unit<scalar_t>(1.0) > 0) {
    CHECK_CLOSE(sums.lost, lost_sum, 1e-3 * lost_sum);
  }
}

template <typename scalar_t>
void check_sizes(bool stochastic) {
  check_update<scalar_t>(1, 1, 1, stochastic);
  check_update<scalar_t>(13, 37, 5, stochastic);
  check_update<scalar_t>(20, 259, 16, stochastic);
  check_update<scalar_t>(7, 640, 300, stochastic);  // several blocks of columns
}

TEST_CASE("rank update in float32") {
  check_sizes<float>(false);
}
TEST_CASE("rank update in float64") {
  check_sizes<double>(false);
}
TEST_CASE("rank update in bfloat16") {
  check_sizes<BFloat16Bits>(false);
  check_sizes<BFloat16Bits>(true);
}
TEST_CASE("rank update in float16") {
  check_sizes<Float16Bits>(false);
  check_sizes<Float16Bits>(true);
}

TEST_CASE("an entry that is not finite is seen, wherever it is") {
  const float bad[] = {std::numeric_limits<float>::infinity(), std::nanf("")};
  for (const float value : bad) {
    for (int64_t at = 0; at < 7 * 21; at += 11) {
      std::vector<float> weight(7 * 21, 1.0f), left(7, 0.0f), right(21, 0.0f);
      weight[static_cast<size_t>(at)] = value;
      UpdateSums sums;
      gauge_ext::rank_update_kernels<float>().update(weight.data(), 21, weight.data(), 21, 0, 7, 21,
                                                     left.data(), right.data(), 1, nullptr, false,
                                                     sums);
      CHECK(!sums.finite);
    }
  }
}

}  // namespace
