// The collectives, on memory. Buffers are this rank's; n is the world size; all ranks of the group
// call the same function with matching arguments, which the first barrier verifies. When a function
// returns, the results are there and the inputs may be changed.
//
// steps and bytes for S bytes a rank (all_gather: the shard; others: the input):
//   all_gather      S in, n S out, one barrier a 128 KiB chunk
//   reduce_scatter  S in, S / n out, one barrier a 256 KiB chunk
//   all_reduce      up to 16 KiB one barrier, every rank sums all; above, each rank sums 1 / n of a
//   chunk
//                   in a pipeline: in k | sum k - 1 | out k - 2, one barrier a chunk and two at the
//                   end
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "collectives/reduce.hpp"
#include "transport/group.hpp"

namespace primitives {

// One contiguous piece of memory per rank.
struct Part {
  void* data;
  size_t nbytes;
};

// What is summed, and how. `kernel` is null for collectives that only move bytes.
struct Reduction {
  ReduceFn kernel = nullptr;
  DType dtype = DType::kFloat32;
  ReduceOp op = ReduceOp::kNone;
  size_t itemsize = 1;
  double factor = 0;
};

// out[r] receives rank r's input. With call.has_counts the parts may differ in size.
void all_gather(Group& group, const Call& call, const void* in, size_t in_nbytes,
                const std::vector<Part>& out, Milliseconds timeout);
// out = the tree over ranks of their in[this rank].
void reduce_scatter(Group& group, const Call& call, const std::vector<Part>& in, void* out,
                    const Reduction& reduction, Milliseconds timeout);
void all_reduce(Group& group, const Call& call, void* data, size_t nbytes,
                const Reduction& reduction, Milliseconds timeout);
// out[r] receives in[this rank] of rank r.
void all_to_all(Group& group, const Call& call, const std::vector<Part>& in,
                const std::vector<Part>& out, Milliseconds timeout);
void broadcast(Group& group, const Call& call, void* data, size_t nbytes, Milliseconds timeout);
// The result is on call.root; `data` of the others is only read.
void reduce(Group& group, const Call& call, void* data, size_t nbytes, const Reduction& reduction,
            Milliseconds timeout);
// `out` is empty but on call.root.
void gather(Group& group, const Call& call, const void* in, size_t in_nbytes,
            const std::vector<Part>& out, Milliseconds timeout);
// `in` is empty but on call.root.
void scatter(Group& group, const Call& call, const std::vector<Part>& in, void* out,
             size_t out_nbytes, Milliseconds timeout);
void barrier(Group& group, Milliseconds timeout);

}  // namespace primitives
