// The tensors of a fused call, as words of 64 bits in memory of the device.
//
// [Note: device streams] The shards of a rank are one stream, in the order of the list, cut into
// chunks like the buffer of a plain collective. As on the CPU, but here a shard begins at a
// multiple of the smallest power of two that holds it, between kAlignNumel and kLeafNumel elements:
// so staging is aligned for 16-byte accesses, and a stream that is cut at multiples of kLeafNumel
// cuts no leaf of a sum of squares. What lies between shards is neither read nor written.
//
// For T tensors and n ranks, in elements:
//   starts  [n][T + 1]  of each shard in the stream of its rank; last, where the stream ends
//   begins  [n + 1][T]  of each shard in its full tensor; last, the numel of the full tensor
//   ins     [T]         addresses: shards of an all_gather, full tensors of a reduce_scatter
//   outs    [T]         addresses: the others
//   places  [T]         of ins in this rank's symmetric memory, when all of them lie there
//   groups  [T + 1]     of kGroupNumel elements, of the shards of this rank, before each tensor
// The room for partial sums of squares has kLeavesPerGroup floats for each group.
#pragma once

#include "collectives/cuda/block.hpp"

namespace primitives::cuda {

using Many = primitives_cuda_many;
constexpr size_t kAlignNumel = 16;
constexpr size_t kLeafNumel = 256;
constexpr size_t kLeavesPerGroup = 256;
constexpr size_t kGroupNumel = kLeafNumel * kLeavesPerGroup;

// Where the words of a table are.
struct TableLayout {
  size_t n, num_tensors;

  HOST_DEVICE_FN size_t starts(size_t rank) const { return rank * (num_tensors + 1); }
  HOST_DEVICE_FN size_t begins(size_t rank) const { return starts(n) + rank * num_tensors; }
  HOST_DEVICE_FN size_t ins() const { return begins(n + 1); }
  HOST_DEVICE_FN size_t outs() const { return ins() + num_tensors; }
  HOST_DEVICE_FN size_t places() const { return outs() + num_tensors; }
  HOST_DEVICE_FN size_t groups() const { return places() + num_tensors; }
  HOST_DEVICE_FN size_t num_words() const { return groups() + num_tensors + 1; }
};

// The part of a shard that lies in a run of a stream, in elements.
struct Piece {
  size_t tensor;
  size_t at, numel;  // in the shard
  size_t position;   // from where the run begins
};

template <class M>
class Table {
 public:
  DEVICE_FN Table(M& m, const Many& many, int n)
      : m_(m), words_(many.table), of_{static_cast<size_t>(n), many.num_tensors} {}

  DEVICE_FN size_t num_tensors() const { return of_.num_tensors; }
  DEVICE_FN size_t begin(int rank, size_t tensor) const { return word(of_.begins(rank) + tensor); }
  DEVICE_FN size_t numel(int rank, size_t tensor) const {
    return begin(rank + 1, tensor) - begin(rank, tensor);
  }
  DEVICE_FN char* in(size_t tensor) const {
    return reinterpret_cast<char*>(word(of_.ins() + tensor));
  }
  DEVICE_FN char* out(size_t tensor) const {
    return reinterpret_cast<char*>(word(of_.outs() + tensor));
  }
  DEVICE_FN uint64_t place(size_t tensor) const { return word(of_.places() + tensor); }
  DEVICE_FN size_t group(size_t tensor) const { return word(of_.groups() + tensor); }
  DEVICE_FN size_t tensor_of_group(size_t group) const { return last_up_to(of_.groups(), group); }

  // visit(Piece) for all that lies in `run`, bytes of the stream of a rank.
  template <class F>
  DEVICE_FN void each_piece(int rank, Run run, size_t itemsize, F visit) const {
    const size_t from = run.at / itemsize, to = from + run.nbytes / itemsize;
    if (from == to) return;
    const size_t starts = of_.starts(rank);
    for (size_t t = last_up_to(starts, from); t < of_.num_tensors; t++) {
      const size_t start = word(starts + t);
      if (start >= to) return;
      const size_t first = larger(from, start), end = smaller(to, start + numel(rank, t));
      if (first < end) visit(Piece{t, first - start, end - first, first - from});
    }
  }

 private:
  DEVICE_FN uint64_t word(size_t i) const { return m_.load(words_ + i); }

  // The last tensor that begins at or before x, in a row of num_tensors + 1 that begins with 0.
  DEVICE_FN size_t last_up_to(size_t row, size_t x) const {
    size_t low = 0, high = of_.num_tensors;
    while (high - low > 1) {
      const size_t middle = low + (high - low) / 2;
      (word(row + middle) <= x ? low : high) = middle;
    }
    return low;
  }

  M& m_;
  const uint64_t* words_;
  const TableLayout of_;
};

// Writes all words but addresses and places. numel(rank, tensor): of each shard. Host code.
template <class NumelOf>
void write_cuts(uint64_t* words, const TableLayout& of, int me, NumelOf numel) {
  for (size_t t = 0; t < of.num_tensors; t++) words[of.begins(0) + t] = 0;
  for (size_t r = 0; r < of.n; r++) {
    size_t at = 0;
    for (size_t t = 0; t < of.num_tensors; t++) {
      const size_t shard = numel(static_cast<int>(r), t);
      size_t multiple = kAlignNumel;
      while (multiple < shard && multiple < kLeafNumel) multiple *= 2;
      if (shard > 0) at = (at + multiple - 1) / multiple * multiple;
      words[of.starts(r) + t] = at;
      words[of.begins(r + 1) + t] = words[of.begins(r) + t] + shard;
      at += shard;
    }
    words[of.starts(r) + of.num_tensors] = at;
  }
  words[of.groups()] = 0;
  for (size_t t = 0; t < of.num_tensors; t++) {
    const size_t num = (numel(me, t) + kGroupNumel - 1) / kGroupNumel;
    words[of.groups() + t + 1] = words[of.groups() + t] + num;
  }
}

}  // namespace primitives::cuda
