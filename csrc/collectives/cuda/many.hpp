// Fused all_gather and reduce_scatter of many tensors: what one block does. The steps are those of
// the plain ones, see block.hpp; buffers are streams, see table.hpp.
#pragma once

#include "collectives/cuda/elementwise.hpp"
#include "collectives/cuda/squares.hpp"

namespace primitives::cuda {

template <class M>
DEVICE_FN void all_gather_many(Block<M>& b, const Table<M>& table) {
  const Call& call = b.call;
  const Many& many = call.many;
  const int n = b.n(), me = b.me();
  const size_t in_size = many.in_itemsize, size = many.out_itemsize;
  const auto place = [&](int rank, const Piece& piece) {
    return table.out(piece.tensor) + (table.begin(rank, piece.tensor) + piece.at) * size;
  };
  play(
      b,
      [&](size_t i) {
        if (n == 1) return;
        table.each_piece(me, b.chunks.run(call.in_nbytes[me], i), size, [&](const Piece& piece) {
          char* to = b.meeting.next_slot() + piece.position * size;
          const char* from = table.in(piece.tensor) + piece.at * in_size;
          b.m.each_lane([&](int lane) { convert(b.m, lane, many, to, from, piece.numel); });
        });
      },
      [&](size_t i) {
        for (int j = 0; j < n; j++) {
          const int r = b.nth(j);
          const Run run = b.chunks.run(call.in_nbytes[r], i);
          table.each_piece(r, run, size, [&](const Piece& piece) {
            char* to = place(r, piece);
            if (r == me) {
              const char* from = table.in(piece.tensor) + piece.at * in_size;
              b.m.each_lane([&](int lane) { convert(b.m, lane, many, to, from, piece.numel); });
            } else {
              const char* from = b.meeting.slot(r) + piece.position * size;
              b.m.each_lane([&](int lane) { copy(b.m, lane, to, from, piece.numel * size); });
            }
          });
        }
      },
      [] {});
}

template <class M>
DEVICE_FN void reduce_scatter_many(Block<M>& b, const Table<M>& table) {
  const Call& call = b.call;
  const int n = b.n(), me = b.me();
  const size_t share = b.share_nbytes(), size = call.many.in_itemsize;
  const auto place = [&](int rank, const Piece& piece) {
    return table.in(piece.tensor) + (table.begin(rank, piece.tensor) + piece.at) * size;
  };
  // A rank's own part passes through staging only where it is misaligned: then all inputs of a sum
  // lie at multiples of 16 bytes.
  const auto is_staged = [&](int rank, const char* part) {
    return rank != me || reinterpret_cast<uintptr_t>(part) % kPackNbytes != 0;
  };
  play(
      b,
      [&](size_t i) {
        for (int r = 0; r < n; r++) {
          const Run run = b.chunks.run(call.in_nbytes[r], i);
          table.each_piece(r, run, size, [&](const Piece& piece) {
            char* to = b.meeting.next_slot() + r * share + piece.position * size;
            const char* from = place(r, piece);
            if (!is_staged(r, from)) return;
            b.m.each_lane([&](int lane) { copy(b.m, lane, to, from, piece.numel * size); });
          });
        }
      },
      [&](size_t i) {
        table.each_piece(me, b.chunks.run(call.in_nbytes[me], i), size, [&](const Piece& piece) {
          const char* own = place(me, piece);
          const Inputs in(
              [&](int r) {
                return is_staged(r, own) ? b.meeting.slot(r) + me * share + piece.position * size
                                         : own;
              },
              n);
          float* out = reinterpret_cast<float*>(table.out(piece.tensor)) + piece.at;
          b.m.each_lane([&](int lane) {
            visit_sum(call.dtype, [&](auto d) {
              sum_into<decltype(d)>(b.m, lane, call, n, in, out, piece.numel);
            });
          });
        });
      },
      [] {});
  if (call.many.squares != nullptr) sum_squares(b, table);
}

// Block `block` of call.num_blocks of a fused collective.
template <class M>
DEVICE_FN void many_block(M& m, int block, const Ranks& ranks, const Call& call) {
  const bool scatters = static_cast<Op>(call.op) == Op::kReduceScatterMany;
  const size_t slot = ranks.slot_nbytes;
  const size_t size = scatters ? call.many.in_itemsize : call.many.out_itemsize;
  Block<M> b(m, block, ranks, call, scatters ? share_of(slot, ranks) : slot, kLeafNumel * size);
  const Table<M> table(m, call.many, ranks.world_size);
  m.each_lane([&](int lane) {
    if (block == 0 && lane == 0) m.release(&ranks.status->uploaded, call.seq);
  });
  scatters ? reduce_scatter_many(b, table) : all_gather_many(b, table);
  b.meeting.end();
}

}  // namespace primitives::cuda
