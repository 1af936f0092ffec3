// float16 and bfloat16 by integer code: round to nearest even, subnormals kept, one NaN.
#pragma once

#include "canonical/portable.hpp"

namespace primitives::canonical {
namespace {

CANONICAL_FN float bfloat16_to_float(uint16_t x) {
  return as_float(static_cast<int32_t>(static_cast<uint32_t>(x) << 16));
}

CANONICAL_FN uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = static_cast<uint32_t>(as_int(canonical_nan(x)));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

CANONICAL_FN float float16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t exponent = (x >> 10) & 0x1fu;
  const uint32_t mantissa = x & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return as_float(static_cast<int32_t>(static_cast<uint32_t>(as_int(magnitude)) | sign));
  }
  const uint32_t rebias = exponent == 31 ? 255u - 31u : 127u - 15u;
  return as_float(static_cast<int32_t>(sign | ((exponent + rebias) << 23) | (mantissa << 13)));
}

CANONICAL_FN uint16_t float_to_float16(float x) {
  const uint32_t bits = static_cast<uint32_t>(as_int(x));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7e00u;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14. Adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded to even.
    const float shifted = as_float(static_cast<int32_t>(magnitude)) + 0.5f;
    return static_cast<uint16_t>(sign | (static_cast<uint32_t>(as_int(shifted)) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

}  // namespace
}  // namespace primitives::canonical
