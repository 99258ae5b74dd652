#include "blocks/machine.h"

#include <cstdlib>
#include <string_view>

namespace gauge_ext::machine {

Capability capability() {
  static const Capability chosen = [] {
    const char* said = std::getenv("ATEN_CPU_CAPABILITY");
    [[maybe_unused]] const std::string_view most = said == nullptr ? "" : said;
    if (most == "default") {
      return Capability::kDefault;
    }
#ifdef GAUGE_EXT_HAS_AVX512
    if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return Capability::kAvx512;
    }
#endif
#ifdef GAUGE_EXT_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return Capability::kAvx2;
    }
#endif
    return Capability::kDefault;
  }();
  return chosen;
}

}  // namespace gauge_ext::machine
