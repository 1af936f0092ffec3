// How kColumns elements of a row come into vectors and, as gradients, out of them.
#pragma once

#include "canonical/simd.hpp"
#include "vocab_entropy/definition.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int kVectors = kColumns / kWidth;   // of a row of a block
constexpr int kGroup = kWidth == 16 ? 4 : 2;  // vectors under way at a time: registers are few
constexpr int kGroupNumel = kGroup * kWidth;

// nbytes around the caches: 64, 32, or 16 and less; p is aligned to as many.
template <int nbytes>
CANONICAL_FN void stream_bytes(void* p, const void* from) {
#if CANONICAL_WIDTH == 16
  if constexpr (nbytes == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_load_si512(from));
  }
#endif
#if CANONICAL_WIDTH >= 8
  if constexpr (nbytes == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(p),
                               _mm256_load_si256(static_cast<const __m256i*>(from)));
  }
#endif
  if constexpr (nbytes == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), _mm_load_si128(static_cast<const __m128i*>(from)));
  } else {
    memcpy(p, from, nbytes);
  }
}

// 2 * kWidth elements that follow each other, in two vectors: the first and the second half.
template <class T>
struct Two {
  using S = typename T::Storage;
  static constexpr bool kInterleaved = false;

  // Vector `which`, 0 or 1.
  static CANONICAL_FN Vec load(const S* p, int which) { return T::load(p + which * kWidth); }

  // Numbers, no NaN.
  static CANONICAL_FN void store(S* p, Vec a, Vec b) {
    T::store_number(p, a);
    T::store_number(p + kWidth, b);
  }

  // The same around the caches; p is aligned to 64 bytes.
  static CANONICAL_FN void stream(S* p, Vec a, Vec b) {
    alignas(64) S elements[kWidth];
    T::store_number(elements, a);
    stream_bytes<sizeof elements>(p, elements);
    T::store_number(elements, b);
    stream_bytes<sizeof elements>(p + kWidth, elements);
  }
};

// The even elements and the odd ones, which widen and narrow where they are.
template <>
struct Two<BFloat16> {
  static constexpr bool kInterleaved = true;

  static CANONICAL_FN Vec load(const uint16_t* p, int which) {
    UVec words;
    memcpy(&words, p, sizeof words);
    return reinterpret_cast<Vec>(which == 0 ? words << 16 : words & 0xffff0000u);
  }

  // To nearest even, in the upper half.
  static CANONICAL_FN UVec rounded(Vec x) {
    const UVec bits = reinterpret_cast<UVec>(x);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static CANONICAL_FN UVec narrow(Vec even, Vec odd) {
    return (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
  }
  static CANONICAL_FN void store(uint16_t* p, Vec even, Vec odd) {
    const UVec words = narrow(even, odd);
    memcpy(p, &words, sizeof words);
  }
  static CANONICAL_FN void stream(uint16_t* p, Vec even, Vec odd) {
    const UVec words = narrow(even, odd);
    stream_bytes<sizeof words>(p, &words);
  }
};

// Vector j of a row, which holds its columns [j * kWidth, (j + 1) * kWidth), or half of those of
// two vectors.
template <class T>
CANONICAL_FN Vec load_vector(const typename T::Storage* row, int j) {
  return Two<T>::load(row + j / 2 * 2 * kWidth, j % 2);
}

// From the vectors of load_vector to columns.
template <class T>
CANONICAL_FN void put_columns_in_order(Vec x[kVectors]) {
  if (!Two<T>::kInterleaved) return;
  const IVec lane = lane_numbers(), low = lane / 2 + (lane & 1) * kWidth;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; j += 2) {
    const Vec even = x[j], odd = x[j + 1];
    x[j] = __builtin_shuffle(even, odd, low);
    x[j + 1] = __builtin_shuffle(even, odd, low + kWidth / 2);
  }
}

}  // namespace
}  // namespace primitives::vocab_entropy
