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

#include <cstdint>

#include "math/dropout.h"

namespace gauge_ext {

struct BFloat16Bits {  // bfloat16 as it lies in memory: the upper half of a float32
  uint16_t bits;
};

template <typename scalar_t>
struct AccOf {
  using type = scalar_t;
};
template <>
struct AccOf<BFloat16Bits> {
  using type = float;
};

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
};

// The kernels for the instruction set that torch runs with: at::get_cpu_capability(), which the
// environment variable ATEN_CPU_CAPABILITY (default, avx2, avx512) can lower.
template <typename scalar_t>
const LowRankKernels<scalar_t>& low_rank_kernels();

}  // namespace gauge_ext
