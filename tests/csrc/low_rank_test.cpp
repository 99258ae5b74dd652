// The skinny products against plain loops, for every storage type, over sizes with tails.

#include "ops/cpu/low_rank.h"

#include <cstring>
#include <random>
#include <vector>

#include "check_main.h"
#include "to_double.h"

namespace {

using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::Dropout;
using gauge_ext::test::to_double;

template <typename scalar_t>
scalar_t from_double(double value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    const auto narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof(bits));
    return {static_cast<uint16_t>(bits >> 16)};
  } else {
    return static_cast<scalar_t>(value);
  }
}

template <typename scalar_t>
std::vector<scalar_t> random(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<scalar_t> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(from_double<scalar_t>(normal(generator)));
  }
  return values;
}

// One problem: X, Y are (rows, columns), R is (rank, columns), L is (rows, rank).
template <typename scalar_t>
struct Problem {
  using acc_t = typename AccOf<scalar_t>::type;
  int64_t rows, columns, rank;
  Dropout dropout;
  std::vector<scalar_t> x = random<scalar_t>(rows * columns, 1);
  std::vector<scalar_t> y = random<scalar_t>(rows * columns, 2);
  std::vector<acc_t> right = random<acc_t>(rank * columns, 3);
  std::vector<acc_t> left = random<acc_t>(rows * rank, 4);

  double mask(int64_t i, int64_t c, int64_t first_row) const {
    return dropout.active() ? gauge_ext::dropout_element(dropout, first_row + i, c) : 1.0;
  }
  double projected(int64_t i, int64_t j, int64_t first_row) const {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) {
      sum += to_double(x[i * columns + c]) * mask(i, c, first_row) * right[j * columns + c];
    }
    return sum;
  }
  double expanded(int64_t i, int64_t c) const {
    double sum = 0;
    for (int64_t j = 0; j < rank; ++j) {
      sum += double(left[i * rank + j]) * right[j * columns + c];
    }
    return sum;
  }
  double reduced(int64_t j, int64_t c, int64_t first_row) const {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      sum += left[i * rank + j] * to_double(x[i * columns + c]) * mask(i, c, first_row);
    }
    return sum;
  }
};

template <typename scalar_t>
void check_all(int64_t rows, int64_t columns, int64_t rank, const Dropout& dropout) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = gauge_ext::low_rank_kernels<scalar_t>();
  const double exact = std::is_same_v<acc_t, double> ? 1e-12 : 2e-3;
  // y is stored in its own type: a bfloat16 keeps 8 bits.
  const double stored = std::is_same_v<scalar_t, BFloat16Bits> ? 0.2 : exact;
  const Problem<scalar_t> p{rows, columns, rank, dropout};
  const Problem<scalar_t> plain{rows, columns, rank, Dropout()};
  const int64_t first_row = 41;

  std::vector<acc_t> hidden(rows * rank, -1);
  kernels.project(p.x.data(), first_row, rows, columns, p.right.data(), rank, dropout,
                  hidden.data());
  std::vector<acc_t> hidden_plain(rows * rank, -1), sum_plain(rank * columns, 3);
  kernels.project_reduce(p.x.data(), rows, columns, p.right.data(), p.left.data(), rank,
                         hidden_plain.data(), sum_plain.data());
  std::vector<scalar_t> added = p.y, written = p.y, biased = p.y;
  const std::vector<acc_t> bias = random<acc_t>(columns, 5);
  kernels.expand(added.data(), true, nullptr, rows, columns, p.left.data(), p.right.data(), rank,
                 acc_t(0.5));
  kernels.expand(written.data(), false, nullptr, rows, columns, p.left.data(), p.right.data(), rank,
                 acc_t(0.5));
  kernels.expand(biased.data(), false, bias.data(), rows, columns, p.left.data(), p.right.data(),
                 rank, acc_t(0.5));
  std::vector<scalar_t> masked_added = p.y, masked_written = p.y;
  std::vector<acc_t> sum(rank * columns, 3), sum_again(rank * columns, 3);
  kernels.expand_reduce(p.x.data(), masked_added.data(), true, first_row, rows, columns,
                        p.left.data(), p.right.data(), rank, dropout, sum.data());
  kernels.expand_reduce(p.x.data(), masked_written.data(), false, first_row, rows, columns,
                        p.left.data(), p.right.data(), rank, dropout, sum_again.data());
  CHECK(sum == sum_again);
  std::vector<acc_t> sum_alone(rank * columns, 3);
  kernels.expand_reduce(p.x.data(), nullptr, false, first_row, rows, columns, p.left.data(),
                        p.right.data(), rank, dropout, sum_alone.data());
  CHECK(sum == sum_alone);

  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      CHECK_CLOSE(hidden[i * rank + j], p.projected(i, j, first_row), exact);
      CHECK_CLOSE(hidden_plain[i * rank + j], plain.projected(i, j, 0), exact);
    }
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = i * columns + c;
      const double before = to_double(p.y[at]), product = p.expanded(i, c);
      CHECK_CLOSE(to_double(added[at]), before + 0.5 * product, stored);
      CHECK_CLOSE(to_double(written[at]), 0.5 * product, stored);
      CHECK_CLOSE(to_double(biased[at]), bias[c] + 0.5 * product, stored);
      const double masked = product * p.mask(i, c, first_row);
      CHECK_CLOSE(to_double(masked_added[at]), before + masked, stored);
      CHECK_CLOSE(to_double(masked_written[at]), masked, stored);
    }
  }
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t c = 0; c < columns; ++c) {
      CHECK_CLOSE(sum[j * columns + c], 3 + p.reduced(j, c, first_row), exact);
      CHECK_CLOSE(sum_plain[j * columns + c], 3 + plain.reduced(j, c, 0), exact);
    }
  }
}

template <typename scalar_t>
void check_sizes() {
  const Dropout none, half = Dropout::make(0.5, 99);
  for (const auto& dropout : {none, half}) {
    check_all<scalar_t>(1, 1, 1, dropout);
    check_all<scalar_t>(13, 37, 5, dropout);
    check_all<scalar_t>(101, 130, 8, dropout);
    check_all<scalar_t>(3, 259, 17, dropout);
    check_all<scalar_t>(4, 64, 4, dropout);
  }
}

TEST_CASE("low-rank products in float32") {
  check_sizes<float>();
}
TEST_CASE("low-rank products in float64") {
  check_sizes<double>();
}
TEST_CASE("low-rank products in bfloat16") {
  check_sizes<BFloat16Bits>();
}

template <typename scalar_t>
void check_transpose(int64_t rows, int64_t columns) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto x = random<scalar_t>(rows * columns, 6);
  std::vector<acc_t> to(rows * columns, acc_t(-1));
  gauge_ext::low_rank_kernels<scalar_t>().transpose(x.data(), rows, columns, acc_t(0.5), to.data());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      CHECK(double(to[c * rows + i]) == 0.5 * to_double(x[i * columns + c]));
    }
  }
}

TEST_CASE("a scaled transpose, in whole squares and at the edges") {
  for (const int64_t rows : {1, 8, 19, 24}) {
    for (const int64_t columns : {1, 5, 8, 16, 21}) {
      check_transpose<float>(rows, columns);
      check_transpose<double>(rows, columns);
      check_transpose<BFloat16Bits>(rows, columns);
    }
  }
}

}  // namespace
