// The types that the collectives compute with. Plain enough for device code.
#pragma once

#include <stdint.h>

namespace primitives {

enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt8,
  kUInt8,
  kInt16,
  kInt32,
  kInt64,
  kUInt16,
  kUInt32,
  kUInt64,
  kBool,
};

}  // namespace primitives
