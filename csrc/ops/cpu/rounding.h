#pragma once

// Vectors of float16 as they lie in memory, and how a result is rounded to the storage type: to
// nearest, or up or down by chance (math/stochastic.h).

#include <cstdint>
#include <cstring>

#include "math/dropout.h"
#include "math/stochastic.h"
#include "ops/cpu/vec.h"

namespace gauge_ext {
namespace {

inline __attribute__((always_inline)) Vec<float> load_half(const Float16Bits* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return reinterpret_cast<Vec<float>>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(CPU_CAPABILITY_AVX2)
  return reinterpret_cast<Vec<float>>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vec<float> value;
  for (int lane = 0; lane < kWidth<float>; ++lane) {
    _Float16 half;
    std::memcpy(&half, from + lane, sizeof(half));
    value[lane] = static_cast<float>(half);
  }
  return value;
#endif
}

inline __attribute__((always_inline)) void store_half(Float16Bits* to, const Vec<float>& value) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &half, sizeof(half));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &half, sizeof(half));
#else
  for (int lane = 0; lane < kWidth<float>; ++lane) {
    const auto half = static_cast<_Float16>(value[lane]);
    std::memcpy(to + lane, &half, sizeof(half));
  }
#endif
}

template <typename scalar_t>
inline __attribute__((always_inline)) Vec<typename AccOf<scalar_t>::type> read(
    const scalar_t* from) {
  if constexpr (std::is_same_v<scalar_t, Float16Bits>) {
    return load_half(from);
  } else {
    return load_as<scalar_t, typename AccOf<scalar_t>::type>(from);
  }
}

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

// All ones where a word, its top bit zero, is above `limit`: x86 compares signed integers only.
inline __attribute__((always_inline)) Words above(const Words& word, uint32_t limit) {
  return reinterpret_cast<Words>(reinterpret_cast<Integers>(word) > static_cast<int32_t>(limit));
}

// `value` rounded to bfloat16, to nearest, ties to even; what lies below is to be cut off.
inline __attribute__((always_inline)) Words nearest_bfloat16(const Vec<float>& value) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words last = (bits << 15) >> 31;
  return value != value ? Words{} + 0x7FC00000u : bits + 0x7FFFu + last;
}

// `value` rounded to scalar_t, to nearest, ties to even, but still in acc_t.
template <typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) Vec<acc_t> nearest(const Vec<acc_t>& value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    return reinterpret_cast<Vec<float>>(nearest_bfloat16(value) & 0xFFFF0000u);
  } else if constexpr (std::is_same_v<scalar_t, Float16Bits>) {
    Float16Bits half[kWidth<float>];
    store_half(half, value);
    return load_half(half);
  } else {
    return value;
  }
}

// Stores what scalar_t holds exactly.
template <typename scalar_t, typename acc_t>
inline __attribute__((always_inline)) void write(scalar_t* to, const Vec<acc_t>& value) {
  if constexpr (std::is_same_v<scalar_t, Float16Bits>) {
    store_half(to, value);
  } else if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    const Words bits = reinterpret_cast<Words>(value) >> 16;
#if defined(CPU_CAPABILITY_AVX512)
    const __m256i narrow = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits));
#elif defined(CPU_CAPABILITY_AVX2)
    // Packing works within each half of the register: the quarters come out as 0 0 2 2.
    const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits), __m256i{});
    const __m128i narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
#else
    const HalfWords narrow = __builtin_convertvector(bits, HalfWords);
#endif
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    store<acc_t>(to, value);
  }
}

// Two vectors rounded to scalar_t, to nearest as by nearest(), in its 16 bits side by side.
typedef uint16_t Packed __attribute__((vector_size(kVectorBytes)));

inline __attribute__((always_inline)) Packed upper_halves(const Words& first, const Words& second) {
#if defined(CPU_CAPABILITY_AVX2)
  // Packing works within each half of the registers: the quarters come out as 0 2 1 3.
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(first >> 16),
                                             reinterpret_cast<__m256i>(second >> 16));
  return reinterpret_cast<Packed>(_mm256_permute4x64_epi64(packed, 0b11011000));
#else
  Packed odd;
  for (int i = 0; i < 2 * kWords; ++i) {
    odd[i] = static_cast<uint16_t>(2 * i + 1);
  }
  return __builtin_shuffle(reinterpret_cast<Packed>(first), reinterpret_cast<Packed>(second), odd);
#endif
}

template <typename scalar_t>
inline GAUGE_EXT_INLINE Packed nearest_pair(const Vec<float>& first, const Vec<float>& second) {
  if constexpr (std::is_same_v<scalar_t, BFloat16Bits>) {
    return upper_halves(nearest_bfloat16(first), nearest_bfloat16(second));
  } else {
    Float16Bits half[2 * kWidth<float>];
    store_half(half, first);
    store_half(half + kWidth<float>, second);
    Packed packed;
    std::memcpy(&packed, half, sizeof(packed));
    return packed;
  }
}

// All ones where an entry is infinite or NaN, which is where its exponent is.
template <typename scalar_t>
inline GAUGE_EXT_INLINE Packed not_finite(const Packed& packed) {
  constexpr uint16_t kExponent = std::is_same_v<scalar_t, BFloat16Bits> ? 0x7F80 : 0x7C00;
  return reinterpret_cast<Packed>((packed & kExponent) == kExponent);
}

// The multiple of 2^-24, float16's least step, next to |value| below or above it: exact arithmetic.
inline __attribute__((always_inline)) Vec<float> stochastic_subnormal(const Vec<float>& magnitude,
                                                                      const Words& draw) {
  const Vec<float> steps = magnitude * 0x1p24f;
  const Integers whole = __builtin_convertvector(steps, Integers);
  const Vec<float> rest = (steps - __builtin_convertvector(whole, Vec<float>)) * 0x1p16f;
  const Words missing = 0xFFFFu - draw;
  // Comparing gives -1 where true.
  const Integers up =
      rest > __builtin_convertvector(reinterpret_cast<Integers>(missing), Vec<float>);
  return __builtin_convertvector(whole - up, Vec<float>) * 0x1p-24f;
}

// `value` as one of its two neighbours in scalar_t, the farther the rarer: adding random bits below
// the last one that is kept and cutting them off carries with just that probability.
template <typename scalar_t>
inline __attribute__((always_inline)) Vec<float> stochastic(const Vec<float>& value,
                                                            const Words& draw) {
  const Words bits = reinterpret_cast<Words>(value);
  const Words magnitude = bits & 0x7FFFFFFFu;
  // Infinity and NaN stay what they are.
  const Words special = above(magnitude, 0x7F7FFFFFu);
  Words rounded;
  if constexpr (std::is_same_v<scalar_t, Float16Bits>) {
    const Words normal = (magnitude + (draw >> 3)) & ~0x1FFFu;
    const Words small = ~above(magnitude, 0x387FFFFFu);  // below 2^-14
    const Words subnormal = reinterpret_cast<Words>(
        stochastic_subnormal(reinterpret_cast<Vec<float>>(magnitude & small), draw));
    rounded = (normal & ~small) | (subnormal & small);
  } else {
    rounded = (magnitude + draw) & ~0xFFFFu;
  }
  rounded |= bits & 0x80000000u;
  return reinterpret_cast<Vec<float>>((rounded & ~special) | (bits & special));
}

// The random bits of one row of a block, as many as a tile's vectors need, drawn 128 at a time.
struct RowBits {
  uint32_t bits[kDropoutBlock];

  void draw(const Rounding& rounding, int64_t row, int64_t block) {
    static_assert(kDropoutLanes % kWords == 0);
    Words lane = {};
    for (int i = 0; i < kWords; ++i) {
      lane[i] = static_cast<uint32_t>(i);
    }
    for (int first = 0; first < kDropoutLanes; first += kWords) {
      Words words[4];
      const Words counter = lane + static_cast<uint32_t>(block * kDropoutLanes + first);
      rounding_words<MultiplyWideWords>(rounding, row, counter, words);
      for (int word = 0; word < 4; ++word) {
        const Words low = words[word] & 0xFFFFu, high = words[word] >> 16;
        uint32_t* to = bits + 2 * word * kDropoutLanes + first;
        std::memcpy(to, &low, sizeof(low));
        std::memcpy(to + kDropoutLanes, &high, sizeof(high));
      }
    }
  }
};

}  // namespace
}  // namespace gauge_ext
