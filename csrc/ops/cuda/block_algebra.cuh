#pragma once

// Algebra of r x r matrices in float64 by one block, row-major in global memory: what
// ops/cpu/small_matrix.h is for the CPU. Every function begins and ends with all threads in step.

#include "ops/cuda/block_sum.cuh"

namespace gauge_ext::cuda {
namespace {

// A pivot below this part of its diagonal entry is lost in the rounding of a Gram matrix.
constexpr double kPivotTolerance = 1e-14;

// body(i, j) for all entries with i <= j, each by one thread
template <typename F>
__device__ __forceinline__ void for_upper(int64_t r, const F& body) {
  for (int64_t at = threadIdx.x; at < r * r; at += kThreads) {
    if (at / r <= at % r) {
      body(at / r, at % r);
    }
  }
}

// The upper triangle of S becomes R with S = Rᵀ R. Pivots that are too small are raised; says
// whether there were none, NaN among them. `diagonal` has room for r numbers.
__device__ __forceinline__ bool cholesky(double* s, int64_t r, double* diagonal) {
  __syncthreads();
  for (int64_t i = threadIdx.x; i < r; i += kThreads) {
    diagonal[i] = s[i * r + i];
  }
  __syncthreads();
  bool full = true;
  for (int64_t j = 0; j < r; ++j) {
    const double least = kPivotTolerance * diagonal[j];
    double square = s[j * r + j];
    if (!(square > least)) {
      full = false;
      square = least > 0 ? least : 1.0;
    }
    const double pivot = sqrt(square);
    __syncthreads();  // all have read it
    for (int64_t k = j + threadIdx.x; k < r; k += kThreads) {
      s[j * r + k] = k == j ? pivot : s[j * r + k] / pivot;
    }
    __syncthreads();
    const int64_t left = r - j - 1;
    for (int64_t at = threadIdx.x; at < left * left; at += kThreads) {
      const int64_t i = j + 1 + at / left, k = j + 1 + at % left;
      if (i <= k) {
        s[i * r + k] -= s[j * r + i] * s[j * r + k];
      }
    }
    __syncthreads();
  }
  return full;
}

// E = R⁻¹ for an upper triangular R, a column by each thread
__device__ __forceinline__ void invert(const double* upper, int64_t r, double* e) {
  __syncthreads();
  for (int64_t c = threadIdx.x; c < r; c += kThreads) {
    for (int64_t i = r - 1; i >= 0; --i) {
      double sum = i == c ? 1.0 : 0.0;
      for (int64_t k = i + 1; k <= c; ++k) {
        sum -= upper[i * r + k] * e[k * r + c];
      }
      e[i * r + c] = i > c ? 0.0 : sum / upper[i * r + i];
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace gauge_ext::cuda
