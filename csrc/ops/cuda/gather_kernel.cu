#include "ops/cuda/gather.cuh"

namespace gauge_ext::cuda {

template const GatherKernels<float>& gather_kernels();
template const GatherKernels<double>& gather_kernels();

void plan_gather(const int64_t* index,
                 int64_t entries,
                 int64_t adapters,
                 int64_t* starts,
                 int64_t* order,
                 Stream stream) {
  launch_plan(index, entries, adapters, starts, order, stream);
}

}  // namespace gauge_ext::cuda
