#include "ops/cuda/gather.cuh"

namespace gauge_ext::cuda {

template const GatherKernels<BFloat16Bits>& gather_kernels();
template const GatherKernels<Float16Bits>& gather_kernels();

}  // namespace gauge_ext::cuda
