// 16 bytes of a tensor in registers, for kernels that run as CUDA threads (or are played as such on
// the host): how elements widen to float and narrow back. The bits are those of rounding.hpp; on
// the device the conversion instructions give them.
#pragma once

#include "canonical/portable.hpp"
#include "canonical/rounding.hpp"

#if defined(__CUDACC__)
#define DEVICE_FN __device__ __forceinline__
#else
#define DEVICE_FN inline
#endif

namespace primitives::canonical {
namespace {

struct alignas(16) Packed {
  uint32_t words[4];
};

DEVICE_FN float float_of(uint32_t bits) { return as_float(static_cast<int32_t>(bits)); }
DEVICE_FN uint32_t bits_of(float x) { return static_cast<uint32_t>(as_int(x)); }

// What each of the three offers. narrow writes one NaN; narrow_numbers is for what is no NaN.
struct PackedFloat32 {
  using Storage = uint32_t;
  static constexpr int kNumel = 4;
  static constexpr uint32_t kMinusInfinity = 0xff800000u;  // a word of it
  static DEVICE_FN float widen(Storage x) { return float_of(x); }
  static DEVICE_FN Storage element(const Packed& x, int i) { return x.words[i]; }
  static DEVICE_FN void set(Packed* x, int i, Storage element) { x->words[i] = element; }
  static DEVICE_FN Storage narrow(float x) { return bits_of(canonical_nan(x)); }
  static DEVICE_FN Packed narrow_numbers(const float x[kNumel]) {
    return {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}};
  }
};

// Elements of 16 bits: two in a word.
struct PackedHalves {
  using Storage = uint16_t;
  static constexpr int kNumel = 8;
  static DEVICE_FN Storage element(const Packed& x, int i) {
    return static_cast<uint16_t>(x.words[i / 2] >> (i % 2 * 16));
  }
  static DEVICE_FN void set(Packed* x, int i, Storage element) {
    const uint32_t kept = x->words[i / 2] & (0xffff0000u >> (i % 2 * 16));
    x->words[i / 2] = kept | static_cast<uint32_t>(element) << (i % 2 * 16);
  }
};

struct PackedFloat16 : PackedHalves {
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  static DEVICE_FN float widen(Storage x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return float16_to_float(x);
#endif
  }
  static DEVICE_FN Storage narrow(float x) { return float_to_float16(x); }
  static DEVICE_FN Packed narrow_numbers(const float x[kNumel]) {
    Packed y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if defined(__CUDA_ARCH__)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y.words[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
#else
      y.words[i] = float_to_float16(x[2 * i]) | uint32_t{float_to_float16(x[2 * i + 1])} << 16;
#endif
    }
    return y;
  }
};

struct PackedBFloat16 : PackedHalves {
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  static DEVICE_FN float widen(Storage x) { return bfloat16_to_float(x); }
  static DEVICE_FN Storage narrow(float x) { return float_to_bfloat16(x); }
  static DEVICE_FN Packed narrow_numbers(const float x[kNumel]) {
    Packed y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if defined(__CUDA_ARCH__)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y.words[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
#else
      y.words[i] = float_to_bfloat16(x[2 * i]) | uint32_t{float_to_bfloat16(x[2 * i + 1])} << 16;
#endif
    }
    return y;
  }
};

}  // namespace
}  // namespace primitives::canonical
