#pragma once

// The table of low_rank.h, to be instantiated: float32 and float64 in one file, the half types in
// another, so that they compile side by side.

#include "ops/cuda/expand.cuh"
#include "ops/cuda/low_rank.h"
#include "ops/cuda/skinny.cuh"

namespace gauge_ext::cuda {

template <typename scalar_t>
const LowRankKernels<scalar_t>& low_rank_kernels() {
  using acc_t = typename AccOf<scalar_t>::type;
  static const LowRankKernels<scalar_t> table = {
      &project<scalar_t, acc_t>, &projected_size<scalar_t>,        &reduce<scalar_t, acc_t>,
      &reduced_size<scalar_t>,   &project_reduce<scalar_t, acc_t>, &project_reduced_size<scalar_t>,
      &expand<scalar_t, acc_t>};
  return table;
}

template <typename scalar_t>
void draw_mask(Matrix<scalar_t> y, DropoutSource dropout, Stream stream) {
  launch_mask(y, dropout, stream);
}

}  // namespace gauge_ext::cuda
