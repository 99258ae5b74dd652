#pragma once

// A low-rank update of a weight in one pass over it, free of torch: ops/cpu/rank_update.h on the
// GPU.
//
//   out = round(W + L R)        W, out (rows, columns), L (rows, rank), R (rank, columns)
//
// The update is summed in acc_t by fused multiply-adds in the order of the ranks: where the CPU has
// those too, AVX2 or newer, the two devices write the same bits.

#include <cstdint>

#include "math/stochastic.h"
#include "ops/cuda/low_rank.h"

namespace gauge_ext::cuda {

template <typename scalar_t>
struct RankUpdate {
  using acc_t = typename AccOf<scalar_t>::type;

  const scalar_t* weight;
  int64_t weight_stride;  // from one row to the next
  scalar_t* out;          // may be the weight
  int64_t out_stride;
  int64_t rows, columns;
  const acc_t* left;
  const acc_t* right;
  int64_t rank;
  bool stochastic;  // by `rounding`; else to nearest, ties to even. bfloat16 and float16 only
  Rounding rounding;
  const int64_t* seed;  // in device memory, instead of rounding's; may be null
  bool fidelity;        // whether the squares are wanted
  // Receives 1 where every entry of out is finite, else 0; and the sums of D², K² and (D - K)²
  // with the update D and K = out - W. It must hold zeros but for the leading 1.
  double* result;
  double* partial;  // rank_update_size(...) numbers
};

template <typename scalar_t>
int64_t rank_update_size(int64_t rows, int64_t columns);

template <typename scalar_t>
void rank_update(const RankUpdate<scalar_t>& update, Stream stream);

}  // namespace gauge_ext::cuda
