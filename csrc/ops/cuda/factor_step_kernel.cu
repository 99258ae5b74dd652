#include "ops/cuda/factor_step.cuh"

namespace gauge_ext::cuda {

template const FactorStepKernels<float>& factor_step_kernels();
template const FactorStepKernels<double>& factor_step_kernels();
template const FactorStepKernels<BFloat16Bits>& factor_step_kernels();
template const FactorStepKernels<Float16Bits>& factor_step_kernels();

FactorWorkSizes factor_work_sizes(const FactorSizes& n) {
  return work_sizes(n);
}

}  // namespace gauge_ext::cuda
