// Collectives on lists of tensors, straight between the shards of this rank and the full tensors,
// with a change of dtype on the way: what FSDP and ZeRO otherwise do with flat buffers and copies.
//
// steps: the shards of a rank are one stream, in the order of the list, cut into chunks like the
// buffer of a plain all_gather or reduce_scatter; one barrier a chunk. When all full tensors lie in
// symmetric memory: two barriers, no staging. Over several hosts: one stream for each rank,
// gathered or reduced as any other buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "collectives/reduce.hpp"
#include "transport/group.hpp"

namespace primitives {

// How the elements of each tensor of a list are cut over the ranks: runs in rank order.
class Cuts {
 public:
  // numels[tensor * world_size + rank]
  Cuts(int world_size, const std::vector<int64_t>& numels);

  size_t num_tensors() const { return num_tensors_; }
  size_t numel(int rank, size_t tensor) const {
    return starts_[row(rank) + tensor + 1] - starts_[row(rank) + tensor];
  }
  // Where the shard of `rank` begins: in its full tensor, and in the stream of the rank.
  size_t begin(int rank, size_t tensor) const { return begins_[rank * num_tensors_ + tensor]; }
  size_t start(int rank, size_t tensor) const { return starts_[row(rank) + tensor]; }
  size_t stream_numel(int rank) const { return start(rank, num_tensors_); }
  size_t longest_stream() const;
  size_t numel() const;
  // Equal for equal cuts: part of the signature of a call.
  uint64_t digest() const;

 private:
  size_t row(int rank) const { return rank * (num_tensors_ + 1); }

  size_t num_tensors_;
  int world_size_;
  std::vector<size_t> begins_, starts_;
};

struct GatherMany {
  const Cuts& cuts;
  const std::vector<const void*>& shards;
  const std::vector<void*>& fulls;
  CastFn cast;  // null: equal dtypes
  size_t shard_itemsize, full_itemsize;
  DType from, to;  // of a cast

  // out = elements [at, at + numel) of a shard, in the dtype of the full tensors.
  void convert(void* out, size_t tensor, size_t at, size_t numel) const;
};

// canonical::Kernels::sum_of_squares
using SumOfSquaresFn = void (*)(const float* x, int64_t rows, int64_t n, float* out);

struct ReduceScatterMany {
  const Cuts& cuts;
  const std::vector<const void*>& fulls;
  const std::vector<float*>& shards;
  DType dtype;  // of the full tensors
  size_t itemsize;
  float factor;
  bool accumulate;
  float* squares;  // [num_tensors] sums of squares of this rank's shards, or null
  SumOfSquaresFn sum_of_squares;
};

void all_gather_many(Group& group, Call call, const GatherMany& many, Milliseconds timeout);
void reduce_scatter_many(Group& group, Call call, const ReduceScatterMany& many,
                         Milliseconds timeout);

}  // namespace primitives
