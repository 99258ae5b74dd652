#pragma once

// LoRA-RITE's step for one layer, free of torch; gauge_ext/ops/lora_rite.py has the formula. With
// E_A and E_M of factor_step.h the frames are F_A = E_Aᵀ A and F_B = (B E_M)ᵀ, B effective. Those
// of the last step are kept, and so are the moments, as panels of one vector of the factor in a
// column. A step has two passes over the layers: the first finds all that can be refused, the
// second writes.

#include <cstdint>

#include "ops/cpu/factor_step.h"

namespace gauge_ext {

template <typename scalar_t>
struct RiteLayer {
  using acc_t = typename AccOf<scalar_t>::type;

  FactorLayer<scalar_t> factors;  // avg_A is (rank, columns) and avg_B (rank, rows)
  acc_t* frame_A;                 // (rank, columns)
  acc_t* frame_B;                 // (rank, rows)
  double* moment_A;               // (rank, rank)
  double* moment_B;
  double* rest;  // the damping's share of the frame that is not the anchor's
};

// What the first pass finds and the second uses; as many numbers for each as rite_square() tells.
struct RiteTurns {
  double* frame_A;  // how the frame of A has turned since the last step, transposed
  double* frame_B;
  double* rest;
};

inline int64_t rite_square(int64_t rank) {
  return rank * ((rank + 15) / 16 * 16);  // rows of whole vectors of any instruction set
}

// The second moments v of one factor's gradients, (rank, rank), and (v̂^½ + ε)⁻¹
struct RiteMoment {
  const double* value;
  const double* root;
};

template <typename scalar_t>
struct RiteKernels {
  // Writes the turns and the new second moments, (rank, rank) each; false where a gradient holds
  // NaN or infinity.
  bool (*measure)(const RiteLayer<scalar_t>& layer,
                  const FactorMetric& metric,
                  const FactorStep& step,
                  const RiteTurns& turns,
                  double* moment_A,
                  double* moment_B);

  // Writes (v̂^½ + ε)⁻¹ for v, (rank, rank) both; false where its eigenvalues do not converge.
  bool (*inverse_roots)(const double* moment, int64_t rank, const FactorStep& step, double* root);

  // Moves the factors and writes the state.
  void (*descend)(const RiteLayer<scalar_t>& layer,
                  const FactorMetric& metric,
                  const FactorStep& step,
                  const RiteTurns& turns,
                  const RiteMoment& moment_A,
                  const RiteMoment& moment_B);
};

// The kernels for the instruction set that torch runs with.
template <typename scalar_t>
const RiteKernels<scalar_t>& rite_kernels();

}  // namespace gauge_ext
