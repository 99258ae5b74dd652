#pragma once

// Vector types of the width that this translation unit is compiled for, on the compiler's own
// vector extension: + and * work lane by lane, and a * b + c contracts to a fused multiply-add.
// Each kernel file is compiled once per capability, into a namespace named CPU_CAPABILITY, with
// internal linkage for everything but its table of functions: code for one instruction set never
// leaks into another's shared inline functions.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ops/cpu/low_rank.h"

namespace gauge_ext {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <typename acc_t>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename acc_t>
using Vec = typename VecOf<acc_t>::type;

template <typename acc_t>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(acc_t));

template <typename acc_t>
inline __attribute__((always_inline)) Vec<acc_t> load(const acc_t* from) {
  Vec<acc_t> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename acc_t>
inline __attribute__((always_inline)) void store(acc_t* to, const Vec<acc_t>& value) {
  std::memcpy(to, &value, sizeof(value));
}

// body(0), ..., body(COUNT - 1), written out before the compiler decides where arrays live: a tile
// that is indexed by loop counters is zeroed, filled and stored through memory.
#define GAUGE_EXT_INLINE __attribute__((always_inline))
template <typename F, int... I>
inline GAUGE_EXT_INLINE void repeat_each(std::integer_sequence<int, I...>, const F& body) {
  (body(I), ...);
}
template <int COUNT, typename F>
inline GAUGE_EXT_INLINE void repeat(const F& body) {
  repeat_each(std::make_integer_sequence<int, COUNT>(), body);
}

// A piece's numbers come a cache line at a time while others are computed: rows of a factor's piece
// lie too far apart, or are too short, for the hardware to see them coming.
template <typename T>
inline GAUGE_EXT_INLINE void prefetch(const T* from) {
  __builtin_prefetch(from, 0, 2);
}

// Zeros in the accumulators of a tile, register by register: `= {}` fills an array in memory.
template <typename V, int ROWS, int VECTORS>
inline GAUGE_EXT_INLINE void set_zero(V (&tile)[ROWS][VECTORS]) {
  repeat<ROWS * VECTORS>([&](int n) GAUGE_EXT_INLINE { tile[n / VECTORS][n % VECTORS] = V{}; });
}

template <typename acc_t>
inline __attribute__((always_inline)) acc_t horizontal_sum(const Vec<acc_t>& value) {
  acc_t sum = 0;
  for (int lane = 0; lane < kWidth<acc_t>; ++lane) {
    sum += value[lane];
  }
  return sum;
}

// The sums of COUNT vectors; four are added up together, by halves and pairs.
template <int COUNT, typename acc_t>
inline __attribute__((always_inline)) void horizontal_sums(const Vec<acc_t> (&value)[COUNT],
                                                           acc_t (&sum)[COUNT]) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if constexpr (COUNT == 4 && std::is_same_v<acc_t, float>) {
    __m256 half[4];
    repeat<4>([&](int i) GAUGE_EXT_INLINE {
#if defined(CPU_CAPABILITY_AVX512)
      half[i] = _mm512_castps512_ps256(value[i]) + _mm512_extractf32x8_ps(value[i], 1);
#else
      half[i] = value[i];
#endif
    });
    const __m256 pairs =
        _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(sum, _mm256_castps256_ps128(pairs) + _mm256_extractf128_ps(pairs, 1));
    return;
  }
  if constexpr (COUNT == 4 && std::is_same_v<acc_t, double>) {
    __m256d half[4];
    repeat<4>([&](int i) GAUGE_EXT_INLINE {
#if defined(CPU_CAPABILITY_AVX512)
      half[i] = _mm512_castpd512_pd256(value[i]) + _mm512_extractf64x4_pd(value[i], 1);
#else
      half[i] = value[i];
#endif
    });
    const __m256d low = _mm256_hadd_pd(half[0], half[1]), high = _mm256_hadd_pd(half[2], half[3]);
    _mm256_storeu_pd(
        sum, _mm256_permute2f128_pd(low, high, 0x20) + _mm256_permute2f128_pd(low, high, 0x31));
    return;
  }
#endif
  repeat<COUNT>([&](int i) GAUGE_EXT_INLINE { sum[i] = horizontal_sum<acc_t>(value[i]); });
}

// Words of the random generator, as many as fit a register.
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t SignedWords __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WideWords __attribute__((vector_size(kVectorBytes)));
constexpr int kWords = kVectorBytes / static_cast<int>(sizeof(uint32_t));

// The products of the even lanes; x86 has one instruction for them.
inline __attribute__((always_inline)) WideWords multiply_even(uint32_t factor, WideWords words) {
#if defined(CPU_CAPABILITY_AVX512)
  return reinterpret_cast<WideWords>(_mm512_mul_epu32(reinterpret_cast<__m512i>(words),
                                                      _mm512_set1_epi32(static_cast<int>(factor))));
#elif defined(CPU_CAPABILITY_AVX2)
  return reinterpret_cast<WideWords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(words),
                                                      _mm256_set1_epi32(static_cast<int>(factor))));
#elif defined(__x86_64__)
  return reinterpret_cast<WideWords>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(words), _mm_set1_epi32(static_cast<int>(factor))));
#else
  return (words & 0xFFFFFFFFu) * factor;
#endif
}

struct MultiplyWideWords {
  inline __attribute__((always_inline)) void operator()(uint32_t factor,
                                                        const Words& word,
                                                        Words& high,
                                                        Words& low) const {
    constexpr uint64_t kHigh = 0xFFFFFFFF00000000u;
    const WideWords pairs = reinterpret_cast<WideWords>(word);
    const WideWords even = multiply_even(factor, pairs);
    const WideWords odd = multiply_even(factor, pairs >> 32);
    high = reinterpret_cast<Words>((even >> 32) | (odd & kHigh));
    low = reinterpret_cast<Words>((even & ~kHigh) | (odd << 32));
  }
};

// Words in two registers of 64-bit lanes, of which the lower half counts: the products of 32-bit
// words then come out in place, with nothing to be put together between the rounds.
struct SplitWords {
  WideWords even;
  WideWords odd;

  inline __attribute__((always_inline)) SplitWords operator^(const SplitWords& other) const {
    return {even ^ other.even, odd ^ other.odd};
  }
  inline __attribute__((always_inline)) SplitWords operator^(const WideWords& word) const {
    return {even ^ word, odd ^ word};
  }
  inline __attribute__((always_inline)) SplitWords operator+(uint64_t word) const {
    return {even + word, odd + word};
  }
  inline __attribute__((always_inline)) static SplitWords from(const Words& words) {
    const WideWords pairs = reinterpret_cast<WideWords>(words);
    return {pairs, pairs >> 32};
  }
  inline __attribute__((always_inline)) Words joined() const {
#if defined(CPU_CAPABILITY_AVX2)
    return reinterpret_cast<Words>(_mm256_blend_epi32(reinterpret_cast<__m256i>(even),
                                                      reinterpret_cast<__m256i>(odd << 32), 0xAA));
#else
    return reinterpret_cast<Words>((even & 0xFFFFFFFFu) | (odd << 32));
#endif
  }
};

struct MultiplySplitWords {
  inline __attribute__((always_inline)) void operator()(uint32_t factor,
                                                        const SplitWords& word,
                                                        SplitWords& high,
                                                        SplitWords& low) const {
    low = {multiply_even(factor, word.even), multiply_even(factor, word.odd)};
    high = {low.even >> 32, low.odd >> 32};
  }
};

// bfloat16 is the upper half of a float32. Rounds to nearest, ties to even; a NaN stays one instead
// of rounding up into infinity.
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

inline __attribute__((always_inline)) Vec<float> load_bfloat16(const BFloat16Bits* from) {
  HalfWords bits;
  std::memcpy(&bits, from, sizeof(bits));
  // One instruction, where the compiler's own conversion widens halves and joins them.
#if defined(CPU_CAPABILITY_AVX512)
  const auto words =
      reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
#elif defined(CPU_CAPABILITY_AVX2)
  const auto words =
      reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
  const auto words = __builtin_convertvector(bits, Words);
#endif
  return reinterpret_cast<Vec<float>>(words << 16);
}

inline __attribute__((always_inline)) void store_bfloat16(BFloat16Bits* to,
                                                          const Vec<float>& value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words is_nan = reinterpret_cast<Words>((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const Words chosen = (rounded & ~is_nan) | (is_nan & 0x7FC0u);
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i narrow = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(chosen));
#elif defined(CPU_CAPABILITY_AVX2)
  // Packing works within each half of the register: the quarters come out as 0 0 2 2.
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(chosen), __m256i{});
  const __m128i narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
  const HalfWords narrow = __builtin_convertvector(chosen, HalfWords);
#endif
  std::memcpy(to, &narrow, sizeof(narrow));
}

inline __attribute__((always_inline)) float to_acc(float value) {
  return value;
}
inline __attribute__((always_inline)) double to_acc(double value) {
  return value;
}
inline __attribute__((always_inline)) float to_acc(BFloat16Bits value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Loads a vector in acc_t, and stores one, whatever the storage type.
template <typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) Vec<acc_t> load_as(const scalar_t* from) {
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    return load_bfloat16(from);
  } else {
    return load<acc_t>(from);
  }
}
template <typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) void store_as(scalar_t* to, const Vec<acc_t>& value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    store_bfloat16(to, value);
  } else {
    store<acc_t>(to, value);
  }
}

template <typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) scalar_t from_acc(acc_t value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    BFloat16Bits lanes[kWidth<float>];
    store_bfloat16(lanes, Vec<float>{} + value);
    return lanes[0];
  } else {
    return value;
  }
}

}  // namespace
}  // namespace gauge_ext
