#pragma once

// The steps of the gauge-invariant optimizers on the GPU, free of torch: ops/cpu/factor_step.h, all
// layers in each launch. Gram matrices, their factors and inverses are in float64, the passes over
// the factors in acc_t. Sums are taken in an order that depends on sizes alone.
//
// Where a pair is refused, its anchor having a rank below r or a factor holding NaN, no kernel
// writes to any of the factors, and `refused` and `report` say which pair it was.

#include <cstdint>

#include "math/factor_step.h"
#include "ops/cuda/low_rank.h"

namespace gauge_ext::cuda {

// One layer; see FactorLayer of the CPU
struct FactorPair {
  void* lora_A;
  void* lora_B;
  const void* grad_A;
  const void* grad_B;
  void* avg_A;
  void* avg_B;
  void* sq_A;
  void* sq_B;
  int64_t rows;
  int64_t columns;
  int64_t rank;
  int64_t anchor_B;
  double scaling;
  double correction1;  // of Adam, as it counts each pair's steps
  double correction2;
};

// The largest rank that the passes over the factors have shared memory for
constexpr int64_t kLargestFactorRank = 2048;

struct FactorSizes {
  int64_t pairs;
  int64_t max_rank;
  int64_t max_length;  // of rows and columns
};

// What the kernels of a call work in, of sizes that factor_work_sizes tells
struct FactorWork {
  double* grams;
  double* inverses;
  double* deltas;
  void* factors;  // in acc_t of the pass
  double* norms;
  int* refused;  // zero at first; later the refused pair and 1
  int* report;   // the same, in memory that the host reads; may be null
};
struct FactorWorkSizes {
  int64_t grams, inverses, deltas, factors, norms;  // in numbers
};
FactorWorkSizes factor_work_sizes(const FactorSizes& n);

template <typename scalar_t>
struct FactorStepKernels {
  // The inverse factors of the metric; `wide` where the pass that follows is in float64.
  void (*whiten)(const FactorPair* pairs,
                 const FactorSizes& n,
                 double damping,
                 bool wide,
                 const FactorWork& work,
                 Stream stream);
  void (*step)(const FactorPair* pairs,
               const FactorSizes& n,
               StepRule rule,
               const FactorStep& step,
               const FactorWork& work,
               Stream stream);
  // The sum over all pairs, NaN where one is refused
  void (*gradient_norm)(const FactorPair* pairs,
                        const FactorSizes& n,
                        const FactorWork& work,
                        double* norm,
                        Stream stream);
};

template <typename scalar_t>
const FactorStepKernels<scalar_t>& factor_step_kernels();

}  // namespace gauge_ext::cuda
