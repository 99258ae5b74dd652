#pragma once

// The skinny products of a low-rank adapter, over row-major panels, free of torch. X is a panel of
// `rows` rows of the (N, columns) matrix that starts at row `first_row` of it; the rank is small.
//
//   project   H   = (X ∘ M) Rᵀ                         (rows, rank)
//   expand    Y   = bias + scale · L R ∘ M, or Y +=     (rows, columns)
//   reduce    S  += Lᵀ (X ∘ M)                          (rank, columns)
//
// R is (rank, columns), L is (rows, rank), M is the dropout multiplier. They are computed in acc_t
// whatever the storage type is. Each pass over a large matrix does all that can be done with it
// while it is in cache; that is why reduce comes fused with the other two.
//
// Besides, what the dense product beside them needs now and then: W + scale · L R, and a product
// for few rows.

#include <cstdint>

#include "math/dropout.h"
#include "math/storage.h"

namespace gauge_ext {

template <typename scalar_t>
struct LowRankKernels {
  using acc_t = typename AccOf<scalar_t>::type;

  // H = (X ∘ M) Rᵀ
  void (*project)(const scalar_t* x,
                  int64_t first_row,
                  int64_t rows,
                  int64_t columns,
                  const acc_t* right,
                  int64_t rank,
                  const Dropout& dropout,
                  acc_t* hidden);

  // Y = bias + scale · L R, or, where `add`, Y += scale · L R; bias may be null: zeros
  void (*expand)(scalar_t* y,
                 bool add,
                 const acc_t* bias,
                 int64_t rows,
                 int64_t columns,
                 const acc_t* left,
                 const acc_t* right,
                 int64_t rank,
                 acc_t scale);

  // H = X Rᵀ and S += Lᵀ X, in one pass over X
  void (*project_reduce)(const scalar_t* x,
                         int64_t rows,
                         int64_t columns,
                         const acc_t* right,
                         const acc_t* left,
                         int64_t rank,
                         acc_t* hidden,
                         acc_t* sum);

  // Y = L R ∘ M, or, where `add`, Y += L R ∘ M, and S += Lᵀ (X ∘ M), the mask drawn once; y may be
  // null: S alone
  void (*expand_reduce)(const scalar_t* x,
                        scalar_t* y,
                        bool add,
                        int64_t first_row,
                        int64_t rows,
                        int64_t columns,
                        const acc_t* left,
                        const acc_t* right,
                        int64_t rank,
                        const Dropout& dropout,
                        acc_t* sum);

  // The multipliers M themselves, (rows, columns)
  void (*mask)(const Dropout& dropout,
               int64_t first_row,
               int64_t rows,
               int64_t columns,
               acc_t* multiplier);

  // W' = W + scale · L R, all of it in acc_t; W's rows lie `stride` apart
  void (*merge)(const scalar_t* weight,
                int64_t stride,
                int64_t rows,
                int64_t columns,
                const acc_t* left,
                const acc_t* right,
                int64_t rank,
                acc_t scale,
                acc_t* merged);

  // Y += X Wᵀ for few rows of X; W is (count, columns), its rows lie `stride` apart, Y's y_stride
  void (*skinny)(const acc_t* x,
                 int64_t rows,
                 int64_t columns,
                 const scalar_t* weight,
                 int64_t stride,
                 int64_t count,
                 acc_t* y,
                 int64_t y_stride);

  // T = scale · Xᵀ, (columns, rows), for X (rows, columns)
  void (*transpose)(const scalar_t* x, int64_t rows, int64_t columns, acc_t scale, acc_t* to);

  // Between the storage type and acc_t
  void (*widen)(const scalar_t* from, int64_t count, acc_t* to);
  void (*narrow)(const acc_t* from, int64_t count, scalar_t* to);
};

// The kernels for the instruction set that torch runs with: at::get_cpu_capability(), which the
// environment variable ATEN_CPU_CAPABILITY (default, avx2, avx512) can lower.
template <typename scalar_t>
const LowRankKernels<scalar_t>& low_rank_kernels();

}  // namespace gauge_ext
