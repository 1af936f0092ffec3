// What a rank is asking for: published by every rank at the first barrier of each collective, so
// that a difference between ranks is an error that names both sides and never a hang or a wrong
// sum.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "transport/operations.hpp"

namespace primitives {

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

// What one rank asks for: its call and, if that has counts, the bytes to each rank, then from each.
struct Side {
  const Call* call;
  const uint64_t* counts;
};

// Whether `n` ranks, `side(r)` each, ask for the same collective.
template <class SideOf>
bool sides_agree(int n, SideOf&& side) {
  const Side first = side(0);
  for (int r = 1; r < n; r++) {
    Call expected = *first.call;
    const Call& got = *side(r).call;
    // With lists of counts the ranks' own sizes may differ; the counts must then fit pairwise.
    if (expected.has_counts && got.has_counts) expected.numel = got.numel;
    if (!(expected == got)) return false;
  }
  for (int r = 0; first.call->has_counts && r < n; r++) {
    for (int s = 0; s < n; s++) {
      if (side(r).counts[s] != side(s).counts[n + r]) return false;
    }
  }
  return true;
}

// The error of ranks that do not agree: "collective 3 of group 'tp' differs between ranks; rank 0,
// 2: barrier at train.py:8 in step; rank 1: ..."; `sites` as in caller.hpp.
std::string describe_sides(uint64_t seq, const std::string& group, const std::vector<Side>& sides,
                           const std::vector<std::string>& sites);

}  // namespace primitives
