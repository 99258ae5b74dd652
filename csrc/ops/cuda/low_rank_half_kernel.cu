#include "ops/cuda/low_rank_table.cuh"

namespace gauge_ext::cuda {

template const LowRankKernels<BFloat16Bits>& low_rank_kernels();
template const LowRankKernels<Float16Bits>& low_rank_kernels();

template void draw_mask(Matrix<BFloat16Bits>, DropoutSource, Stream);
template void draw_mask(Matrix<Float16Bits>, DropoutSource, Stream);

}  // namespace gauge_ext::cuda
