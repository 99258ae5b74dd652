#include "ops/cpu/scale.h"

#include "ops/cpu/capability.h"

namespace gauge_ext {

#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)              \
  namespace CAPABILITY {                                  \
  extern const ScaleKernels<float> scale_float;           \
  extern const ScaleKernels<double> scale_double;         \
  extern const ScaleKernels<BFloat16Bits> scale_bfloat16; \
  }
GAUGE_EXT_EACH_CAPABILITY(GAUGE_EXT_DECLARE_TABLES)
#undef GAUGE_EXT_DECLARE_TABLES

template <>
const ScaleKernels<float>& scale_kernels<float>() {
  GAUGE_EXT_CHOOSE(scale_float)
}

template <>
const ScaleKernels<double>& scale_kernels<double>() {
  GAUGE_EXT_CHOOSE(scale_double)
}

template <>
const ScaleKernels<BFloat16Bits>& scale_kernels<BFloat16Bits>() {
  GAUGE_EXT_CHOOSE(scale_bfloat16)
}

}  // namespace gauge_ext
