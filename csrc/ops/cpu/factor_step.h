#pragma once

// The steps of the gauge-invariant optimizers for one layer, free of torch. B here is the effective
// factor, scaling times lora_B, and the gradient by it is lora_B's over the scaling. With
//
//   A Aᵀ = R_Aᵀ R_A,   M = BᵀB + δ (A Aᵀ)⁻¹ = R_Mᵀ R_M,   E_A = R_A⁻¹,   E_M = R_M⁻¹
//
// the rows of B move along (g_B E_A) E_Aᵀ and the columns of A along E_M (E_Mᵀ g_A). A is the
// anchor then: it has full rank and B may start at zero. With B as the anchor the damping is on A's
// side, R_Aᵀ R_A = A Aᵀ + δ (BᵀB)⁻¹ and R_Mᵀ R_M = BᵀB. Products in acc_t go through one triangular
// factor after the other and never through an inverse Gram matrix, which would square the condition
// of the gauge.

#include <cstdint>

#include "math/factor_step.h"
#include "ops/cpu/low_rank.h"

namespace gauge_ext {

template <typename scalar_t>
struct FactorLayer {
  using acc_t = typename AccOf<scalar_t>::type;

  scalar_t* lora_A;  // (rank, columns)
  scalar_t* lora_B;  // (rows, rank)
  const scalar_t* grad_A;
  const scalar_t* grad_B;
  acc_t* avg_A;  // averages of gradients, of the factors' shapes; null without momentum
  acc_t* avg_B;
  acc_t* sq_A;  // (columns); null but for Adam
  acc_t* sq_B;  // (rows)
  int64_t rows;
  int64_t columns;
  int64_t rank;
  double scaling;
  bool anchor_B;  // A may start at zero, and not B
};

// What FactorStepKernels::whiten writes
struct FactorMetric {
  const double* e_a;
  const double* e_m;
  double root_damping;
};

template <typename scalar_t>
struct FactorStepKernels {
  // Writes E_A and E_M, (rank, rank) upper triangular, and √δ; false where the anchor has a rank
  // below r, or a factor holds NaN.
  bool (*whiten)(const FactorLayer<scalar_t>& layer,
                 double damping,
                 double* e_a,
                 double* e_m,
                 double* root_damping);

  // ‖g_B E_A‖² + ‖E_Mᵀ g_A‖²
  double (*gradient_norm)(const FactorLayer<scalar_t>& layer, const double* e_a, const double* e_m);

  void (*scaled_gd)(const FactorLayer<scalar_t>& layer,
                    const double* e_a,
                    const double* e_m,
                    const FactorStep& step);

  void (*gauge_adam)(const FactorLayer<scalar_t>& layer,
                     const double* e_a,
                     const double* e_m,
                     const FactorStep& step);
};

// The kernels for the instruction set that torch runs with.
template <typename scalar_t>
const FactorStepKernels<scalar_t>& factor_step_kernels();

}  // namespace gauge_ext
