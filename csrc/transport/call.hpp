// What a rank is asking for: published by every rank at the first barrier of each collective, so
// that a difference between ranks is an error that names both sides and never a hang or a wrong
// sum.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

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

const char* op_name(Op op);
const char* reduce_op_name(ReduceOp op);

struct Call {
  Op op = Op::kNone;
  ReduceOp reduce_op = ReduceOp::kNone;
  bool has_counts = false;  // the parts may differ in size: lists of counts follow in shared memory
  char dtype[17] = "";
  int32_t root = -1;
  uint32_t itemsize = 1;
  uint64_t numel = 0;        // elements of this rank's input (all_gather: its shard)
  double factor = 0;         // kPremulSum, kReduceScatterMany
  uint64_t num_tensors = 0;  // of a fused collective
  uint64_t digest = 0;       // of how its tensors are cut

  // Factors are compared as bits: NaN equals itself, -0.0 is not 0.0.
  bool operator==(const Call& other) const {
    return op == other.op && reduce_op == other.reduce_op && has_counts == other.has_counts &&
           std::memcmp(dtype, other.dtype, sizeof dtype) == 0 && root == other.root &&
           itemsize == other.itemsize && numel == other.numel && digest == other.digest &&
           std::bit_cast<uint64_t>(factor) == std::bit_cast<uint64_t>(other.factor);
  }
};

// "all_reduce(sum, float32, numel 8)"; counts are bytes to send to each of `num_counts` ranks.
std::string describe(const Call& call, const uint64_t* counts, int num_counts);

}  // namespace primitives
