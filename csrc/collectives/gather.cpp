// all_gather, gather, broadcast and scatter: bytes that move through the staging slots of their
// owners.
#include <numeric>

#include "collectives/chunks.hpp"
#include "collectives/collectives.hpp"
#include "collectives/symmetric.hpp"

namespace primitives {
namespace {

size_t total_nbytes(const std::vector<Part>& parts) {
  size_t total = 0;
  for (const Part& part : parts) total += part.nbytes;
  return total;
}

}  // namespace

void all_gather(Group& group, const Call& call, const void* in, size_t in_nbytes,
                const std::vector<Part>& out, Milliseconds timeout) {
  if (symmetric::all_gather(group, call, in, in_nbytes, out, timeout)) return;
  const int n = group.world_size(), me = group.rank();
  std::vector<uint64_t> send(n, in_nbytes), recv(n);
  size_t longest = 0;
  for (int r = 0; r < n; r++) {
    recv[r] = out[r].nbytes;
    longest = std::max(longest, out[r].nbytes);
  }
  const bool stream = around_caches(group, total_nbytes(out));
  const size_t num_chunks = std::max<size_t>(1, ceil_div(longest, kChunkNbytes));
  group.start(call, call.has_counts ? send.data() : nullptr, recv.data(), timeout);
  for (size_t i = 0; i < num_chunks; i++) {
    const size_t at = i * kChunkNbytes;
    const char* mine = static_cast<const char*>(in) + at;
    if (n > 1) {
      const size_t nbytes = chunk_nbytes(in_nbytes, i, kChunkNbytes);
      stage(group, group.slot(me, group.epoch() + 1), mine, nbytes);
      publish(group, group.epoch() + 1, n, mine, nbytes, at);
    }
    i == 0 ? group.meet() : group.barrier();
    for (int j = 0; j < n; j++) {
      const int r = (me + j) % n;
      const char* from = r == me ? mine : group.slot(r, group.epoch());
      const size_t nbytes = chunk_nbytes(out[r].nbytes, i, kChunkNbytes);
      copy(static_cast<char*>(out[r].data) + at, from, nbytes, stream);
      verify(group, group.epoch(), r, n, static_cast<char*>(out[r].data) + at, nbytes);
    }
  }
  if (stream) stream_fence();
  group.finish();
}

void gather(Group& group, const Call& call, const void* in, size_t in_nbytes,
            const std::vector<Part>& out, Milliseconds timeout) {
  const int n = group.world_size(), me = group.rank();
  const size_t num_chunks = std::max<size_t>(1, ceil_div(in_nbytes, kChunkNbytes));
  group.start(call, nullptr, nullptr, timeout);
  for (size_t i = 0; i < num_chunks; i++) {
    const size_t at = i * kChunkNbytes, nbytes = chunk_nbytes(in_nbytes, i, kChunkNbytes);
    const char* mine = static_cast<const char*>(in) + at;
    if (me != call.root) {
      stage(group, group.slot(me, group.epoch() + 1), mine, nbytes);
      publish(group, group.epoch() + 1, call.root, mine, nbytes, at);
    }
    i == 0 ? group.meet() : group.barrier();
    for (int r = 0; me == call.root && r < n; r++) {
      const char* from = r == me ? mine : group.slot(r, group.epoch());
      copy(static_cast<char*>(out[r].data) + at, from, nbytes, false);
      verify(group, group.epoch(), r, me, static_cast<char*>(out[r].data) + at, nbytes);
    }
  }
  group.finish();
}

void broadcast(Group& group, const Call& call, void* data, size_t nbytes, Milliseconds timeout) {
  if (symmetric::broadcast(group, call, data, nbytes, timeout)) return;
  const int n = group.world_size(), me = group.rank();
  const bool stream = around_caches(group, nbytes);
  const size_t num_chunks = std::max<size_t>(1, ceil_div(nbytes, kChunkNbytes));
  group.start(call, nullptr, nullptr, timeout);
  for (size_t i = 0; i < num_chunks; i++) {
    char* at = static_cast<char*>(data) + i * kChunkNbytes;
    const size_t size = chunk_nbytes(nbytes, i, kChunkNbytes);
    if (me == call.root) {
      stage(group, group.slot(me, group.epoch() + 1), at, size);
      publish(group, group.epoch() + 1, n, at, size, i * kChunkNbytes);
    }
    i == 0 ? group.meet() : group.barrier();
    if (me != call.root) {
      copy(at, group.slot(call.root, group.epoch()), size, stream);
      verify(group, group.epoch(), call.root, n, at, size);
    }
  }
  if (stream) stream_fence();
  group.finish();
}

void scatter(Group& group, const Call& call, const std::vector<Part>& in, void* out,
             size_t out_nbytes, Milliseconds timeout) {
  const int n = group.world_size(), me = group.rank();
  const size_t block = block_nbytes(n);
  const size_t num_chunks = std::max<size_t>(1, ceil_div(out_nbytes, block));
  group.start(call, nullptr, nullptr, timeout);
  for (size_t i = 0; i < num_chunks; i++) {
    const size_t at = i * block, nbytes = chunk_nbytes(out_nbytes, i, block);
    for (int r = 0; me == call.root && r < n; r++) {
      char* staged = group.slot(me, group.epoch() + 1) + r * block;
      if (r == me) continue;
      stage(group, staged, static_cast<const char*>(in[r].data) + at, nbytes);
      publish(group, group.epoch() + 1, r, static_cast<const char*>(in[r].data) + at, nbytes, at);
    }
    i == 0 ? group.meet() : group.barrier();
    const char* from = me == call.root ? static_cast<const char*>(in[me].data) + at
                                       : group.slot(call.root, group.epoch()) + me * block;
    copy(static_cast<char*>(out) + at, from, nbytes, false);
    verify(group, group.epoch(), call.root, me, static_cast<char*>(out) + at, nbytes);
  }
  group.finish();
}

void barrier(Group& group, Milliseconds timeout) {
  Call call;
  call.op = Op::kBarrier;
  group.start(call, nullptr, nullptr, timeout);
  group.meet();
  group.finish();
}

}  // namespace primitives
