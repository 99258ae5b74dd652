#pragma once

// The skinny products of a low-rank adapter on the GPU, free of torch: what ops/cpu/low_rank.h is
// for the CPU. X and Y are row-major, (rows, columns); R is (rank, columns) with any strides, L is
// (rows, rank) in acc_t; M is the dropout multiplier.
//
//   project   H = scale · (X ∘ M) Rᵀ               (rows, rank)
//   reduce    S = scale · Lᵀ (X ∘ M)               (rank, columns), or transposed
//   both      H and S, without dropout, in one pass over X
//   expand    Y = bias + scale · (L R) ∘ M, or Y +=
//
// Sums are taken in an order that depends on the sizes alone, so that results repeat bit for bit:
// blocks write partial sums, and a second kernel adds those up.

#include <cstdint>

#include "math/dropout.h"
#include "math/storage.h"

// As <driver_types.h> declares it: this header serves compilers without CUDA's headers too.
struct CUstream_st;

namespace gauge_ext::cuda {

using Stream = CUstream_st*;

// Dropout whose seed the device reads, where it lies there: a captured graph then draws a new mask
// whenever the seed's memory is written, and nothing waits for the device.
struct DropoutSource {
  Dropout dropout;
  const int64_t* seed = nullptr;  // in device memory; null: dropout.seed holds it
};

template <typename scalar_t>
struct Matrix {
  scalar_t* data;
  int64_t rows;
  int64_t columns;
};

// A factor, or its gradient, in its own type and by its strides. The type is known at run time
// only: factors are small, and kernels for every pair of types would be many.
enum class Type { kFloat, kDouble, kBFloat16, kFloat16 };

template <typename void_t>
struct Factor {
  void_t* data;
  Type type;
  int64_t row_stride;
  int64_t column_stride;
};

template <typename scalar_t>
struct LowRankKernels {
  using acc_t = typename AccOf<scalar_t>::type;

  // H, by way of `partial`, which holds projected_size(rows, columns, rank) numbers
  void (*project)(Matrix<const scalar_t> x,
                  Factor<const void> right,
                  int64_t rank,
                  DropoutSource dropout,
                  acc_t scale,
                  acc_t* hidden,
                  acc_t* partial,
                  Stream stream);
  int64_t (*projected_size)(int64_t rows, int64_t columns, int64_t rank);

  // S (rank, columns) by the strides of `sum`; `partial` holds reduced_size(...) numbers
  void (*reduce)(Matrix<const scalar_t> x,
                 const acc_t* left,
                 int64_t rank,
                 DropoutSource dropout,
                 acc_t scale,
                 Factor<void> sum,
                 acc_t* partial,
                 Stream stream);
  int64_t (*reduced_size)(int64_t rows, int64_t columns, int64_t rank);

  // H and S; `partial` holds project_reduced_size(...) numbers
  void (*project_reduce)(Matrix<const scalar_t> x,
                         Factor<const void> right,
                         const acc_t* left,
                         int64_t rank,
                         acc_t scale,
                         acc_t* hidden,
                         Factor<void> sum,
                         acc_t* partial,
                         Stream stream);
  int64_t (*project_reduced_size)(int64_t rows, int64_t columns, int64_t rank);

  // Y; bias may be null: zeros
  void (*expand)(Matrix<scalar_t> y,
                 bool add,
                 const scalar_t* bias,
                 const acc_t* left,
                 Factor<const void> right,
                 int64_t rank,
                 DropoutSource dropout,
                 acc_t scale,
                 Stream stream);
};

// Defined by low_rank_kernel.cu and low_rank_half_kernel.cu for float32, float64, bfloat16,
// float16.
template <typename scalar_t>
const LowRankKernels<scalar_t>& low_rank_kernels();

// The multipliers M themselves, into y
template <typename scalar_t>
void draw_mask(Matrix<scalar_t> y, DropoutSource dropout, Stream stream);

}  // namespace gauge_ext::cuda
