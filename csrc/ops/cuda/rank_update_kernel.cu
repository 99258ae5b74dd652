#include "ops/cuda/rank_update.cuh"

namespace gauge_ext::cuda {

#define GAUGE_EXT_RANK_UPDATE(scalar_t)                          \
  template int64_t rank_update_size<scalar_t>(int64_t, int64_t); \
  template void rank_update(const RankUpdate<scalar_t>&, Stream);
GAUGE_EXT_RANK_UPDATE(float)
GAUGE_EXT_RANK_UPDATE(double)
GAUGE_EXT_RANK_UPDATE(BFloat16Bits)
GAUGE_EXT_RANK_UPDATE(Float16Bits)
#undef GAUGE_EXT_RANK_UPDATE

}  // namespace gauge_ext::cuda
