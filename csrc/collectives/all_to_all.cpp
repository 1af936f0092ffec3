#include "collectives/chunks.hpp"
#include "collectives/collectives.hpp"
#include "collectives/symmetric.hpp"

namespace primitives {

void all_to_all(Group& group, const Call& call, const std::vector<Part>& in,
                const std::vector<Part>& out, Milliseconds timeout) {
  if (symmetric::all_to_all(group, call, in, out, timeout)) return;
  const int n = group.world_size(), me = group.rank();
  const size_t block = block_nbytes(n);
  std::vector<uint64_t> send(n), recv(n);
  size_t longest = 0, total = 0;
  for (int r = 0; r < n; r++) {
    send[r] = in[r].nbytes;
    recv[r] = out[r].nbytes;
    longest = std::max(longest, in[r].nbytes);
    total += out[r].nbytes;
  }
  const bool stream = around_caches(group, total);
  const size_t stride = block_stride(call, longest, block);
  group.start(call, call.has_counts ? send.data() : nullptr, recv.data(), timeout);
  size_t num_chunks = std::max<size_t>(1, ceil_div(longest, block));
  for (size_t i = 0; i < num_chunks; i++) {
    const size_t at = i * block;
    for (int r = 0; r < n; r++) {
      if (r == me) continue;
      const char* mine = static_cast<const char*>(in[r].data) + at;
      const size_t nbytes = chunk_nbytes(in[r].nbytes, i, block);
      stage(group, group.slot(me, group.epoch() + 1) + r * stride, mine, nbytes);
      publish(group, group.epoch() + 1, r, mine, nbytes, at);
    }
    if (i == 0) {
      group.meet();
      for (int r = 0; call.has_counts && r < n; r++) {
        for (int s = 0; s < n; s++) longest = std::max<size_t>(longest, group.sent_nbytes(r, s));
      }
      num_chunks = std::max<size_t>(1, ceil_div(longest, block));
    } else {
      group.barrier();
    }
    for (int j = 0; j < n; j++) {
      const int r = (me + j) % n;
      const char* from = r == me ? static_cast<const char*>(in[me].data) + at
                                 : group.slot(r, group.epoch()) + me * stride;
      const size_t nbytes = chunk_nbytes(out[r].nbytes, i, block);
      copy(static_cast<char*>(out[r].data) + at, from, nbytes, stream);
      verify(group, group.epoch(), r, me, static_cast<char*>(out[r].data) + at, nbytes);
    }
  }
  if (stream) stream_fence();
  group.finish();
}

}  // namespace primitives
