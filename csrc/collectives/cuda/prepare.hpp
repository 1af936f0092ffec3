// Checks a call before it is launched, and chooses its number of blocks: host code.
#pragma once

#include <stdio.h>

#include <initializer_list>

#include "collectives/cuda/collectives.hpp"

namespace primitives::cuda {

constexpr int kNumLanes = 512;  // of a block

inline bool is_reduction(Op op) {
  return op == Op::kAllReduce || op == Op::kReduceScatter || op == Op::kReduce;
}

// The error of a fused call, or "".
inline const char* check_many(const Call& call, int me) {
  const Many& many = call.many;
  const auto is_summed = [](uint8_t dtype) {
    return dtype == static_cast<uint8_t>(DType::kFloat32) ||
           dtype == static_cast<uint8_t>(DType::kFloat16) ||
           dtype == static_cast<uint8_t>(DType::kBFloat16);
  };
  if (many.table == nullptr || many.num_tensors == 0) return "many: expected a table of tensors";
  for (const uint8_t itemsize : {many.in_itemsize, many.out_itemsize}) {
    if (itemsize == 0 || itemsize > kPackNbytes || kPackNbytes % itemsize != 0) {
      return "itemsize: expected 1, 2, 4, 8 or 16";
    }
  }
  if (static_cast<Op>(call.op) == Op::kAllGatherMany) {
    const bool casts = many.from != many.to;
    if (casts && (!is_summed(many.from) || !is_summed(many.to))) {
      return "from, to: expected equal dtypes, or float32, float16 and bfloat16";
    }
    return !casts && many.in_itemsize != many.out_itemsize ? "itemsize: expected equal ones" : "";
  }
  if (!is_summed(call.dtype)) return "dtype: expected float32, float16 or bfloat16";
  const bool needs_room = many.squares != nullptr && call.in_nbytes[me] > 0;
  return needs_room && many.partials == nullptr ? "partials: null, with squares" : "";
}

// Why the input of this call may not be offered to the peers, or "".
inline const char* check_offer(const Ranks& ranks, const Call& call) {
  const Op op = static_cast<Op>(call.op);
  if (is_fused(op)) {
    return may_offer(ranks, call)
               ? ""
               : "place: expected none for a fused call that is small or has many tensors";
  }
  const bool is_small = longest_part(ranks, call) < ranks.direct_nbytes;
  if (!may_offer(ranks, call) || is_small || call.in_nbytes[0] == 0) {
    return "place: expected none for a call that is rooted, without a first part, or small";
  }
  if (op == Op::kAllReduce && call.in[0] != call.out[0]) {
    return "place: expected none for an all_reduce into other memory";
  }
  return "";
}

// The error, or "" with call->num_blocks set. The number must be the same on all ranks, so it
// follows from what they must agree on.
inline const char* prepare(const Ranks& ranks, Call* call) {
  const int n = ranks.world_size, me = ranks.rank;
  if (n < 1 || n > kMaxRanks) return "world_size: expected 1 to 8";
  if (me < 0 || me >= n) return "rank: expected 0 to world_size - 1";
  if (ranks.slot_nbytes == 0 || ranks.slot_nbytes % PRIMITIVES_CUDA_SLOT_GRAIN != 0) {
    return "slot_nbytes: expected a multiple of PRIMITIVES_CUDA_SLOT_GRAIN";
  }
  if (ranks.max_blocks < 1 || ranks.max_blocks > kMaxBlocks) {
    return "max_blocks: expected 1 to PRIMITIVES_CUDA_MAX_BLOCKS";
  }
  if (ranks.block_nbytes == 0) return "block_nbytes: expected more than 0";
  const Op op = static_cast<Op>(call->op);
  const bool reduces = is_reduction(op);
  const bool all_to_some = op == Op::kAllToAll || op == Op::kGather || op == Op::kScatter;
  const bool many_in = op == Op::kAllGather || all_to_some || op == Op::kReduceScatter;
  const bool many_out = op == Op::kAllGather || all_to_some;
  const bool rooted =
      op == Op::kBroadcast || op == Op::kReduce || op == Op::kGather || op == Op::kScatter;
  const bool equal_in = !all_to_some || !call->has_counts;
  if (!reduces && !many_in && op != Op::kBroadcast && op != Op::kBarrier && !is_fused(op)) {
    return "op: expected a collective";
  }
  if (is_fused(op)) {
    if (const char* error = check_many(*call, me); *error != 0) return error;
  }
  if (call->has_counts && !many_out) return "has_counts: expected none for this op";
  if (rooted ? call->root < 0 || call->root >= n : call->root != -1) {
    return "root: expected a rank for a rooted op, else -1";
  }
  uint64_t total = 0;
  for (int r = 0; r < n; r++) {
    if (call->in_nbytes[r] > 0 && call->in[r] == nullptr && !is_fused(op)) {
      return "in: null, with bytes";
    }
    if (call->out_nbytes[r] > 0 && call->out[r] == nullptr) return "out: null, with bytes";
    if (many_in && equal_in && call->in_nbytes[r] != call->in_nbytes[0]) {
      return "in_nbytes: expected parts of equal size";
    }
    if (many_out && !call->has_counts && call->out_nbytes[r] != call->in_nbytes[0]) {
      return "out_nbytes: expected parts of the size of the input's";
    }
    total += op == Op::kAllGather ? call->out_nbytes[r] : call->in_nbytes[r];
  }
  if (many_out && call->out_nbytes[me] != call->in_nbytes[me]) {
    return "out_nbytes: expected the size of this rank's own part";
  }
  if (!many_out && op != Op::kBarrier && !is_fused(op) &&
      call->out_nbytes[0] != call->in_nbytes[0]) {
    return "out_nbytes: expected the size of the input's part";
  }
  if (reduces) {
    const DType dtype = static_cast<DType>(call->dtype);
    size_t itemsize = 0;
    visit_type(dtype, [&](auto d) { itemsize = sizeof(typename decltype(d)::Store); });
    if (itemsize == 0 || !has_meaning(static_cast<ReduceOp>(call->reduce_op), dtype)) {
      return "reduce_op: it has no meaning for the dtype";
    }
    for (int r = 0; r < n; r++) {
      if ((call->in_nbytes[r] | reinterpret_cast<uintptr_t>(call->in[r]) |
           reinterpret_cast<uintptr_t>(call->out[r])) %
              itemsize !=
          0) {
        return "in, out: expected whole elements at multiples of their size";
      }
    }
  }
  if (call->place != kNotSymmetric && is_fused(op)) {
    if (call->place != 0) return "place: expected 0 for a fused call, whose table has places";
    if (const char* error = check_offer(ranks, *call); *error != 0) return error;
  } else if (call->place != kNotSymmetric) {
    const uint64_t chunk = call->place >> PRIMITIVES_CUDA_CHUNK_SHIFT;
    if (chunk >= PRIMITIVES_CUDA_MAX_CHUNKS || ranks.chunks[me][chunk] == nullptr ||
        call->in[0] != at_place(ranks, me, call->place)) {
      return "place: expected where in[0] lies in this rank's symmetric memory";
    }
    if (const char* error = check_offer(ranks, *call); *error != 0) return error;
  }
  if (all_to_some && call->has_counts) total = UINT64_MAX / 2;  // nobody knows it
  const uint64_t wanted =
      larger<uint64_t>(1, (total + ranks.block_nbytes - 1) / ranks.block_nbytes);
  call->num_blocks = static_cast<int32_t>(smaller<uint64_t>(wanted, ranks.max_blocks));
  return "";
}

inline int max_blocks(int num_multiprocessors, int ranks_on_device, int num_groups) {
  // One block a multiprocessor: a kernel of kNumLanes threads finds room beside any other of ours.
  const int share = num_multiprocessors / (ranks_on_device * num_groups);
  return smaller(share, kMaxBlocks);
}

}  // namespace primitives::cuda
