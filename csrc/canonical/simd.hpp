// Vec: CANONICAL_WIDTH floats, with loads and stores of float32, float16 and bfloat16 and the few
// shuffles the kernels need. Included by one .cpp per instruction set, after its `#pragma GCC
// target`.
#pragma once

#include <immintrin.h>

#include "canonical/portable.hpp"
#include "canonical/rounding.hpp"

#ifndef CANONICAL_WIDTH
#error "define CANONICAL_WIDTH (16: AVX-512, 8: AVX2, 4: baseline) before this header"
#endif

namespace primitives::canonical {
namespace {

constexpr int kWidth = CANONICAL_WIDTH;
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));

CANONICAL_FN IVec as_int(Vec x) { return reinterpret_cast<IVec>(x); }
CANONICAL_FN Vec as_float(IVec x) { return reinterpret_cast<Vec>(x); }
CANONICAL_FN Vec to_float(IVec x) { return __builtin_convertvector(x, Vec); }
CANONICAL_FN Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }
CANONICAL_FN Vec canonical_nan(Vec x) {
  return select(x != x, as_float(IVec{} + static_cast<int32_t>(kNanBits)), x);
}

#if CANONICAL_WIDTH == 16
CANONICAL_FN Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
CANONICAL_FN Vec sqrt(Vec x) { return _mm512_sqrt_ps(x); }
CANONICAL_FN Vec larger_or_second(Vec a, Vec b) { return _mm512_max_ps(a, b); }
CANONICAL_FN void mul_hi_lo(uint32_t a, UVec b, UVec* hi, UVec* lo) {
  const __m512i m = _mm512_set1_epi32(static_cast<int>(a)), x = reinterpret_cast<__m512i>(b);
  const __m512i even = _mm512_mul_epu32(m, x), odd = _mm512_mul_epu32(m, _mm512_srli_epi64(x, 32));
  *hi = reinterpret_cast<UVec>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd));
  *lo = a * b;
}
CANONICAL_FN Vec widen_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CANONICAL_FN Vec widen_bfloat16(const uint16_t* p) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(x, 16));
}
CANONICAL_FN void narrow_float16(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
CANONICAL_FN void narrow_words(uint16_t* p, UVec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
#elif CANONICAL_WIDTH == 8
CANONICAL_FN Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
CANONICAL_FN Vec sqrt(Vec x) { return _mm256_sqrt_ps(x); }
CANONICAL_FN Vec larger_or_second(Vec a, Vec b) { return _mm256_max_ps(a, b); }
CANONICAL_FN void mul_hi_lo(uint32_t a, UVec b, UVec* hi, UVec* lo) {
  const __m256i m = _mm256_set1_epi32(static_cast<int>(a)), x = reinterpret_cast<__m256i>(b);
  const __m256i even = _mm256_mul_epu32(m, x), odd = _mm256_mul_epu32(m, _mm256_srli_epi64(x, 32));
  *hi = reinterpret_cast<UVec>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  *lo = a * b;
}
CANONICAL_FN Vec widen_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CANONICAL_FN Vec widen_bfloat16(const uint16_t* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(x, 16));
}
CANONICAL_FN void narrow_float16(uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
CANONICAL_FN void narrow_words(uint16_t* p, UVec x) {
  const __m256i v = reinterpret_cast<__m256i>(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
#elif CANONICAL_WIDTH == 4
CANONICAL_FN Vec fma(Vec a, Vec b, Vec c) {
  return Vec{fma(a[0], b[0], c[0]), fma(a[1], b[1], c[1]), fma(a[2], b[2], c[2]),
             fma(a[3], b[3], c[3])};
}
CANONICAL_FN Vec sqrt(Vec x) { return _mm_sqrt_ps(x); }
CANONICAL_FN Vec larger_or_second(Vec a, Vec b) { return _mm_max_ps(a, b); }
CANONICAL_FN void mul_hi_lo(uint32_t a, UVec b, UVec* hi, UVec* lo) {
  for (int i = 0; i < 4; i++) (*hi)[i] = static_cast<uint32_t>((uint64_t{a} * b[i]) >> 32);
  *lo = a * b;
}
CANONICAL_FN Vec widen_float16(const uint16_t* p) {
  return Vec{float16_to_float(p[0]), float16_to_float(p[1]), float16_to_float(p[2]),
             float16_to_float(p[3])};
}
CANONICAL_FN Vec widen_bfloat16(const uint16_t* p) {
  return Vec{bfloat16_to_float(p[0]), bfloat16_to_float(p[1]), bfloat16_to_float(p[2]),
             bfloat16_to_float(p[3])};
}
CANONICAL_FN void narrow_float16(uint16_t* p, Vec x) {
  for (int i = 0; i < 4; i++) p[i] = float_to_float16(x[i]);
}
CANONICAL_FN void narrow_words(uint16_t* p, UVec x) {
  for (int i = 0; i < 4; i++) p[i] = static_cast<uint16_t>(x[i]);
}
#endif

// How an element is stored. load widens exactly; store rounds once to nearest even and writes one
// NaN; store_number is for what is no NaN.
struct Float32 {
  using Storage = float;
  static CANONICAL_FN Vec load(const float* p) {
    Vec x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static CANONICAL_FN void store(float* p, Vec x) { store_number(p, canonical_nan(x)); }
  static CANONICAL_FN void store_number(float* p, Vec x) { memcpy(p, &x, sizeof x); }
};
struct Float16 {
  using Storage = uint16_t;
  static CANONICAL_FN Vec load(const uint16_t* p) { return widen_float16(p); }
  static CANONICAL_FN void store(uint16_t* p, Vec x) { store_number(p, canonical_nan(x)); }
  static CANONICAL_FN void store_number(uint16_t* p, Vec x) { narrow_float16(p, x); }
};
struct BFloat16 {
  using Storage = uint16_t;
  static CANONICAL_FN Vec load(const uint16_t* p) { return widen_bfloat16(p); }
  static CANONICAL_FN void store(uint16_t* p, Vec x) { store_number(p, canonical_nan(x)); }
  static CANONICAL_FN void store_number(uint16_t* p, Vec x) {
    const UVec bits = reinterpret_cast<UVec>(x);
    narrow_words(p, (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

// The lanes of a whole vector, known at compile time; an int is the shorter tail of a row.
struct AllLanes {
  constexpr operator int() const { return kWidth; }
};

template <class T>
CANONICAL_FN Vec load(const typename T::Storage* p, AllLanes = {}) {
  return T::load(p);
}

// The first num_lanes elements, 0 <= num_lanes < kWidth; zeros in the other lanes.
template <class T>
CANONICAL_FN Vec load(const typename T::Storage* p, int num_lanes) {
  typename T::Storage lanes[kWidth] = {};
  memcpy(lanes, p, sizeof lanes[0] * static_cast<unsigned>(num_lanes & (kWidth - 1)));
  return T::load(lanes);
}

template <class T>
CANONICAL_FN void store(typename T::Storage* p, Vec x, AllLanes = {}) {
  T::store(p, x);
}

template <class T>
CANONICAL_FN void store(typename T::Storage* p, Vec x, int num_lanes) {
  typename T::Storage lanes[kWidth];
  T::store(lanes, x);
  memcpy(p, lanes, sizeof lanes[0] * static_cast<unsigned>(num_lanes & (kWidth - 1)));
}

// Stores without touching NaNs: for scratch memory.
CANONICAL_FN void store_raw(float* p, Vec x) { memcpy(p, &x, sizeof x); }

// Calls body(i, lanes) for the whole vectors of [0, n) and once for the tail.
template <class Body>
CANONICAL_FN void for_lanes(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, AllLanes{});
  if (i < n) body(i, static_cast<int>(n - i));
}

CANONICAL_FN IVec lane_numbers() {
  IVec lanes;
  for (int i = 0; i < kWidth; i++) lanes[i] = i;
  return lanes;
}

// All ones in the first n lanes, zeros in the others; n may lie outside [0, kWidth].
CANONICAL_FN IVec first_lanes(int64_t n) {
  const int clamped = n < 0 ? 0 : n > kWidth ? kWidth : static_cast<int>(n);
  return lane_numbers() < clamped;
}

// Elements 0, 2, 4... and 1, 3, 5... of the 2 * kWidth elements (a, b).
CANONICAL_FN Vec even_lanes(Vec a, Vec b) { return __builtin_shuffle(a, b, lane_numbers() * 2); }
CANONICAL_FN Vec odd_lanes(Vec a, Vec b) { return __builtin_shuffle(a, b, lane_numbers() * 2 + 1); }

// The larger one; NaN when either is NaN.
CANONICAL_FN Vec max(Vec a, Vec b) { return select((b > a) | (b != b), b, a); }

CANONICAL_FN float horizontal_max(Vec x) {
#pragma GCC unroll 8
  for (int distance = 1; distance < kWidth; distance *= 2) {
    x = max(x, __builtin_shuffle(x, lane_numbers() ^ distance));
  }
  return x[0];
}

// Transposes the kWidth x kWidth block in rows.
CANONICAL_FN void transpose(Vec rows[kWidth]) {
#pragma GCC unroll 8
  for (int distance = 1; distance < kWidth; distance *= 2) {
    const IVec lane = lane_numbers(), upper = (lane & distance) != 0;
    const IVec low = upper ? lane - distance + kWidth : lane;
    const IVec high = upper ? lane + kWidth : lane + distance;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) {
      if (i & distance) continue;
      const Vec a = rows[i], b = rows[i + distance];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + distance] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace
}  // namespace primitives::canonical
