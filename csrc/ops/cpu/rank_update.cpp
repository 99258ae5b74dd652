#include "ops/cpu/rank_update.h"

#include "ops/cpu/capability.h"

namespace gauge_ext {

// One table per capability, defined by rank_update_kernel.cpp, which is compiled once for each.
#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)                         \
  namespace CAPABILITY {                                             \
  extern const RankUpdateKernels<float> rank_update_float;           \
  extern const RankUpdateKernels<double> rank_update_double;         \
  extern const RankUpdateKernels<BFloat16Bits> rank_update_bfloat16; \
  extern const RankUpdateKernels<Float16Bits> rank_update_half;      \
  }
GAUGE_EXT_EACH_CAPABILITY(GAUGE_EXT_DECLARE_TABLES)
#undef GAUGE_EXT_DECLARE_TABLES

template <>
const RankUpdateKernels<float>& rank_update_kernels<float>() {
  GAUGE_EXT_CHOOSE(rank_update_float)
}

template <>
const RankUpdateKernels<double>& rank_update_kernels<double>() {
  GAUGE_EXT_CHOOSE(rank_update_double)
}

template <>
const RankUpdateKernels<BFloat16Bits>& rank_update_kernels<BFloat16Bits>() {
  GAUGE_EXT_CHOOSE(rank_update_bfloat16)
}

template <>
const RankUpdateKernels<Float16Bits>& rank_update_kernels<Float16Bits>() {
  GAUGE_EXT_CHOOSE(rank_update_half)
}

}  // namespace gauge_ext
