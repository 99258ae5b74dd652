#pragma once

// The products of lora_gather on the GPU, free of torch: low_rank.h with an adapter for each row
// (SGMV; Punica, arXiv:2310.18547, section 4). The rows are put in the order of their adapters by
// `plan`, on the device; every kernel then works on the rows of one adapter in a block, found
// through that order, and on (N, r) products that lie in it.

#include <cstdint>

#include "ops/cuda/low_rank.h"

namespace gauge_ext::cuda {

// One adapter, its factors contiguous: A (rank, in), B (out, rank)
struct GatherAdapter {
  const void* A;
  const void* B;
  void* grad_A;
  void* grad_B;
  int64_t rank;
  double scaling;
};

// Entry e of the index stands for the rows [e · rows_each, (e + 1) · rows_each).
struct GatherRows {
  int64_t rows;
  int64_t rows_each;
  int64_t adapters;
  const int64_t* starts;  // (adapters + 2), in entries of `order`: no adapter first, then each
  const int64_t* order;   // the entries by adapter, otherwise as they came
};

enum class Side { kA, kB };

template <typename scalar_t>
struct GatherKernels {
  using acc_t = typename AccOf<scalar_t>::type;

  // H = s · X Aᵀ, or s · X B, row by row: (rows, max_rank) in the plan's order. What lies beyond a
  // row's own rank, and in rows without an adapter, is left as it was. `partial` holds
  // projected_size(...) numbers.
  void (*project)(Matrix<const scalar_t> x,
                  const GatherRows& plan,
                  const GatherAdapter* adapters,
                  Type type,
                  Side side,
                  int64_t max_rank,
                  acc_t* hidden,
                  acc_t* partial,
                  Stream stream);
  int64_t (*projected_size)(int64_t rows, int64_t columns, int64_t adapters, int64_t max_rank);

  // Y = bias + H A, or bias + H Bᵀ; bias alone, zeros where it is null, in rows without an adapter
  void (*expand)(Matrix<scalar_t> y,
                 const scalar_t* bias,
                 const acc_t* hidden,
                 const GatherRows& plan,
                 const GatherAdapter* adapters,
                 Type type,
                 Side side,
                 int64_t max_rank,
                 Stream stream);

  // grad_A = Hᵀ X, or grad_B = Xᵀ H, for each adapter over its own rows, zeros where it has none
  void (*reduce)(Matrix<const scalar_t> x,
                 const acc_t* hidden,
                 const GatherRows& plan,
                 const GatherAdapter* adapters,
                 Type type,
                 Side side,
                 int64_t max_rank,
                 Stream stream);
};

template <typename scalar_t>
const GatherKernels<scalar_t>& gather_kernels();

// Writes starts and order for an index of `entries` numbers in [-1, adapters); another number is
// met by a failing assertion, as by torch's own kernels: nothing here waits to tell.
void plan_gather(const int64_t* index,
                 int64_t entries,
                 int64_t adapters,
                 int64_t* starts,
                 int64_t* order,
                 Stream stream);

}  // namespace gauge_ext::cuda
