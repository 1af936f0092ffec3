// How fast memory can be read, or read and written in place: what the benchmark compares with.
#pragma once

#include "canonical/simd.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int kLimitStep = 16;  // vectors
constexpr int kLimitPrefetchNbytes = 4096;

CANONICAL_FN void prefetch_ahead(const uint32_t* words) {
#pragma GCC unroll 16
  for (int nbytes = 0; nbytes < kLimitStep * 4 * kWidth; nbytes += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(words) + kLimitPrefetchNbytes + nbytes);
  }
}

template <bool kPrefetch>
inline uint32_t read_all(const uint32_t* words, int64_t num_words) {
  UVec mixed[kLimitStep] = {};
  for (int64_t i = 0; i < num_words; i += kLimitStep * kWidth) {
#pragma GCC unroll 16
    for (int j = 0; j < kLimitStep; j++) {
      UVec x;
      memcpy(&x, words + i + j * kWidth, sizeof x);
      mixed[j] ^= x;
    }
    if (kPrefetch) prefetch_ahead(words + i);
  }
  UVec all{};
  for (const UVec& one : mixed) all ^= one;
  uint32_t result = 0;
  for (int lane = 0; lane < kWidth; lane++) result ^= all[lane];
  return result;
}

template <bool kPrefetch>
inline void flip_all(uint32_t* words, int64_t num_words) {
  for (int64_t i = 0; i < num_words; i += kLimitStep * kWidth) {
#pragma GCC unroll 16
    for (int j = 0; j < kLimitStep; j++) {
      UVec x;
      memcpy(&x, words + i + j * kWidth, sizeof x);
      x = ~x;
      memcpy(words + i + j * kWidth, &x, sizeof x);
    }
    if (kPrefetch) prefetch_ahead(words + i);
  }
}

inline uint32_t read_words(const uint32_t* words, int64_t num_words, bool prefetch) {
  return prefetch ? read_all<true>(words, num_words) : read_all<false>(words, num_words);
}

inline void flip_words(uint32_t* words, int64_t num_words, bool prefetch) {
  prefetch ? flip_all<true>(words, num_words) : flip_all<false>(words, num_words);
}

}  // namespace
}  // namespace primitives::vocab_entropy
