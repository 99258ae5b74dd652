#pragma once

// A low-rank update of a weight in one pass over it, free of torch:
//
//   out = round(W + L R)        W, out (rows, columns), L (rows, rank), R (rank, columns)
//
// The update is summed from zero in acc_t, added once and rounded once. `out` may be W itself. The
// rows of W and of out may lie apart, `stride` entries from one to the next.

#include <cstdint>

#include "math/stochastic.h"
#include "math/storage.h"
#include "ops/cpu/low_rank.h"

namespace gauge_ext {

// What an update did, summed over the entries. D is the update, K = out - W what was kept of it.
struct UpdateSums {
  double delta = 0;    // sum of D²
  double kept = 0;     // sum of K²
  double lost = 0;     // sum of (D - K)²
  bool finite = true;  // every entry of out
};

template <typename scalar_t>
struct RankUpdateKernels {
  using acc_t = typename AccOf<scalar_t>::type;

  // Rows [first, first + rows) of the weight. Rounds to nearest, ties to even, where `rounding` is
  // null; else up or down by chance, with the exact sum as expectation (bfloat16 and float16 only).
  // `sums` is added to; its three squares only where `fidelity`.
  void (*update)(const scalar_t* weight,
                 int64_t weight_stride,
                 scalar_t* out,
                 int64_t out_stride,
                 int64_t first,
                 int64_t rows,
                 int64_t columns,
                 const acc_t* left,
                 const acc_t* right,
                 int64_t rank,
                 const Rounding* rounding,
                 bool fidelity,
                 UpdateSums& sums);
};

// The kernels for the instruction set that torch runs with.
template <typename scalar_t>
const RankUpdateKernels<scalar_t>& rank_update_kernels();

}  // namespace gauge_ext
