#pragma once

// What the CUDA kernels are made of. The same text is compiled by nvcc and, in the C++ tests, by
// the host's compiler on an emulation of CUDA's language (tests/csrc/cuda/cuda_emulation.h), where
// it runs on the CPU: so nothing here may include torch.

#include <cstdint>
#include <type_traits>

#include "math/storage.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#define GAUGE_EXT_UNROLL _Pragma("unroll")
#define GAUGE_EXT_UNROLL_TWICE _Pragma("unroll 2")
#define GAUGE_EXT_NO_UNROLL _Pragma("unroll 1")
#define GAUGE_EXT_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#else
#include "cuda/cuda_emulation.h"
#endif

namespace gauge_ext {
namespace {

constexpr int kWarp = 32;

// The product of tensor cores, D += A B for a warp, with A 16 x 8 and B 8 x 8. With g = lane / 4
// and t = lane % 4 a lane holds (PTX ISA, mma.m16n8k8)
//   a: A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4]      b: B[t][g], B[t+4][g]
//   d: D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
// This one is right for every type, and what float64 runs with.
template <typename acc_t>
__device__ __forceinline__ void mma_by_shuffles(acc_t (&d)[4],
                                                const acc_t (&a)[4],
                                                const acc_t (&b)[2]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  GAUGE_EXT_UNROLL
  for (int k = 0; k < 8; ++k) {
    const int half = k / 4, from = k % 4;
    const acc_t low = __shfl_sync(0xFFFFFFFFu, a[2 * half], 4 * g + from);
    const acc_t high = __shfl_sync(0xFFFFFFFFu, a[2 * half + 1], 4 * g + from);
    const acc_t even = __shfl_sync(0xFFFFFFFFu, b[half], 4 * (2 * t) + from);
    const acc_t odd = __shfl_sync(0xFFFFFFFFu, b[half], 4 * (2 * t + 1) + from);
    d[0] += low * even;
    d[1] += low * odd;
    d[2] += high * even;
    d[3] += high * odd;
  }
}

// In float32 the tensor cores read tf32: the upper 19 bits of each operand.
__device__ __forceinline__ void mma(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(float_bits(a[0])), "r"(float_bits(a[1])), "r"(float_bits(a[2])), "r"(float_bits(a[3])),
        "r"(float_bits(b[0])), "r"(float_bits(b[1])));
#elif !defined(__CUDACC__)
  emulated_mma_tf32(d, a, b);
#endif
}
__device__ __forceinline__ void mma(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if defined(__CUDACC__)
  mma_by_shuffles(d, a, b);
#else
  emulated_mma(d, a, b);
#endif
}

// value = high + low, each a tf32, to about 2^-23 of value.
struct Split {
  float high;
  float low;
};
__device__ __forceinline__ Split split_tf32(float value) {
  const float high = bits_float((float_bits(value) + 0x1000u) & ~0x1FFFu);
  return {high, value - high};
}

// D += A B to float32's precision. An operand that is EXACT came from bfloat16 or float16, every
// one of which is a tf32; another is split in two, and the product of the two low parts, about
// 2^-22 of the whole, is left out.
template <bool EXACT_A, bool EXACT_B, typename acc_t>
__device__ __forceinline__ void multiply(acc_t (&d)[4], const acc_t (&a)[4], const acc_t (&b)[2]) {
  if constexpr (std::is_same_v<acc_t, double>) {
    mma(d, a, b);
  } else {
    float a_high[4], a_low[4], b_high[2], b_low[2];
    GAUGE_EXT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Split parts = EXACT_A ? Split{a[i], 0.0f} : split_tf32(a[i]);
      a_high[i] = parts.high;
      a_low[i] = parts.low;
    }
    GAUGE_EXT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Split parts = EXACT_B ? Split{b[i], 0.0f} : split_tf32(b[i]);
      b_high[i] = parts.high;
      b_low[i] = parts.low;
    }
    if constexpr (!EXACT_A) {
      mma(d, a_low, b_high);
    }
    if constexpr (!EXACT_B) {
      mma(d, a_high, b_low);
    }
    mma(d, a_high, b_high);
  }
}

// Whether a value of this storage type is a tf32.
template <typename scalar_t>
constexpr bool kExact = sizeof(scalar_t) == 2;

// COUNT neighbours that are loaded and stored at once.
template <typename scalar_t, int COUNT>
struct alignas(sizeof(scalar_t) * COUNT > 16 ? 16 : sizeof(scalar_t) * COUNT) Pack {
  scalar_t values[COUNT];
};

GAUGE_EXT_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename scalar_t>
__host__ __device__ constexpr int pack_size(int bytes) {
  return bytes / static_cast<int>(sizeof(scalar_t));
}

}  // namespace
}  // namespace gauge_ext
