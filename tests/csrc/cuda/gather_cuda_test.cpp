// The CUDA kernels of lora_gather, run on the CPU by an emulation, against plain loops in float64.

#define GAUGE_EXT_CUDA_BLOCKS 16

#include "ops/cuda/gather.h"

#include <algorithm>
#include <random>
#include <vector>

#include "check_main.h"
#include "cuda/cuda_emulation.h"
#include "ops/cuda/gather.cuh"
#include "ops/cuda/upload.cuh"

namespace {

using namespace gauge_ext::cuda;
using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::narrow;
using gauge_ext::widen;
using gauge_ext::emulation::Order;

template <typename T>
std::vector<T> random(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(narrow<T>(normal(generator)));
  }
  return values;
}

struct Plan {
  std::vector<int64_t> starts, order;

  Plan(const std::vector<int64_t>& index, int64_t adapters)
      : starts(adapters + 2, -1), order(index.size(), -1) {
    launch_plan(index.data(), static_cast<int64_t>(index.size()), adapters, starts.data(),
                order.data(), nullptr);
  }
};

TEST_CASE("CUDA lora_gather, emulated: the plan is a stable sort") {
  std::mt19937 generator(7);
  for (const int64_t entries : {0, 1, 5, 256, 1000}) {
    const int64_t adapters = 6;
    std::vector<int64_t> index(entries);
    for (auto& value : index) {
      value = static_cast<int64_t>(generator() % 6) - 1;  // the last adapter has no rows
    }
    for (const Order order : {Order::kDescending, Order::kAscending}) {
      gauge_ext::emulation::order = order;
      const Plan plan(index, adapters);
      std::vector<int64_t> expected(entries);
      for (int64_t i = 0; i < entries; ++i) {
        expected[i] = i;
      }
      std::stable_sort(expected.begin(), expected.end(),
                       [&](int64_t a, int64_t b) { return index[a] < index[b]; });
      CHECK(plan.order == expected);
      for (int64_t i = 0; i < adapters + 2; ++i) {
        CHECK(plan.starts[i] ==
              std::count_if(index.begin(), index.end(), [&](int64_t v) { return v < i - 1; }));
      }
    }
  }
}

TEST_CASE("CUDA tables, emulated, come across whole") {
  const auto table = random<double>(1000, 3);
  std::vector<double> there(1001, -1);
  upload(table.data(), 8 * 1000, there.data(), nullptr);
  CHECK(std::equal(table.begin(), table.end(), there.begin()));
  CHECK(there[1000] == -1);
}

// A low-rank product and its gradients, row by row, in float64
template <typename scalar_t, typename factor_t>
void check(const std::vector<int64_t>& index,
           int64_t rows_each,
           int64_t in,
           int64_t out,
           const std::vector<int64_t>& ranks) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto adapters = static_cast<int64_t>(ranks.size());
  const auto rows = static_cast<int64_t>(index.size()) * rows_each;
  const auto x = random<scalar_t>(rows * in, 1), grad = random<scalar_t>(rows * out, 2);
  const auto bias = random<scalar_t>(out, 3);
  const int64_t max_rank = *std::max_element(ranks.begin(), ranks.end());
  const Type type = std::is_same_v<factor_t, float>    ? Type::kFloat
                    : std::is_same_v<factor_t, double> ? Type::kDouble
                                                       : Type::kBFloat16;
  std::vector<std::vector<factor_t>> A, B, grads_A, grads_B;
  std::vector<GatherAdapter> table;
  const factor_t nan = narrow<factor_t>(NAN);
  for (int64_t i = 0; i < adapters; ++i) {
    A.push_back(random<factor_t>(ranks[i] * in, static_cast<unsigned>(10 + i)));
    B.push_back(random<factor_t>(out * ranks[i], static_cast<unsigned>(20 + i)));
    grads_A.emplace_back(A.back().size(), nan);
    grads_B.emplace_back(B.back().size(), nan);
    table.push_back({A[i].data(), B[i].data(), grads_A[i].data(), grads_B[i].data(), ranks[i],
                     0.5 + 0.25 * double(i)});
  }

  const auto& kernels = gather_kernels<scalar_t>();
  const double unit = std::is_same_v<acc_t, double> ? 1e-14 : 0x1p-20;
  const double stored = sizeof(scalar_t) == 2 ? 0x1p-8 : 0,
               held = sizeof(factor_t) == 2 ? 0x1p-8 : 0;
  std::vector<scalar_t> y_before, grad_x_before;
  for (const Order order : {Order::kDescending, Order::kAscending}) {
    gauge_ext::emulation::order = order;
    const Plan sorted(index, adapters);
    const GatherRows plan = {rows, rows_each, adapters, sorted.starts.data(), sorted.order.data()};
    const auto project = [&](const std::vector<scalar_t>& from, int64_t columns, Side side) {
      std::vector<acc_t> hidden(rows * max_rank, acc_t(NAN));
      std::vector<acc_t> partial(kernels.projected_size(rows, columns, adapters, max_rank),
                                 acc_t(NAN));
      kernels.project({from.data(), rows, columns}, plan, table.data(), type, side, max_rank,
                      hidden.data(), partial.data(), nullptr);
      return hidden;
    };
    const auto hidden = project(x, in, Side::kA), grad_hidden = project(grad, out, Side::kB);
    std::vector<scalar_t> y(rows * out, narrow<scalar_t>(NAN)), grad_x(rows * in, y[0]);
    kernels.expand({y.data(), rows, out}, bias.data(), hidden.data(), plan, table.data(), type,
                   Side::kB, max_rank, nullptr);
    kernels.expand({grad_x.data(), rows, in}, nullptr, grad_hidden.data(), plan, table.data(), type,
                   Side::kA, max_rank, nullptr);
    kernels.reduce({x.data(), rows, in}, grad_hidden.data(), plan, table.data(), type, Side::kA,
                   max_rank, nullptr);
    kernels.reduce({grad.data(), rows, out}, hidden.data(), plan, table.data(), type, Side::kB,
                   max_rank, nullptr);
    if (order == Order::kAscending) {
      CHECK(std::memcmp(y.data(), y_before.data(), y.size() * sizeof(scalar_t)) == 0);
      CHECK(std::memcmp(grad_x.data(), grad_x_before.data(), grad_x.size() * sizeof(scalar_t)) ==
            0);
    }
    y_before = y;
    grad_x_before = grad_x;

    std::vector<std::vector<double>> sums_A, sums_B;
    for (int64_t i = 0; i < adapters; ++i) {
      sums_A.emplace_back(A[i].size(), 0.0);
      sums_B.emplace_back(B[i].size(), 0.0);
    }
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t i = index[n / rows_each];
      const int64_t rank = i < 0 ? 0 : ranks[i];
      std::vector<double> h(rank), g(rank);
      for (int64_t j = 0; j < rank; ++j) {
        for (int64_t c = 0; c < in; ++c) {
          h[j] += table[i].scaling * widen(x[n * in + c]) * widen(A[i][j * in + c]);
        }
        for (int64_t c = 0; c < out; ++c) {
          g[j] += table[i].scaling * widen(grad[n * out + c]) * widen(B[i][c * rank + j]);
        }
      }
      const auto tolerance = [&](int64_t terms) { return unit * 16 * double(terms + 1); };
      for (int64_t c = 0; c < out; ++c) {
        double expected = widen(bias[c]);
        for (int64_t j = 0; j < rank; ++j) {
          expected += h[j] * widen(B[i][c * rank + j]);
          sums_B[i][c * rank + j] += h[j] * widen(grad[n * out + c]);
        }
        CHECK_CLOSE(widen(y[n * out + c]), expected,
                    tolerance(in + rank) + stored * std::abs(expected));
      }
      for (int64_t c = 0; c < in; ++c) {
        double expected = 0;
        for (int64_t j = 0; j < rank; ++j) {
          expected += g[j] * widen(A[i][j * in + c]);
          sums_A[i][j * in + c] += g[j] * widen(x[n * in + c]);
        }
        CHECK_CLOSE(widen(grad_x[n * in + c]), expected,
                    tolerance(out + rank) + stored * std::abs(expected));
      }
    }
    for (int64_t i = 0; i < adapters; ++i) {
      for (size_t k = 0; k < A[i].size(); ++k) {
        CHECK_CLOSE(widen(grads_A[i][k]), sums_A[i][k],
                    unit * 16 * double(rows + out) + held * std::abs(sums_A[i][k]));
      }
      for (size_t k = 0; k < B[i].size(); ++k) {
        CHECK_CLOSE(widen(grads_B[i][k]), sums_B[i][k],
                    unit * 16 * double(rows + in) + held * std::abs(sums_B[i][k]));
      }
    }
  }
}

// Ranks that differ, one above a block's; adapters without rows, rows without an adapter; rows that
// fill more than a tile; entries of several rows; columns with tails, and cut among blocks.
template <typename scalar_t, typename factor_t>
void check_sizes() {
  check<scalar_t, factor_t>({1, 0, -1, 1, 3, 0, 1}, 1, 130, 37, {3, 8, 5, 17});
  check<scalar_t, factor_t>({2, -1, 0, 2}, 19, 36, 140, {4, 2, 40});
  check<scalar_t, factor_t>({-1, -1}, 3, 8, 8, {2});
}

TEST_CASE("CUDA lora_gather, emulated: float32") {
  check_sizes<float, float>();
  check<float, float>({0, 1}, 1, 700, 600, {4, 9});
}
TEST_CASE("CUDA lora_gather, emulated: float64") {
  check_sizes<double, double>();
}
TEST_CASE("CUDA lora_gather, emulated: bfloat16") {
  check_sizes<BFloat16Bits, BFloat16Bits>();
  check_sizes<BFloat16Bits, float>();
}

}  // namespace
