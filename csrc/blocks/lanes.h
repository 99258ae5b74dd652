#pragma once

// What requantizing needs of vectors beside ops/cpu/vec.h. A lane is a block: its codes, its scale,
// its zero point and its sums stay in that lane, so that nothing is ever added up across lanes.

#include <cstdint>
#include <cstring>

#include "blocks/requantize.h"
#include "ops/cpu/rounding.h"

namespace gauge_ext {
namespace {

using Floats = Vec<float>;
constexpr int kLanes = kWidth<float>;

inline GAUGE_EXT_INLINE Floats broadcast(float value) {
  return value - Floats{};
}

// a b + c, rounded once where the machine can. Kernels here are compiled without contraction, as
// the rest must round where numpy does: (q - z) s - V is 0 where nothing changed.
inline GAUGE_EXT_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline GAUGE_EXT_INLINE Floats lesser(Floats a, Floats b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(a, b);
#elif defined(__x86_64__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline GAUGE_EXT_INLINE Floats greater(Floats a, Floats b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline GAUGE_EXT_INLINE bool any(Words mask) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask));
#elif defined(CPU_CAPABILITY_AVX2)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  uint32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    found |= mask[lane];
  }
  return found != 0;
#endif
}

// 1.5 · 2^23: between it and 2^24 floats are the integers, so that adding it rounds to one, ties to
// even, which then is in the low bits.
constexpr float kRounder = 0x1.8p23f;
constexpr uint32_t kRounderBits = 0x4B400000u;

// Four words of a block in each quarter of a register, of blocks `stride` bytes apart, and back.
inline GAUGE_EXT_INLINE Words join(const uint8_t* from, [[maybe_unused]] int64_t stride) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const auto part = [&](int i) GAUGE_EXT_INLINE {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  };
#if defined(CPU_CAPABILITY_AVX512)
  __m512i words = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
  words = _mm512_inserti32x4(words, part(2), 2);
  return reinterpret_cast<Words>(_mm512_inserti32x4(words, part(3), 3));
#else
  return reinterpret_cast<Words>(
      _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1));
#endif
#else
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
#endif
}
inline GAUGE_EXT_INLINE void split(Words words, uint8_t* to, [[maybe_unused]] int64_t stride) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const auto put = [&](int i, __m128i part) GAUGE_EXT_INLINE {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * stride), part);
  };
#if defined(CPU_CAPABILITY_AVX512)
  const auto all = reinterpret_cast<__m512i>(words);
  put(0, _mm512_castsi512_si128(all));
  put(1, _mm512_extracti32x4_epi32(all, 1));
  put(2, _mm512_extracti32x4_epi32(all, 2));
  put(3, _mm512_extracti32x4_epi32(all, 3));
#else
  const auto all = reinterpret_cast<__m256i>(words);
  put(0, _mm256_castsi256_si128(all));
  put(1, _mm256_extracti128_si256(all, 1));
#endif
#else
  std::memcpy(to, &words, sizeof(words));
#endif
}

// Four by four words change places, in each quarter of the registers by itself.
inline GAUGE_EXT_INLINE void transpose(Words (&words)[4]) {
#if defined(CPU_CAPABILITY_AVX512)
#define GAUGE_EXT_UNPACK(HOW, A, B) _mm512_unpack##HOW(A, B)
  using Register = __m512i;
#elif defined(CPU_CAPABILITY_AVX2)
#define GAUGE_EXT_UNPACK(HOW, A, B) _mm256_unpack##HOW(A, B)
  using Register = __m256i;
#elif defined(__x86_64__)
#define GAUGE_EXT_UNPACK(HOW, A, B) _mm_unpack##HOW(A, B)
  using Register = __m128i;
#endif
#if defined(GAUGE_EXT_UNPACK)
  const auto [a, b, c, d] = reinterpret_cast<const Register(&)[4]>(words);
  const Register ab = GAUGE_EXT_UNPACK(lo_epi32, a, b), ab_high = GAUGE_EXT_UNPACK(hi_epi32, a, b);
  const Register cd = GAUGE_EXT_UNPACK(lo_epi32, c, d), cd_high = GAUGE_EXT_UNPACK(hi_epi32, c, d);
  words[0] = reinterpret_cast<Words>(GAUGE_EXT_UNPACK(lo_epi64, ab, cd));
  words[1] = reinterpret_cast<Words>(GAUGE_EXT_UNPACK(hi_epi64, ab, cd));
  words[2] = reinterpret_cast<Words>(GAUGE_EXT_UNPACK(lo_epi64, ab_high, cd_high));
  words[3] = reinterpret_cast<Words>(GAUGE_EXT_UNPACK(hi_epi64, ab_high, cd_high));
#undef GAUGE_EXT_UNPACK
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      std::swap(words[i][j], words[j][i]);
    }
  }
#endif
}

// The codes of kLanes blocks of `bytes` each as vectors, a word of every block in each, and back.
inline void load_blocks(const uint8_t* from, int64_t bytes, uint32_t* words) {
  int64_t at = 0;
  for (; at + 16 <= bytes; at += 16, words += 4 * kLanes) {
    Words four[4];
    repeat<4>([&](int i) GAUGE_EXT_INLINE { four[i] = join(from + i * bytes + at, 4 * bytes); });
    transpose(four);
    repeat<4>([&](int i)
                  GAUGE_EXT_INLINE { std::memcpy(words + i * kLanes, &four[i], sizeof(four[i])); });
  }
  for (; at < bytes; at += 4, words += kLanes) {  // blocks of 16 in 4 bits have half as many
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(words + lane, from + lane * bytes + at, sizeof(*words));
    }
  }
}
inline void store_blocks(const uint32_t* words, uint8_t* to, int64_t bytes) {
  int64_t at = 0;
  for (; at + 16 <= bytes; at += 16, words += 4 * kLanes) {
    Words four[4];
    repeat<4>([&](int i)
                  GAUGE_EXT_INLINE { std::memcpy(&four[i], words + i * kLanes, sizeof(four[i])); });
    transpose(four);
    repeat<4>([&](int i) GAUGE_EXT_INLINE { split(four[i], to + i * bytes + at, 4 * bytes); });
  }
  for (; at < bytes; at += 4, words += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(to + lane * bytes + at, words + lane, sizeof(*words));
    }
  }
}

inline GAUGE_EXT_INLINE Floats load_numbers(const uint8_t* from, ScaleFormat format) {
  switch (format) {
    case ScaleFormat::kFloat16:
      return read(reinterpret_cast<const Float16Bits*>(from));
    case ScaleFormat::kBFloat16:
      return read(reinterpret_cast<const BFloat16Bits*>(from));
    default:
      return read(reinterpret_cast<const float*>(from));
  }
}
// Stores what the format holds exactly.
inline GAUGE_EXT_INLINE void store_numbers(uint8_t* to, Floats numbers, ScaleFormat format) {
  switch (format) {
    case ScaleFormat::kFloat16:
      return write<Float16Bits, float>(reinterpret_cast<Float16Bits*>(to), numbers);
    case ScaleFormat::kBFloat16:
      return write<BFloat16Bits, float>(reinterpret_cast<BFloat16Bits*>(to), numbers);
    default:
      return write<float, float>(reinterpret_cast<float*>(to), numbers);
  }
}
inline GAUGE_EXT_INLINE Floats rounded_to(Floats numbers, ScaleFormat format) {
  switch (format) {
    case ScaleFormat::kFloat16:
      return nearest<Float16Bits, float>(numbers);
    case ScaleFormat::kBFloat16:
      return nearest<BFloat16Bits, float>(numbers);
    default:
      return numbers;
  }
}

// Zero points that are codes themselves; a vector's worth of them starts on a whole byte.
template <int BITS>
inline GAUGE_EXT_INLINE Floats load_codes(const uint8_t* from) {
  SignedWords codes;
  repeat<kLanes>([&](int lane) GAUGE_EXT_INLINE {
    codes[lane] = BITS == 8 ? from[lane] : from[lane / 2] >> (lane % 2 * 4) & 15;
  });
  return __builtin_convertvector(codes, Floats);
}
template <int BITS>
inline GAUGE_EXT_INLINE void store_codes(uint8_t* to, Floats numbers) {
  const SignedWords codes = __builtin_convertvector(numbers, SignedWords);
  repeat<kLanes * BITS / 8>([&](int i) GAUGE_EXT_INLINE {
    to[i] = static_cast<uint8_t>(BITS == 8 ? codes[i] : codes[2 * i] | codes[2 * i + 1] << 4);
  });
}

}  // namespace
}  // namespace gauge_ext
