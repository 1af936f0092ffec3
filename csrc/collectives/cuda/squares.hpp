// Sums of squares of this rank's shards, each by the tree over its elements, as on the CPU.
//
// The tree is cut at its levels: a lane sums a leaf of kLeafNumel elements, in the block that wrote
// them; when all blocks have ended, the last one sums the leaves of a group, a lane each, and then
// the groups of a tensor. A subtree of 2^k elements is one whoever sums it, so neither blocks nor
// chunks show in the bits.
#pragma once

#include "collectives/cuda/elements.hpp"
#include "collectives/cuda/table.hpp"

namespace primitives::cuda {

// The adjacent-pair tree over get(0) ... get(num - 1), at most 2^kLevels, 0 without any. Subtrees
// wait for their neighbours, one for each set bit of the number of values so far.
template <int kLevels, class Get>
DEVICE_FN float tree_in_turn(size_t num, Get get) {
  float waiting[kLevels + 1] = {};
  for (size_t i = 0; i < num; i++) {
    float sum = get(i);
    bool done = false;
    DEVICE_UNROLL
    for (int k = 0; k <= kLevels; k++) {
      if (done) continue;
      done = (i >> k & 1) == 0;
      if (done) {
        waiting[k] = sum;
      } else {
        sum = add(waiting[k], sum);
      }
    }
  }
  float sum = 0;
  bool any = false;
  DEVICE_UNROLL
  for (int k = 0; k <= kLevels; k++) {
    if ((num >> k & 1) == 0) continue;
    sum = any ? add(waiting[k], sum) : waiting[k];
    any = true;
  }
  return sum;
}

DEVICE_FN float square(float x) { return multiply(x, x); }

// Of up to kLeafNumel elements.
template <class M>
DEVICE_CALL float leaf_of_squares(M& m, const float* x, size_t numel) {
  static_assert(kLeafNumel == 1 << 8);
  if (reinterpret_cast<uintptr_t>(x) % kPackNbytes != 0 || numel % 4 != 0) {
    return tree_in_turn<8>(numel, [&](size_t i) { return square(m.load(x + i)); });
  }
  return tree_in_turn<6>(numel / 4, [&](size_t i) {
    const Pack pack = m.load(reinterpret_cast<const Pack*>(x) + i);
    float four[4];
    memcpy(four, &pack, sizeof four);
    return add(add(square(four[0]), square(four[1])), add(square(four[2]), square(four[3])));
  });
}

// After all chunks of this block. The parts of blocks begin at multiples of kLeafNumel elements.
template <class M>
DEVICE_CALL void sum_squares(Block<M>& b, const Table<M>& table) {
  const Many& many = b.call.many;
  const int me = b.me();
  b.m.sync();  // the values of the other lanes are there
  table.each_piece(
      me, b.chunks.whole(b.call.in_nbytes[me]), many.in_itemsize, [&](const Piece& piece) {
        const size_t end = piece.at + piece.numel;
        const float* shard = reinterpret_cast<const float*>(table.out(piece.tensor));
        float* leaves = many.partials + table.group(piece.tensor) * kLeavesPerGroup;
        b.m.each_lane([&](int lane) {
          const size_t step = b.m.num_lanes() * kLeafNumel;
          for (size_t at = piece.at + lane * kLeafNumel; at < end; at += step) {
            const float sum = leaf_of_squares(b.m, shard + at, smaller(kLeafNumel, end - at));
            b.m.store(leaves + at / kLeafNumel, sum);
          }
        });
      });
  if (!b.meeting.is_last()) return;
  const size_t num_tensors = table.num_tensors(), num_lanes = b.m.num_lanes();
  b.m.each_lane([&](int lane) {
    for (size_t g = lane; g < table.group(num_tensors); g += num_lanes) {
      const size_t t = table.tensor_of_group(g);
      const size_t before = (g - table.group(t)) * kGroupNumel;
      const size_t numel = smaller(kGroupNumel, table.numel(me, t) - before);
      float* leaves = many.partials + g * kLeavesPerGroup;
      const float sum = tree_in_turn<8>((numel + kLeafNumel - 1) / kLeafNumel,
                                        [&](size_t i) { return b.m.load(leaves + i); });
      b.m.store(leaves, sum);
    }
  });
  b.m.sync();
  b.m.each_lane([&](int lane) {
    for (size_t t = lane; t < num_tensors; t += num_lanes) {
      const size_t first = table.group(t);
      const float sum = tree_in_turn<32>(table.group(t + 1) - first, [&](size_t i) {
        return b.m.load(many.partials + (first + i) * kLeavesPerGroup);
      });
      b.m.store(many.squares + t, canonical::canonical_nan(sum));
    }
  });
}

}  // namespace primitives::cuda
