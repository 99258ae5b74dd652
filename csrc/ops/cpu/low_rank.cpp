#include "ops/cpu/low_rank.h"

#include <string>

#include <ATen/Version.h>

namespace gauge_ext {

// One table per capability, defined by low_rank_kernel.cpp, which is compiled once for each.
#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)                   \
  namespace CAPABILITY {                                       \
  extern const LowRankKernels<float> low_rank_float;           \
  extern const LowRankKernels<double> low_rank_double;         \
  extern const LowRankKernels<BFloat16Bits> low_rank_bfloat16; \
  }
GAUGE_EXT_DECLARE_TABLES(DEFAULT)
#ifdef GAUGE_EXT_HAS_AVX2
GAUGE_EXT_DECLARE_TABLES(AVX2)
#endif
#ifdef GAUGE_EXT_HAS_AVX512
GAUGE_EXT_DECLARE_TABLES(AVX512)
#endif
#undef GAUGE_EXT_DECLARE_TABLES

namespace {

enum class Capability { kDefault, kAvx2, kAvx512 };

Capability capability() {
  static const Capability chosen = [] {
    const std::string name = at::get_cpu_capability();
#ifdef GAUGE_EXT_HAS_AVX512
    if (name == "AVX512") {
      return Capability::kAvx512;
    }
#endif
#ifdef GAUGE_EXT_HAS_AVX2
    if (name == "AVX2" || name == "AVX512") {
      return Capability::kAvx2;
    }
#endif
    return Capability::kDefault;
  }();
  return chosen;
}

}  // namespace

#ifdef GAUGE_EXT_HAS_AVX512
#define GAUGE_EXT_CASE_AVX512(TABLE) \
  case Capability::kAvx512:          \
    return AVX512::TABLE;
#else
#define GAUGE_EXT_CASE_AVX512(TABLE)
#endif
#ifdef GAUGE_EXT_HAS_AVX2
#define GAUGE_EXT_CASE_AVX2(TABLE) \
  case Capability::kAvx2:          \
    return AVX2::TABLE;
#else
#define GAUGE_EXT_CASE_AVX2(TABLE)
#endif

#define GAUGE_EXT_CHOOSE(SCALAR, TABLE)                      \
  template <>                                                \
  const LowRankKernels<SCALAR>& low_rank_kernels<SCALAR>() { \
    switch (capability()) {                                  \
      GAUGE_EXT_CASE_AVX512(TABLE)                           \
      GAUGE_EXT_CASE_AVX2(TABLE)                             \
      default:                                               \
        return DEFAULT::TABLE;                               \
    }                                                        \
  }
GAUGE_EXT_CHOOSE(float, low_rank_float)
GAUGE_EXT_CHOOSE(double, low_rank_double)
GAUGE_EXT_CHOOSE(BFloat16Bits, low_rank_bfloat16)

}  // namespace gauge_ext
