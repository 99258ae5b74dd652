#include "ops/cpu/row_norms.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ops/cpu/rank_tile.h"
#include "ops/cpu/rounding.h"
#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

// So many rows of squares are added up in acc_t before they go to the totals: float32 would lose
// the last of very many. A multiple of a tile's rows.
constexpr int64_t kRowsToTotal = 64 * kTileRows;

template <typename scalar_t, typename acc_t>
struct Sum {
  const scalar_t* weight;
  int64_t stride;
  const acc_t* left;
  int64_t rank;
};

// W + L R of ROWS rows and VECTORS vectors: the product is added to W's entries in registers.
template <int ROWS, int VECTORS, typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) void sum_tile(const Sum<scalar_t, acc_t>& s,
                                                    const Block<acc_t>& block,
                                                    const LeftRows<ROWS, acc_t>& left,
                                                    int64_t row,
                                                    int64_t column,
                                                    Vec<acc_t> (&sum)[ROWS][VECTORS]) {
  const scalar_t* weight = s.weight + row * s.stride + column;
  repeat<ROWS * VECTORS>([&](int n) GAUGE_EXT_INLINE {
    const int i = n / VECTORS, v = n % VECTORS;
    sum[i][v] = read(weight + i * s.stride + v * kWidth<acc_t>);
  });
  multiply(block, left, column, sum);
}

// The columns that do not fill a vector, padded with zeros, as R is in its block
template <int ROWS, typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) void sum_tail(const Sum<scalar_t, acc_t>& s,
                                                    const Block<acc_t>& block,
                                                    const LeftRows<ROWS, acc_t>& left,
                                                    int64_t row,
                                                    int64_t column,
                                                    Vec<acc_t> (&sum)[ROWS][1]) {
  const auto width = static_cast<size_t>(block.end - column);
  for (int i = 0; i < ROWS; ++i) {
    scalar_t from[kWidth<acc_t>] = {};
    std::memcpy(from, s.weight + (row + i) * s.stride + column, width * sizeof(scalar_t));
    sum[i][0] = read(from);
  }
  multiply(block, left, column, sum);
}

// body(column, tile) for the tiles of ROWS rows of a block, one after the other
template <int ROWS, typename scalar_t, typename acc_t, typename F>
inline __attribute__((always_inline)) void for_each_tile(const Sum<scalar_t, acc_t>& s,
                                                         const Block<acc_t>& block,
                                                         int64_t row,
                                                         const F& body) {
  const LeftRows<ROWS, acc_t> left(s.left + row * s.rank, s.rank);
  int64_t c = block.begin;
  for (; c + Block<acc_t>::kColumns <= block.end; c += Block<acc_t>::kColumns) {
    Vec<acc_t> sum[ROWS][kTileVectors];
    sum_tile(s, block, left, row, c, sum);
    body(c, sum);
  }
  for (; c < block.end; c += kWidth<acc_t>) {
    Vec<acc_t> sum[ROWS][1];
    if (c + kWidth<acc_t> <= block.end) {
      sum_tile(s, block, left, row, c, sum);
    } else {
      sum_tail(s, block, left, row, c, sum);
    }
    body(c, sum);
  }
}

template <int ROWS, typename scalar_t, typename acc_t>
void rows_of_block(const Sum<scalar_t, acc_t>& s,
                   const Block<acc_t>& block,
                   int64_t row,
                   double* sums) {
  Vec<acc_t> squares[ROWS] = {};
  for_each_tile<ROWS>(s, block, row, [&](int64_t, const auto& sum) GAUGE_EXT_INLINE {
    for (int i = 0; i < ROWS; ++i) {
      for (const Vec<acc_t>& value : sum[i]) {
        squares[i] += value * value;
      }
    }
  });
  for (int i = 0; i < ROWS; ++i) {
    sums[row + i] += static_cast<double>(horizontal_sum<acc_t>(squares[i]));
  }
}

// squares[c - begin] += those of ROWS rows; it has room for whole vectors.
template <int ROWS, typename scalar_t, typename acc_t>
void columns_of_block(const Sum<scalar_t, acc_t>& s,
                      const Block<acc_t>& block,
                      int64_t row,
                      acc_t* squares) {
  for_each_tile<ROWS>(s, block, row, [&](int64_t c, const auto& sum) GAUGE_EXT_INLINE {
    constexpr int kVectors = std::extent_v<std::remove_reference_t<decltype(sum)>, 1>;
    acc_t* to = squares + (c - block.begin);
    for (int v = 0; v < kVectors; ++v) {
      Vec<acc_t> total = load<acc_t>(to + v * kWidth<acc_t>);
      for (int i = 0; i < ROWS; ++i) {
        total += sum[i][v] * sum[i][v];
      }
      store<acc_t>(to + v * kWidth<acc_t>, total);
    }
  });
}

template <typename scalar_t, typename acc_t>
void rows(const scalar_t* weight,
          int64_t stride,
          int64_t rows,
          int64_t columns,
          const acc_t* left,
          const acc_t* right,
          int64_t rank,
          acc_t scale,
          double* sums) {
  const Sum<scalar_t, acc_t> s = {weight, stride, left, rank};
  const int64_t step = block_columns<acc_t>(rank);
  for (int64_t begin = 0; begin < columns; begin += step) {
    const Block<acc_t> block(right, columns, rank, begin, std::min(begin + step, columns), scale);
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) {
      rows_of_block<kTileRows>(s, block, row, sums);
    }
    for (; row < rows; ++row) {
      rows_of_block<1>(s, block, row, sums);
    }
  }
}

template <typename scalar_t, typename acc_t>
void columns(const scalar_t* weight,
             int64_t stride,
             int64_t rows,
             int64_t columns,
             const acc_t* left,
             const acc_t* right,
             int64_t right_stride,
             int64_t rank,
             acc_t scale,
             double* sums) {
  static thread_local Scratch<acc_t> scratch;
  const Sum<scalar_t, acc_t> s = {weight, stride, left, rank};
  const int64_t step = block_columns<acc_t>(rank);
  for (int64_t begin = 0; begin < columns; begin += step) {
    const Block<acc_t> block(right, right_stride, rank, begin, std::min(begin + step, columns),
                             scale);
    const int64_t width = block.end - begin, padded = width + kWidth<acc_t>;
    acc_t* squares = scratch.reserve(padded);
    for (int64_t row = 0; row < rows;) {
      std::fill_n(squares, padded, acc_t(0));
      const int64_t end = std::min(row + kRowsToTotal, rows);
      for (; row + kTileRows <= end; row += kTileRows) {
        columns_of_block<kTileRows>(s, block, row, squares);
      }
      for (; row < end; ++row) {
        columns_of_block<1>(s, block, row, squares);
      }
      for (int64_t c = 0; c < width; ++c) {
        sums[begin + c] += static_cast<double>(squares[c]);
      }
    }
  }
}

template <typename scalar_t>
constexpr RowNormKernels<scalar_t> table() {
  using acc_t = typename AccOf<scalar_t>::type;
  return {&rows<scalar_t, acc_t>, &columns<scalar_t, acc_t>};
}

}  // namespace

namespace CPU_CAPABILITY {

extern const RowNormKernels<float> row_norms_float;
extern const RowNormKernels<double> row_norms_double;
extern const RowNormKernels<BFloat16Bits> row_norms_bfloat16;
extern const RowNormKernels<Float16Bits> row_norms_half;

const RowNormKernels<float> row_norms_float = table<float>();
const RowNormKernels<double> row_norms_double = table<double>();
const RowNormKernels<BFloat16Bits> row_norms_bfloat16 = table<BFloat16Bits>();
const RowNormKernels<Float16Bits> row_norms_half = table<Float16Bits>();

}  // namespace CPU_CAPABILITY
}  // namespace gauge_ext
