#include "ops/cpu/low_rank.h"

#include "ops/cpu/capability.h"

namespace gauge_ext {

// One table per capability, defined by low_rank_kernel.cpp, which is compiled once for each.
#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)                   \
  namespace CAPABILITY {                                       \
  extern const LowRankKernels<float> low_rank_float;           \
  extern const LowRankKernels<double> low_rank_double;         \
  extern const LowRankKernels<BFloat16Bits> low_rank_bfloat16; \
  }
GAUGE_EXT_EACH_CAPABILITY(GAUGE_EXT_DECLARE_TABLES)
#undef GAUGE_EXT_DECLARE_TABLES

template <>
const LowRankKernels<float>& low_rank_kernels<float>() {
  GAUGE_EXT_CHOOSE(low_rank_float)
}

template <>
const LowRankKernels<double>& low_rank_kernels<double>() {
  GAUGE_EXT_CHOOSE(low_rank_double)
}

template <>
const LowRankKernels<BFloat16Bits>& low_rank_kernels<BFloat16Bits>() {
  GAUGE_EXT_CHOOSE(low_rank_bfloat16)
}

}  // namespace gauge_ext
