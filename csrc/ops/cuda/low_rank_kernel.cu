#include "ops/cuda/low_rank_table.cuh"

namespace gauge_ext::cuda {

template const LowRankKernels<float>& low_rank_kernels();
template const LowRankKernels<double>& low_rank_kernels();

template void draw_mask(Matrix<float>, DropoutSource, Stream);
template void draw_mask(Matrix<double>, DropoutSource, Stream);

}  // namespace gauge_ext::cuda
