// Fused all_gather and reduce_scatter of many tensors: what one block does. The steps are those of
// the plain ones, see block.hpp; buffers are streams, see table.hpp.
#pragma once

#include "collectives/cuda/elementwise.hpp"
#include "collectives/cuda/squares.hpp"

namespace primitives::cuda {

// To the peers, instead of a chunk: where the inputs of this rank lie. (may_offer: a slot has
// room.)
template <class M>
DEVICE_FN void put_places(Block<M>& b, const Table<M>& table) {
  auto* const to = reinterpret_cast<uint64_t*>(b.meeting.next_slot());
  b.m.each_lane([&](int lane) {
    for (size_t t = lane; t < table.num_tensors(); t += b.m.num_lanes()) {
      b.m.store(to + t, table.place(t));
    }
  });
}

// After the first meeting: an input of a rank that has put its places.
template <class M>
DEVICE_FN const char* offered(Block<M>& b, const Table<M>& table, int rank, size_t tensor) {
  if (rank == b.me()) return table.in(tensor);
  const auto* const places = reinterpret_cast<const uint64_t*>(b.meeting.slot(rank));
  return at_place(b.ranks, rank, b.m.load(places + tensor));
}

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
      [&] {
        for (int j = 0; j < n; j++) {
          const int r = b.nth(j);
          table.each_piece(r, b.chunks.whole(call.in_nbytes[r]), size, [&](const Piece& piece) {
            const char* from = offered(b, table, r, piece.tensor) + piece.at * in_size;
            char* to = place(r, piece);
            b.m.each_lane([&](int lane) { convert(b.m, lane, many, to, from, piece.numel); });
          });
        }
      },
      [&] { put_places(b, table); });
}

template <class M>
DEVICE_FN void reduce_scatter_many(Block<M>& b, const Table<M>& table) {
  const Call& call = b.call;
  const int n = b.n(), me = b.me();
  const size_t share = b.share_nbytes(), size = call.many.in_itemsize;
  // In a full tensor, of what a rank sums.
  const auto offset = [&](int rank, const Piece& piece) {
    return (table.begin(rank, piece.tensor) + piece.at) * size;
  };
  const auto place = [&](int rank, const Piece& piece) {
    return table.in(piece.tensor) + offset(rank, piece);
  };
  // Of the inputs at in, for this lane.
  const auto sum = [&](const Piece& piece, const Inputs& in) {
    float* out = reinterpret_cast<float*>(table.out(piece.tensor)) + piece.at;
    b.m.each_lane([&](int lane) {
      visit_sum(call.dtype,
                [&](auto d) { sum_into<decltype(d)>(b.m, lane, call, n, in, out, piece.numel); });
    });
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
          sum(piece, Inputs(
                         [&](int r) {
                           return is_staged(r, own)
                                      ? b.meeting.slot(r) + me * share + piece.position * size
                                      : own;
                         },
                         n));
        });
      },
      [&] {
        table.each_piece(me, b.chunks.whole(call.in_nbytes[me]), size, [&](const Piece& piece) {
          sum(piece,
              Inputs([&](int r) { return offered(b, table, r, piece.tensor) + offset(me, piece); },
                     n));
        });
      },
      [&] { put_places(b, table); });
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
