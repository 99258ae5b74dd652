#pragma once

#include "ops/cuda/stage.cuh"

namespace gauge_ext::cuda {
namespace {

// Adds up `values` of all threads, in an order that depends on nothing; all have it then.
template <int COUNT>
__device__ __forceinline__ void sum_of_block(double (&values)[COUNT]) {
  __shared__ double parts[COUNT][kThreads];
  for (int i = 0; i < COUNT; ++i) {
    parts[i][threadIdx.x] = values[i];
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      for (int i = 0; i < COUNT; ++i) {
        parts[i][threadIdx.x] += parts[i][threadIdx.x + half];
      }
    }
  }
  __syncthreads();
  for (int i = 0; i < COUNT; ++i) {
    values[i] = parts[i][0];
  }
}

}  // namespace
}  // namespace gauge_ext::cuda
