#pragma once

// The squared norms of the rows of W + scale · L R in one pass over W, free of torch, for weights
// that lie (out, in) and for those that lie transposed, whose outputs are columns. Entries are
// summed in acc_t, a few thousand squares of each output too; the totals are float64.

#include <cstdint>

#include "math/storage.h"

namespace gauge_ext {

template <typename scalar_t>
struct RowNormKernels {
  using acc_t = typename AccOf<scalar_t>::type;

  // sums[i] += the squares of row i; W is (rows, columns), its rows lie `stride` apart, L is
  // (rows, rank), R is (rank, columns)
  void (*rows)(const scalar_t* weight,
               int64_t stride,
               int64_t rows,
               int64_t columns,
               const acc_t* left,
               const acc_t* right,
               int64_t rank,
               acc_t scale,
               double* sums);

  // sums[c] += the squares of column c, of which R's rows too lie `right_stride` apart
  void (*columns)(const scalar_t* weight,
                  int64_t stride,
                  int64_t rows,
                  int64_t columns,
                  const acc_t* left,
                  const acc_t* right,
                  int64_t right_stride,
                  int64_t rank,
                  acc_t scale,
                  double* sums);
};

// The kernels for the instruction set that torch runs with, see low_rank.h
template <typename scalar_t>
const RowNormKernels<scalar_t>& row_norm_kernels();

}  // namespace gauge_ext
