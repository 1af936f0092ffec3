// What can be asked of a group, and how values are combined. Plain enough for device code.
#pragma once

#include <stdint.h>

namespace primitives {

enum class Op : uint8_t {
  kNone,
  kAllGather,
  kReduceScatter,
  kAllReduce,
  kAllToAll,
  kBroadcast,
  kReduce,
  kGather,
  kScatter,
  kBarrier,
  kSend,
  kRecv,
  kAllGatherMany,
  kReduceScatterMany,
  kEmpty,
};

enum class ReduceOp : uint8_t {
  kNone,
  kSum,
  kAvg,
  kPremulSum,
  kProduct,
  kMin,
  kMax,
  kBand,
  kBor,
  kBxor,
};

}  // namespace primitives
