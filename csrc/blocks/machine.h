#pragma once

#include "ops/cpu/capability.h"

namespace gauge_ext::machine {

// What this machine's processor can, as far as kernels were compiled for it, without torch. The
// environment variable ATEN_CPU_CAPABILITY (default, avx2, avx512) can lower it, as it does
// torch's.
Capability capability();

}  // namespace gauge_ext::machine
