// The device code of the collectives: what one block does. They are those of collectives.hpp on the
// CPU, and their results have the same bits.
//
// steps for S bytes a rank (all_gather: the shard; others: the input), each block on its own part:
//   all_gather      S in, n S out                 one meeting a chunk (a slot)
//   reduce_scatter  S in, S / n out               one meeting a chunk (a slot / n)
//   all_to_all      S in, S out                   as reduce_scatter; gather and scatter are ones
//                                                 in which most parts are empty
//   broadcast       S in on the root, S out       as all_gather
//   all_reduce      up to one_shot_nbytes: S in, every rank sums all, one meeting a chunk; above:
//   each
//                   rank sums 1 / n of a chunk (half a slot), in a pipeline as on the CPU:
//                   in k | sum k - 1 | out k - 2
//   reduce          S in, S out on the root       as the one-shot all_reduce
//   fused           as all_gather and reduce_scatter, on streams of many tensors: see many.hpp
// When every rank's input lies in symmetric memory, of at least direct_nbytes (with counts: its
// longest part; fused: the longest stream, and all of its tensors): two meetings, no staging; each
// rank reads its peers' inputs in place, all_reduce also writes its sums into them.
#pragma once

#include "collectives/cuda/exchange.hpp"

namespace primitives::cuda {

constexpr size_t kGrainNbytes =
    128;  // parts of blocks begin at multiples, from their buffer's begin

// Whether ranks may offer their inputs to their peers: the same on all ranks.
HOST_DEVICE_FN bool may_offer(const Ranks& ranks, const Call& call) {
  const Op op = static_cast<Op>(call.op);
  if (is_fused(op)) {
    const size_t places_nbytes = call.many.num_tensors * sizeof(uint64_t);
    return longest_part(ranks, call) >= ranks.direct_nbytes && places_nbytes <= ranks.slot_nbytes;
  }
  if (call.has_counts) return op == Op::kAllGather || op == Op::kAllToAll;
  const bool one_shot =
      op == Op::kReduce || (op == Op::kAllReduce && call.in_nbytes[0] <= ranks.one_shot_nbytes);
  return !one_shot && call.in_nbytes[0] >= ranks.direct_nbytes;
}

struct Run {
  size_t at, nbytes;
};

// Which bytes of a buffer of `nbytes` a block works on, and its chunks.
struct Chunks {
  int block, num_blocks;
  size_t chunk_nbytes;
  size_t grain_nbytes;

  DEVICE_FN size_t part_nbytes(size_t nbytes) const {
    return round_up((nbytes + num_blocks - 1) / num_blocks, grain_nbytes);
  }
  DEVICE_FN Run whole(size_t nbytes) const {
    const size_t part = part_nbytes(nbytes), at = smaller(nbytes, part * block);
    return {at, smaller(part, nbytes - at)};
  }
  // Of the longest buffer of the call; the same on all ranks, also for blocks without bytes.
  DEVICE_FN size_t num(size_t longest) const {
    return larger<size_t>(1, (part_nbytes(longest) + chunk_nbytes - 1) / chunk_nbytes);
  }
  DEVICE_FN Run run(size_t nbytes, size_t index) const {
    const Run all = whole(nbytes);
    const size_t from = smaller(all.nbytes, index * chunk_nbytes);
    return {all.at + from, smaller(chunk_nbytes, all.nbytes - from)};
  }
};

// What each rank gets of a slot.
DEVICE_FN size_t share_of(size_t slot_nbytes, const Ranks& ranks) {
  return slot_nbytes / ranks.world_size / kPackNbytes * kPackNbytes;
}

// The call, as one block plays it.
template <class M>
struct Block {
  M& m;
  const Ranks& ranks;
  const Call& call;
  Meeting<M> meeting;
  Chunks chunks;

  DEVICE_FN Block(M& m, int block, const Ranks& ranks, const Call& call, size_t chunk_nbytes,
                  size_t grain_nbytes = kGrainNbytes)
      : m(m),
        ranks(ranks),
        call(call),
        meeting(m, block, ranks, call),
        chunks{block, call.num_blocks, chunk_nbytes, grain_nbytes} {}

  DEVICE_FN int n() const { return ranks.world_size; }
  DEVICE_FN int me() const { return ranks.rank; }
  DEVICE_FN size_t share_nbytes() const { return chunks.chunk_nbytes; }

  // The j-th rank from this one on: the ranks do not all read the same peer at a time.
  DEVICE_FN int nth(int j) const { return me() + j < n() ? me() + j : me() + j - n(); }
};

struct Nothing {
  DEVICE_FN void operator()() const {}
};

// put(0), and the first meeting. False when there is nothing left to do: the group has failed, or
// all ranks had offered their inputs and direct() has done it. offer(): what the peers need for
// that besides the letter.
template <class M, class Put, class Direct, class Offer = Nothing>
DEVICE_FN bool meet_first(Block<M>& b, Put put, Direct direct, Offer offer = {}) {
  if (b.meeting.has_offered()) {
    offer();
  } else {
    put(size_t{0});
  }
  if (!b.meeting.begin()) return false;
  const int num_offers = may_offer(b.ranks, b.call) ? b.meeting.num_offers() : 0;
  if (num_offers == 0) return true;
  if (num_offers == b.n()) {
    direct();
    b.meeting.count_direct();
    b.meeting.meet();  // nobody needs this rank's buffers any more
    return false;
  }
  put(size_t{0});  // those who offered stage late, and all meet again
  return b.meeting.meet();
}

// put(i): chunk i of this rank's input to meeting.next_slot(); take(i): from all slots to the
// outputs; direct(): the whole part of this block, from the peers' inputs.
template <class M, class Put, class Take, class Direct, class Offer = Nothing>
DEVICE_FN void play(Block<M>& b, Put put, Take take, Direct direct, Offer offer = {}) {
  if (!meet_first(b, put, direct, offer)) return;
  const size_t num_chunks = b.chunks.num(b.meeting.longest());
  for (size_t i = 0;; i++) {
    if (i + 1 < num_chunks) put(i + 1);
    take(i);
    if (i + 1 == num_chunks || !b.meeting.meet()) return;
  }
}

}  // namespace primitives::cuda
