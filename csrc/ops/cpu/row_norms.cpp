#include "ops/cpu/row_norms.h"

#include "ops/cpu/capability.h"

namespace gauge_ext {

#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)                    \
  namespace CAPABILITY {                                        \
  extern const RowNormKernels<float> row_norms_float;           \
  extern const RowNormKernels<double> row_norms_double;         \
  extern const RowNormKernels<BFloat16Bits> row_norms_bfloat16; \
  extern const RowNormKernels<Float16Bits> row_norms_half;      \
  }
GAUGE_EXT_EACH_CAPABILITY(GAUGE_EXT_DECLARE_TABLES)
#undef GAUGE_EXT_DECLARE_TABLES

template <>
const RowNormKernels<float>& row_norm_kernels<float>() {
  GAUGE_EXT_CHOOSE(row_norms_float)
}

template <>
const RowNormKernels<double>& row_norm_kernels<double>() {
  GAUGE_EXT_CHOOSE(row_norms_double)
}

template <>
const RowNormKernels<BFloat16Bits>& row_norm_kernels<BFloat16Bits>() {
  GAUGE_EXT_CHOOSE(row_norms_bfloat16)
}

template <>
const RowNormKernels<Float16Bits>& row_norm_kernels<Float16Bits>() {
  GAUGE_EXT_CHOOSE(row_norms_half)
}

}  // namespace gauge_ext
