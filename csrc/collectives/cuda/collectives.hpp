// What a kernel does: block `block` of call.num_blocks.
#pragma once

#include "collectives/cuda/many.hpp"
#include "collectives/cuda/moves.hpp"
#include "collectives/cuda/reductions.hpp"

namespace primitives::cuda {

template <class M>
DEVICE_FN void move_block(M& m, int block, const Ranks& ranks, const Call& call) {
  const Op op = static_cast<Op>(call.op);
  const size_t slot = ranks.slot_nbytes;
  const bool all_to_some = op == Op::kAllToAll || op == Op::kGather || op == Op::kScatter;
  Block<M> b(m, block, ranks, call, all_to_some ? share_of(slot, ranks) : slot);
  if (op == Op::kAllGather) all_gather(b);
  if (all_to_some) all_to_all(b);
  if (op == Op::kBroadcast) broadcast(b);
  if (op == Op::kBarrier) b.meeting.begin();
  b.meeting.end();
}

// R: a Reducer.
template <class R, class M>
DEVICE_FN void reduce_block(M& m, int block, const Ranks& ranks, const Call& call) {
  const bool scatters = static_cast<Op>(call.op) == Op::kReduceScatter;
  const bool one_shot = ranks.world_size == 1 || static_cast<Op>(call.op) == Op::kReduce ||
                        call.in_nbytes[0] <= ranks.one_shot_nbytes;
  const size_t slot = ranks.slot_nbytes;
  Block<M> b(m, block, ranks, call, scatters ? share_of(slot, ranks) : one_shot ? slot : slot / 2);
  if (scatters) {
    reduce_scatter<R>(b);
  } else if (one_shot) {
    all_reduce_one_shot<R>(b);
  } else {
    all_reduce_two_shot<R>(b);
  }
  b.meeting.end();
}

}  // namespace primitives::cuda
