// Columns of a matrix as rows, and their sums back, against plain loops.

#include "ops/cpu/columns.h"

#include <vector>

#include "check_main.h"

namespace {

using gauge_ext::BFloat16Bits;
using gauge_ext::Strided;

const std::vector<int64_t> kColumns = {4, 0, 4, 6, 1, 4};
constexpr int64_t kRows = 3, kWidth = 7;

TEST_CASE("columns gathered as rows, of any strides and dtype") {
  std::vector<float> matrix(kRows * kWidth);
  std::vector<BFloat16Bits> half(kRows * kWidth);
  for (int64_t i = 0; i < kRows * kWidth; ++i) {
    matrix[i] = static_cast<float>(i);  // exact in bfloat16
    half[i] = gauge_ext::narrow<BFloat16Bits>(matrix[i]);
  }
  const int64_t count = static_cast<int64_t>(kColumns.size());
  std::vector<double> plain(count * kRows, -1);
  std::vector<float> narrow(count * kRows, -1), transposed(count * kRows, -1);
  gauge_ext::gather_columns(Strided<const float>{matrix.data(), kRows, kWidth, 1}, kColumns.data(),
                            count, plain.data());
  gauge_ext::gather_columns(Strided<const BFloat16Bits>{half.data(), kRows, kWidth, 1},
                            kColumns.data(), count, narrow.data());
  gauge_ext::gather_columns(Strided<const float>{matrix.data(), kRows, 1, kRows}, kColumns.data(),
                            count, transposed.data());
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t j = 0; j < kRows; ++j) {
      CHECK(plain[n * kRows + j] == double(j * kWidth + kColumns[n]));
      CHECK(narrow[n * kRows + j] == float(j * kWidth + kColumns[n]));
      CHECK(transposed[n * kRows + j] == float(kColumns[n] * kRows + j));
    }
  }
}

TEST_CASE("rows scattered into columns: those of one column summed, those of another left out") {
  const int64_t count = static_cast<int64_t>(kColumns.size()), without = 6;
  std::vector<double> hidden(count * kRows), expected(kRows * kWidth, 0.5), matrix = expected;
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t j = 0; j < kRows; ++j) {
      hidden[n * kRows + j] = double(10 * n + j);
      if (kColumns[n] != without) {
        expected[j * kWidth + kColumns[n]] += 2.0 * hidden[n * kRows + j];
      }
    }
  }
  const Strided<double> to{matrix.data(), kRows, kWidth, 1};
  gauge_ext::scatter_columns(hidden.data(), kColumns.data(), count, 2.0, without, 0, 1, to);
  for (int64_t k = kWidth; k < kRows * kWidth; ++k) {
    CHECK(matrix[k] == 0.5);  // rows of others
  }
  gauge_ext::scatter_columns(hidden.data(), kColumns.data(), count, 2.0, without, 1, kRows, to);
  CHECK(matrix == expected);
}

}  // namespace
