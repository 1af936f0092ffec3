#include "collectives/chunks.hpp"
#include "collectives/collectives.hpp"
#include "collectives/symmetric.hpp"

namespace primitives {
namespace {

// Every part straight from its owner.
void read_all(Group& group, const Part& own, const std::vector<Part>& out, bool stream) {
  const int n = group.world_size(), me = group.rank();
  for (int j = 0; j < n; j++) {
    const int r = (me + j) % n;
    if (r == me) {
      copy(out[r].data, own.data, own.nbytes, stream);
    } else {
      group.read_lent(r, 0, out[r].data, out[r].nbytes);
    }
  }
  group.barrier();
}

}  // namespace

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
  const bool stream = total >= kStreamNbytes, direct = group.reads_peers();
  const size_t direct_from = n == 2 ? kDirectPairMinNbytes : kDirectNbytes;
  group.start(call, call.has_counts ? send.data() : nullptr, recv.data(), timeout);
  for (int r = 0; direct && r < n; r++) group.lend(r, in[r].data);
  size_t num_chunks = std::max<size_t>(1, ceil_div(longest, block));
  for (size_t i = 0; i < num_chunks; i++) {
    const size_t at = i * block;
    // The longest part of any pair decides for all ranks: one that long is read from its owner.
    for (int r = 0; r < n && !(direct && longest >= direct_from); r++) {
      if (r == me) continue;
      const char* mine = static_cast<const char*>(in[r].data) + at;
      const size_t nbytes = chunk_nbytes(in[r].nbytes, i, block);
      copy(group.slot(me, group.epoch() + 1) + r * block, mine, nbytes, false);
      publish(group, group.epoch() + 1, r, mine, nbytes, at);
    }
    if (i == 0) {
      group.meet();
      for (int r = 0; call.has_counts && r < n; r++) {
        for (int s = 0; s < n; s++) longest = std::max<size_t>(longest, group.sent_nbytes(r, s));
      }
      if (direct && longest >= direct_from) {
        read_all(group, in[me], out, stream);
        break;
      }
      num_chunks = std::max<size_t>(1, ceil_div(longest, block));
    } else {
      group.barrier();
    }
    for (int j = 0; j < n; j++) {
      const int r = (me + j) % n;
      const char* from = r == me ? static_cast<const char*>(in[me].data) + at
                                 : group.slot(r, group.epoch()) + me * block;
      const size_t nbytes = chunk_nbytes(out[r].nbytes, i, block);
      copy(static_cast<char*>(out[r].data) + at, from, nbytes, stream);
      verify(group, group.epoch(), r, me, static_cast<char*>(out[r].data) + at, nbytes);
    }
  }
  if (stream) stream_fence();
  group.finish();
}

}  // namespace primitives
