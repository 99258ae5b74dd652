// The squared norms of W + scale · L R by rows and by columns against plain loops, for every
// storage type, with tails of tiles and vectors, and more rows than are added up at once.

#include "ops/cpu/row_norms.h"

#include <cmath>
#include <vector>

#include "check_main.h"

namespace {

using gauge_ext::AccOf;
using gauge_ext::BFloat16Bits;
using gauge_ext::Float16Bits;
using gauge_ext::widen;

// What lies beyond a row's columns, which no sum may see
constexpr double kOutside = 1e4;

template <typename scalar_t>
void check_norms(int64_t rows, int64_t columns, int64_t rank, double tolerance) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto& kernels = gauge_ext::row_norm_kernels<scalar_t>();
  const int64_t stride = columns + 3, right_stride = columns + 2;
  const auto scale = acc_t(0.5);
  std::vector<scalar_t> weight(rows * stride, gauge_ext::narrow<scalar_t>(acc_t(kOutside)));
  std::vector<acc_t> left(rows * rank), wide(rank * right_stride, acc_t(kOutside)),
      right(rank * columns);
  for (int64_t n = 0; n < rows * rank; ++n) {
    left[n] = static_cast<acc_t>(std::sin(double(n)));
  }
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t c = 0; c < columns; ++c) {
      right[j * columns + c] = static_cast<acc_t>(std::cos(double(j * columns + c)));
      wide[j * right_stride + c] = right[j * columns + c];
    }
  }
  std::vector<double> of_rows(rows, 1.0), of_columns(columns, 2.0), by_row(rows, 1.0),
      by_column(columns, 2.0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      const auto value = static_cast<acc_t>(std::sin(0.7 * double(i * columns + c)));
      weight[i * stride + c] = gauge_ext::narrow<scalar_t>(value);
      double sum = widen(weight[i * stride + c]);
      for (int64_t j = 0; j < rank; ++j) {
        sum += double(scale) * double(left[i * rank + j]) * double(right[j * columns + c]);
      }
      of_rows[i] += sum * sum;
      of_columns[c] += sum * sum;
    }
  }
  kernels.rows(weight.data(), stride, rows, columns, left.data(), right.data(), rank, scale,
               by_row.data());
  kernels.columns(weight.data(), stride, rows, columns, left.data(), wide.data(), right_stride,
                  rank, scale, by_column.data());
  for (int64_t i = 0; i < rows; ++i) {
    CHECK_CLOSE(by_row[i], of_rows[i], tolerance * of_rows[i]);
  }
  for (int64_t c = 0; c < columns; ++c) {
    CHECK_CLOSE(by_column[c], of_columns[c], tolerance * of_columns[c]);
  }
}

template <typename scalar_t>
void check_sizes(double tolerance) {
  for (const int64_t rank : {0, 1, 5}) {
    check_norms<scalar_t>(1, 1, rank, tolerance);
    check_norms<scalar_t>(7, 39, rank, tolerance);
    check_norms<scalar_t>(12, 64, rank, tolerance);
    check_norms<scalar_t>(401, 3, rank, tolerance);
  }
  // R in several blocks of columns
  check_norms<scalar_t>(2, 1111, 70, tolerance);
}

TEST_CASE("squared norms of rows and of columns of a weight with a low-rank update") {
  check_sizes<float>(3e-6);
  check_sizes<double>(1e-14);
  check_sizes<BFloat16Bits>(3e-6);
  check_sizes<Float16Bits>(3e-6);
}

TEST_CASE("very many squares are added up without the loss of the last ones") {
  const int64_t rows = 200000;
  const std::vector<float> weight(rows, 0.1F);
  double sum = 0;
  gauge_ext::row_norm_kernels<float>().columns(weight.data(), 1, rows, 1, nullptr, nullptr, 1, 0,
                                               1.0F, &sum);
  const double expected = double(rows) * double(0.1F) * double(0.1F);
  CHECK_CLOSE(sum, expected, 1e-6 * expected);
}

}  // namespace
