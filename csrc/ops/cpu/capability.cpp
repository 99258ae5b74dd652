#include "ops/cpu/capability.h"

#include <string>

#include <ATen/Version.h>

namespace gauge_ext {

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

}  // namespace gauge_ext
