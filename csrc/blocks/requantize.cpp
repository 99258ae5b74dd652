#include "blocks/requantize.h"

#include "blocks/machine.h"

namespace gauge_ext {

#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)          \
  namespace CAPABILITY {                              \
  extern const RequantizeKernels requantize_kernels_; \
  }
GAUGE_EXT_EACH_CAPABILITY(GAUGE_EXT_DECLARE_TABLES)
#undef GAUGE_EXT_DECLARE_TABLES

const RequantizeKernels& requantize_kernels() {
  GAUGE_EXT_CHOOSE_FOR(machine::capability(), requantize_kernels_)
}

}  // namespace gauge_ext
