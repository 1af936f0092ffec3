// Scalar float operations that mean the same on host and device: the vocabulary of canonical
// arithmetic.
//
// [Note: anonymous namespaces] The files of this folder are compiled once per instruction set. A
// shared inline function compiled for AVX-512 could be picked by the linker for the scalar build,
// so everything in these headers has internal linkage, and none of them includes a standard C++
// header.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define CANONICAL_FN __host__ __device__ __forceinline__
#else
#define CANONICAL_FN inline __attribute__((always_inline))
#endif

namespace primitives::canonical {
namespace {

// One NaN for every output: 0x7fc00000. Which payload an addition of two NaNs keeps is the
// compiler's choice.
constexpr uint32_t kNanBits = 0x7fc00000u;

CANONICAL_FN int32_t as_int(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

CANONICAL_FN float as_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

CANONICAL_FN float to_float(int32_t x) { return static_cast<float>(x); }

CANONICAL_FN float select(bool mask, float a, float b) { return mask ? a : b; }

// The larger one; b when they are equal or either is NaN.
CANONICAL_FN float larger_or_second(float a, float b) { return a > b ? a : b; }

CANONICAL_FN int32_t select_int(bool mask, int32_t a, int32_t b) { return mask ? a : b; }

// One rounding. Without FMA hardware the C library's fmaf, which is correctly rounded.
CANONICAL_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// Correctly rounded.
CANONICAL_FN float sqrt(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

CANONICAL_FN float canonical_nan(float x) {
  return x != x ? as_float(static_cast<int32_t>(kNanBits)) : x;
}

// The constant in the type F, a float or a vector of floats. (x - 0 is x for every x.)
template <class F>
CANONICAL_FN F set(float x) {
  return x - F{};
}

}  // namespace
}  // namespace primitives::canonical
