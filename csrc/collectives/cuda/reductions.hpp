// reduce_scatter and all_reduce, see block.hpp; R is a Reducer.
#pragma once

#include "collectives/cuda/block.hpp"
#include "collectives/cuda/reducer.hpp"

namespace primitives::cuda {

template <class R, class M>
DEVICE_FN void reduce_scatter(Block<M>& b) {
  const Call& call = b.call;
  const int n = b.n(), me = b.me();
  const size_t share = b.share_nbytes(), nbytes = call.in_nbytes[me];
  play(
      b,
      [&](size_t i) {
        const Run run = b.chunks.run(nbytes, i);
        b.m.each_lane([&](int lane) {
          for (int r = 0; r < n; r++) {
            if (r == me) continue;
            copy(b.m, lane, b.meeting.next_slot() + r * share, call.in[r] + run.at, run.nbytes);
          }
        });
      },
      [&](size_t i) {
        const Run run = b.chunks.run(nbytes, i);
        const Inputs in(
            [&](int r) { return r == me ? call.in[me] + run.at : b.meeting.slot(r) + me * share; },
            n);
        const Outputs out{{call.out[0] + run.at}};
        b.m.each_lane([&](int lane) { R::run(b.m, lane, call, n, in, out, 1, run.nbytes); });
      },
      [&] {
        const Run run = b.chunks.whole(nbytes);
        const Inputs in([&](int r) { return b.meeting.offer(r) + run.at; }, n);
        const Outputs out{{call.out[0] + run.at}};
        b.m.each_lane([&](int lane) { R::run(b.m, lane, call, n, in, out, 1, run.nbytes); });
      });
}

// Every rank sums everything: the same tree, so the same bits everywhere. reduce: only the root.
template <class R, class M>
DEVICE_FN void all_reduce_one_shot(Block<M>& b) {
  const Call& call = b.call;
  const int n = b.n(), me = b.me();
  const bool sums = static_cast<Op>(call.op) != Op::kReduce || me == call.root;
  auto put = [&](size_t i) {
    const Run run = b.chunks.run(call.in_nbytes[0], i);
    if (n == 1) return;
    b.m.each_lane(
        [&](int lane) { copy(b.m, lane, b.meeting.next_slot(), call.in[0] + run.at, run.nbytes); });
  };
  put(0);
  if (!b.meeting.begin()) return;
  const size_t num_chunks = b.chunks.num(call.in_nbytes[0]);
  for (size_t i = 0;; i++) {
    if (i + 1 < num_chunks) put(i + 1);
    const Run run = b.chunks.run(call.in_nbytes[0], i);
    if (sums) {
      const Inputs in([&](int r) { return r == me ? call.in[0] + run.at : b.meeting.slot(r); }, n);
      const Outputs out{{call.out[0] + run.at}};
      b.m.each_lane([&](int lane) { R::run(b.m, lane, call, n, in, out, 1, run.nbytes); });
    }
    if (i + 1 == num_chunks || !b.meeting.meet()) return;
  }
}

// The part of a run that `rank` sums.
DEVICE_FN Run slice_of(size_t nbytes, int rank, int n) {
  const size_t part = round_up((nbytes + n - 1) / n, kGrainNbytes);
  const size_t at = smaller(nbytes, part * rank);
  return {at, smaller(part, nbytes - at)};
}

// All inputs in symmetric memory, and outputs of their own: each rank reads its slice of all, and
// writes the sums to all.
template <class R, class M>
DEVICE_FN void all_reduce_direct(Block<M>& b) {
  const int n = b.n();
  const Run run = b.chunks.whole(b.call.in_nbytes[0]);
  const Run mine = slice_of(run.nbytes, b.me(), n);
  Outputs out;
  const Inputs in([&](int r) { return out.at[r] = b.meeting.offer(r) + run.at + mine.at; }, n);
  b.m.each_lane([&](int lane) { R::run(b.m, lane, b.call, n, in, out, n, mine.nbytes); });
}

// In step s, chunk s goes in, this rank sums its slice of chunk s - 1, and the sums of chunk s - 2
// come out. A slot holds the input in its first half, the sums in its second. A rank's own slice
// never passes through staging on its way in.
template <class R, class M>
DEVICE_FN void all_reduce_two_shot(Block<M>& b) {
  const Call& call = b.call;
  const int n = b.n(), me = b.me();
  const size_t half = b.share_nbytes(), nbytes = call.in_nbytes[0];
  auto put = [&](size_t i) {
    const Run run = b.chunks.run(nbytes, i);
    b.m.each_lane([&](int lane) {
      for (int r = 0; r < n; r++) {
        const Run slice = slice_of(run.nbytes, r, n);
        const char* from = call.in[0] + run.at + slice.at;
        if (r != me) copy(b.m, lane, b.meeting.next_slot() + slice.at, from, slice.nbytes);
      }
    });
  };
  auto sum = [&](size_t i) {
    const Run run = b.chunks.run(nbytes, i);
    const Run mine = slice_of(run.nbytes, me, n);
    const Inputs in(
        [&](int r) { return (r == me ? call.in[0] + run.at : b.meeting.slot(r)) + mine.at; }, n);
    const Outputs out{{b.meeting.next_slot() + half + mine.at, call.out[0] + run.at + mine.at}};
    b.m.each_lane([&](int lane) { R::run(b.m, lane, call, n, in, out, 2, mine.nbytes); });
  };
  auto take = [&](size_t i) {
    const Run run = b.chunks.run(nbytes, i);
    b.m.each_lane([&](int lane) {
      for (int j = 1; j < n; j++) {
        const int r = b.nth(j);
        const Run slice = slice_of(run.nbytes, r, n);
        const char* from = b.meeting.slot(r) + half + slice.at;
        copy(b.m, lane, call.out[0] + run.at + slice.at, from, slice.nbytes);
      }
    });
  };
  if (!meet_first(b, put, [&] { all_reduce_direct<R>(b); })) return;
  const size_t num_chunks = b.chunks.num(nbytes);
  for (size_t step = 1;; step++) {
    if (step >= 2) take(step - 2);
    if (step < num_chunks) put(step);
    if (step <= num_chunks) sum(step - 1);
    if (step > num_chunks || !b.meeting.meet()) return;
  }
}

}  // namespace primitives::cuda
