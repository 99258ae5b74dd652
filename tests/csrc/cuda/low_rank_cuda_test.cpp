// The CUDA kernels themselves, run on the CPU by an emulation, against plain loops in float64.

// So few blocks that each has several tiles to go through, of matrices that are quickly emulated.
#define GAUGE_EXT_CUDA_BLOCKS 4

#include "ops/cuda/low_rank.h"

#include <random>
#include <vector>

#include "check_main.h"
#include "cuda/cuda_emulation.h"
#include "math/dropout.h"
#include "ops/cuda/expand.cuh"
#include "ops/cuda/skinny.cuh"

namespace {

using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::Dropout;
using gauge_ext::Float16Bits;
using gauge_ext::narrow;
using gauge_ext::widen;
using gauge_ext::cuda::DropoutSource;
using gauge_ext::cuda::Factor;
using gauge_ext::cuda::Matrix;
using gauge_ext::cuda::Type;
using gauge_ext::emulation::Order;

template <typename scalar_t>
std::vector<scalar_t> random(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<scalar_t> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(narrow<scalar_t>(normal(generator)));
  }
  return values;
}

// How far off a product of normal numbers may be, for a sum of `terms`: about 2^-21 of a term for
// the operands cut to tf32, and as much for the sum; float64 has 2^-52.
template <typename acc_t>
double tolerance(int64_t terms) {
  const double unit = std::is_same_v<acc_t, double> ? 1e-14 : 0x1p-20;
  return unit * (4 + 4 * std::sqrt(double(terms)));
}

// The spacing of the stored numbers around `value`, half of which rounding may cost.
template <typename scalar_t>
double rounding(double value) {
  const double unit = std::is_same_v<scalar_t, BFloat16Bits>  ? 0x1p-8
                      : std::is_same_v<scalar_t, Float16Bits> ? 0x1p-11
                                                              : 0;
  return unit * std::abs(value) + (std::is_same_v<scalar_t, Float16Bits> ? 0x1p-24 : 0);
}

template <typename T>
constexpr Type type_of() {
  return std::is_same_v<T, float>          ? Type::kFloat
         : std::is_same_v<T, double>       ? Type::kDouble
         : std::is_same_v<T, BFloat16Bits> ? Type::kBFloat16
                                           : Type::kFloat16;
}

struct Sizes {
  int64_t rows, columns, rank;
};

template <typename scalar_t, typename factor_t>
struct Problem {
  using acc_t = typename AccOf<scalar_t>::type;
  Sizes n;
  Dropout dropout;
  bool transposed;  // R lies in memory as (columns, rank)
  std::vector<scalar_t> x = random<scalar_t>(n.rows * n.columns, 1);
  std::vector<scalar_t> y = random<scalar_t>(n.rows * n.columns, 2);
  std::vector<factor_t> right = random<factor_t>(n.rank * n.columns, 3);
  std::vector<acc_t> left = random<acc_t>(n.rows * n.rank, 4);
  std::vector<scalar_t> bias = random<scalar_t>(n.columns, 5);
  std::vector<double> mask = masks();
  int64_t seed = static_cast<int64_t>(dropout.seed);

  std::vector<double> masks() const {
    std::vector<double> all(n.rows * n.columns, 1.0);
    for (int64_t i = 0; dropout.active() && i < n.rows * n.columns; ++i) {
      all[i] = gauge_ext::dropout_element(dropout, i / n.columns, i % n.columns);
    }
    return all;
  }
  Matrix<const scalar_t> matrix() const { return {x.data(), n.rows, n.columns}; }
  Factor<const void> factor() const {
    return {right.data(), type_of<factor_t>(), transposed ? 1 : n.columns, transposed ? n.rank : 1};
  }
  // The seed is read from the device's memory, what the host has of it is wrong.
  DropoutSource source() const {
    DropoutSource from{dropout, &seed};
    from.dropout.seed = 0;
    return from;
  }

  double right_at(int64_t j, int64_t c) const {
    return widen(right[transposed ? c * n.rank + j : j * n.columns + c]);
  }
  double projected(int64_t i, int64_t j, bool masked) const {
    double sum = 0;
    for (int64_t c = 0; c < n.columns; ++c) {
      const int64_t at = i * n.columns + c;
      sum += widen(x[at]) * (masked ? mask[at] : 1.0) * right_at(j, c);
    }
    return sum;
  }
  double reduced(int64_t j, int64_t c, bool masked) const {
    double sum = 0;
    for (int64_t i = 0; i < n.rows; ++i) {
      const int64_t at = i * n.columns + c;
      sum += double(left[i * n.rank + j]) * widen(x[at]) * (masked ? mask[at] : 1.0);
    }
    return sum;
  }
  double expanded(int64_t i, int64_t c) const {
    double sum = 0;
    for (int64_t j = 0; j < n.rank; ++j) {
      sum += double(left[i * n.rank + j]) * right_at(j, c);
    }
    return sum * mask[i * n.columns + c];
  }
};

// Bit for bit, NaNs too
template <typename T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Everything that the kernels write for a problem.
template <typename scalar_t, typename factor_t>
struct Results {
  using acc_t = typename AccOf<scalar_t>::type;
  std::vector<acc_t> hidden, hidden_both;
  std::vector<factor_t> sum, sum_both;  // (rank, columns), (columns, rank)
  std::vector<scalar_t> written, biased, added;

  explicit Results(const Problem<scalar_t, factor_t>& p) {
    using namespace gauge_ext::cuda;
    const auto [rows, columns, rank] = p.n;
    // Where nothing is written it stays a NaN.
    const acc_t nan = std::numeric_limits<acc_t>::quiet_NaN();
    hidden.assign(rows * rank, nan);
    hidden_both = hidden;
    sum.assign(rank * columns, narrow<factor_t>(nan));
    sum_both = sum;
    written.assign(rows * columns, narrow<scalar_t>(nan));
    biased = written;
    added = p.y;
    std::vector<acc_t> partial(projected_size<scalar_t>(rows, columns, rank), nan);
    project<scalar_t, acc_t>(p.matrix(), p.factor(), rank, p.source(), acc_t(0.5), hidden.data(),
                             partial.data(), nullptr);
    partial.assign(reduced_size<scalar_t>(rows, columns, rank), nan);
    reduce<scalar_t, acc_t>(p.matrix(), p.left.data(), rank, p.source(), acc_t(0.5),
                            {sum.data(), type_of<factor_t>(), columns, 1}, partial.data(), nullptr);
    partial.assign(project_reduced_size<scalar_t>(rows, columns, rank), nan);
    project_reduce<scalar_t, acc_t>(
        p.matrix(), p.factor(), p.left.data(), rank, acc_t(0.5), hidden_both.data(),
        {sum_both.data(), type_of<factor_t>(), 1, rank}, partial.data(), nullptr);
    const auto expand_into = [&](std::vector<scalar_t>& y, bool add, const scalar_t* bias) {
      expand<scalar_t, acc_t>({y.data(), rows, columns}, add, bias, p.left.data(), p.factor(), rank,
                              p.source(), acc_t(0.5), nullptr);
    };
    expand_into(written, false, nullptr);
    expand_into(biased, false, p.bias.data());
    expand_into(added, true, nullptr);
  }
};

template <typename scalar_t, typename factor_t>
void check(const Sizes& n, const Dropout& dropout, bool transposed) {
  using acc_t = typename AccOf<scalar_t>::type;
  const Problem<scalar_t, factor_t> p{n, dropout, transposed};
  gauge_ext::emulation::order = Order::kDescending;
  const Results<scalar_t, factor_t> backward(p);
  gauge_ext::emulation::order = Order::kAscending;
  const Results<scalar_t, factor_t> r(p);
  CHECK(same_bytes(r.hidden, backward.hidden));
  CHECK(same_bytes(r.hidden_both, backward.hidden_both));
  CHECK(same_bytes(r.sum, backward.sum));
  CHECK(same_bytes(r.sum_both, backward.sum_both));
  CHECK(same_bytes(r.written, backward.written));
  CHECK(same_bytes(r.biased, backward.biased));
  CHECK(same_bytes(r.added, backward.added));

  const double scale = dropout.active() ? std::max(dropout.scale, 1.0) : 1.0;
  const double of_columns = scale * tolerance<acc_t>(n.columns);
  const double of_rows = scale * tolerance<acc_t>(n.rows);
  const double of_rank = scale * tolerance<acc_t>(n.rank);
  for (int64_t i = 0; i < n.rows; ++i) {
    for (int64_t j = 0; j < n.rank; ++j) {
      CHECK_CLOSE(r.hidden[i * n.rank + j], 0.5 * p.projected(i, j, true), of_columns);
      CHECK_CLOSE(r.hidden_both[i * n.rank + j], 0.5 * p.projected(i, j, false), of_columns);
    }
    for (int64_t c = 0; c < n.columns; ++c) {
      const int64_t at = i * n.columns + c;
      const double product = 0.5 * p.expanded(i, c);
      const double biased = product + widen(p.bias[c]), added = product + widen(p.y[at]);
      CHECK_CLOSE(widen(r.written[at]), product, of_rank + rounding<scalar_t>(product));
      CHECK_CLOSE(widen(r.biased[at]), biased, of_rank + rounding<scalar_t>(biased));
      CHECK_CLOSE(widen(r.added[at]), added, of_rank + rounding<scalar_t>(added));
    }
  }
  for (int64_t j = 0; j < n.rank; ++j) {
    for (int64_t c = 0; c < n.columns; ++c) {
      const double masked = 0.5 * p.reduced(j, c, true), plain = 0.5 * p.reduced(j, c, false);
      CHECK_CLOSE(widen(r.sum[j * n.columns + c]), masked, of_rows + rounding<factor_t>(masked));
      CHECK_CLOSE(widen(r.sum_both[c * n.rank + j]), plain, of_rows + rounding<factor_t>(plain));
    }
  }
}

// Ranks with and without a tail, above a block's; columns that are no multiple of a pack, of a
// tile; rows below and above a tile; sizes at which sums are cut among blocks.
template <typename scalar_t, typename factor_t>
void check_sizes() {
  const Dropout none, some = Dropout::make(0.1, 0x123456789ABCDEF0), all = Dropout::make(1.0, 3);
  check<scalar_t, factor_t>({1, 1, 1}, some, false);
  check<scalar_t, factor_t>({5, 36, 8}, none, false);
  check<scalar_t, factor_t>({70, 131, 5}, some, true);
  check<scalar_t, factor_t>({67, 260, 16}, some, false);
  check<scalar_t, factor_t>({130, 130, 19}, none, true);
  check<scalar_t, factor_t>({33, 64, 40}, some, true);
  check<scalar_t, factor_t>({3, 1100, 4}, some, false);
  check<scalar_t, factor_t>({9, 20, 3}, all, false);
}

TEST_CASE("CUDA low-rank products, emulated: float32") {
  check_sizes<float, float>();
}
TEST_CASE("CUDA low-rank products, emulated: float64") {
  check_sizes<double, double>();
}
TEST_CASE("CUDA low-rank products, emulated: bfloat16") {
  check_sizes<BFloat16Bits, BFloat16Bits>();
}
TEST_CASE("CUDA low-rank products, emulated: bfloat16, float32 factors") {
  check_sizes<BFloat16Bits, float>();
}
TEST_CASE("CUDA low-rank products, emulated: float16") {
  check_sizes<Float16Bits, Float16Bits>();
}
TEST_CASE("CUDA low-rank products, emulated: float16, float32 factors") {
  check_sizes<Float16Bits, float>();
}

TEST_CASE("CUDA low-rank products, emulated: nothing to do") {
  const Dropout none;
  for (const Sizes& n : {Sizes{0, 8, 2}, Sizes{4, 8, 0}, Sizes{4, 0, 2}}) {
    check<float, float>(n, none, false);
    check<BFloat16Bits, BFloat16Bits>(n, none, true);
  }
}

TEST_CASE("CUDA dropout mask, emulated, is the CPU's") {
  using namespace gauge_ext::cuda;
  const Dropout dropout = Dropout::make(0.3, 987654321);
  for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{3, 5}, {70, 128}, {2, 300}}) {
    std::vector<double> mask(rows * columns, -1);
    launch_mask<double>({mask.data(), rows, columns}, {dropout, nullptr}, nullptr);
    for (int64_t i = 0; i < rows * columns; ++i) {
      CHECK(mask[i] == gauge_ext::dropout_element(dropout, i / columns, i % columns));
    }
  }
}

}  // namespace
