// all_gather, all_to_all and broadcast, see block.hpp.
#pragma once

#include "collectives/cuda/block.hpp"

namespace primitives::cuda {

// What every rank has for this one, from where it lies.
template <class M>
DEVICE_FN void copy_offers(Block<M>& b, int lane) {
  for (int j = 0; j < b.n(); j++) {
    const int r = b.nth(j);
    const Run run = b.chunks.whole(b.call.out_nbytes[r]);
    if (run.nbytes == 0) continue;
    copy(b.m, lane, b.call.out[r] + run.at, b.meeting.offer(r) + run.at, run.nbytes);
  }
}

template <class M>
DEVICE_FN void all_gather(Block<M>& b) {
  const Call& call = b.call;
  const int n = b.n(), me = b.me();
  play(
      b,
      [&](size_t i) {
        if (n == 1) return;
        const Run run = b.chunks.run(call.in_nbytes[me], i);
        b.m.each_lane([&](int lane) {
          copy(b.m, lane, b.meeting.next_slot(), call.in[me] + run.at, run.nbytes);
        });
      },
      [&](size_t i) {
        b.m.each_lane([&](int lane) {
          for (int j = 0; j < n; j++) {
            const int r = b.nth(j);
            const Run run = b.chunks.run(call.out_nbytes[r], i);
            const char* from = r == me ? call.in[me] + run.at : b.meeting.slot(r);
            copy(b.m, lane, call.out[r] + run.at, from, run.nbytes);
          }
        });
      },
      [&] { b.m.each_lane([&](int lane) { copy_offers(b, lane); }); });
}

template <class M>
DEVICE_FN void all_to_all(Block<M>& b) {
  const Call& call = b.call;
  const int n = b.n(), me = b.me();
  const size_t share = b.share_nbytes();
  play(
      b,
      [&](size_t i) {
        b.m.each_lane([&](int lane) {
          for (int r = 0; r < n; r++) {
            const Run run = b.chunks.run(call.in_nbytes[r], i);
            if (r == me) continue;
            copy(b.m, lane, b.meeting.next_slot() + r * share, call.in[r] + run.at, run.nbytes);
          }
        });
      },
      [&](size_t i) {
        b.m.each_lane([&](int lane) {
          for (int j = 0; j < n; j++) {
            const int r = b.nth(j);
            const Run run = b.chunks.run(call.out_nbytes[r], i);
            const char* from = r == me ? call.in[me] + run.at : b.meeting.slot(r) + me * share;
            copy(b.m, lane, call.out[r] + run.at, from, run.nbytes);
          }
        });
      },
      [&] { b.m.each_lane([&](int lane) { copy_offers(b, lane); }); });
}

template <class M>
DEVICE_FN void broadcast(Block<M>& b) {
  const Call& call = b.call;
  const bool is_root = b.me() == call.root;
  auto copy_run = [&](char* to, const char* from, size_t nbytes) {
    b.m.each_lane([&](int lane) { copy(b.m, lane, to, from, nbytes); });
  };
  play(
      b,
      [&](size_t i) {
        const Run run = b.chunks.run(call.in_nbytes[0], i);
        if (is_root && b.n() > 1) copy_run(b.meeting.next_slot(), call.in[0] + run.at, run.nbytes);
      },
      [&](size_t i) {
        const Run run = b.chunks.run(call.in_nbytes[0], i);
        const char* from = is_root ? call.in[0] + run.at : b.meeting.slot(call.root);
        copy_run(call.out[0] + run.at, from, run.nbytes);
      },
      [&] {
        const Run run = b.chunks.whole(call.in_nbytes[0]);
        const char* from = is_root ? call.in[0] : b.meeting.offer(call.root);
        copy_run(call.out[0] + run.at, from + run.at, run.nbytes);
      });
}

}  // namespace primitives::cuda
