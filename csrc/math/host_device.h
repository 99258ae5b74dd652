#pragma once

// Functors marked so are compiled for the CPU and for CUDA from one formula.
#if defined(__CUDACC__)
#define GAUGE_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GAUGE_EXT_HOST_DEVICE inline __attribute__((always_inline))
#endif
