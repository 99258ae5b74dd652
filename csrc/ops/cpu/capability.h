#pragma once

// The choice among the tables of kernels, one of which is compiled for each instruction set.

namespace gauge_ext {

enum class Capability { kDefault, kAvx2, kAvx512 };

// What torch runs with, at::get_cpu_capability(), as far as kernels were compiled for it. The
// environment variable ATEN_CPU_CAPABILITY (default, avx2, avx512) can lower it.
Capability capability();

}  // namespace gauge_ext

// GAUGE_EXT_EACH_CAPABILITY(DO) is DO(NAMESPACE) for every instruction set that was compiled;
// GAUGE_EXT_CHOOSE(TABLE) returns TABLE out of the namespace of the one that runs, and
// GAUGE_EXT_CHOOSE_FOR(CAPABILITY, TABLE) out of that of another.
#ifdef GAUGE_EXT_HAS_AVX2
#define GAUGE_EXT_IF_AVX2(...) __VA_ARGS__
#else
#define GAUGE_EXT_IF_AVX2(...)
#endif
#ifdef GAUGE_EXT_HAS_AVX512
#define GAUGE_EXT_IF_AVX512(...) __VA_ARGS__
#else
#define GAUGE_EXT_IF_AVX512(...)
#endif

#define GAUGE_EXT_EACH_CAPABILITY(DO) \
  DO(DEFAULT) GAUGE_EXT_IF_AVX2(DO(AVX2)) GAUGE_EXT_IF_AVX512(DO(AVX512))

#define GAUGE_EXT_CHOOSE_FOR(CAPABILITY, TABLE)                           \
  switch (CAPABILITY) {                                                   \
    GAUGE_EXT_IF_AVX512(case Capability::kAvx512 : return AVX512::TABLE;) \
    GAUGE_EXT_IF_AVX2(case Capability::kAvx2 : return AVX2::TABLE;)       \
    default:                                                              \
      return DEFAULT::TABLE;                                              \
  }
#define GAUGE_EXT_CHOOSE(TABLE) GAUGE_EXT_CHOOSE_FOR(capability(), TABLE)
