// [Note: peer memory] Where the kernel lets every rank read every other's memory (process_vm_readv,
// which containers and ptrace settings may forbid), large parts go straight from the owner's input
// to the reader: one copy instead of two through staging. The owner may change its input only after
// a trailing barrier. With payload digests everything is staged.
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "transport/group.hpp"

namespace primitives {
namespace {

ssize_t read_memory(pid_t pid, uint64_t from, void* to, size_t nbytes) {
  const iovec here{to, nbytes}, there{reinterpret_cast<void*>(from), nbytes};
  return process_vm_readv(pid, &here, 1, &there, 1, 0);
}

}  // namespace

// Tells the others whether this rank can read them all; they look at their first meet().
void Group::probe_peers() {
  bool all = true;
  for (int r = 0; r < world_size() && all; r++) {
    const RankLine& of = line(r);
    ProcessId found{};
    all = watched_[r] &&
          read_memory(of.pid, of.self_address, &found, sizeof found) == sizeof found &&
          found.pid == of.pid && found.start_time == of.start_time;
  }
  line(rank()).reads_peers.store(all, std::memory_order_relaxed);
}

void Group::read_lent(int rank, size_t at, void* out, size_t nbytes) {
  const uint64_t from = record(rank, call_epoch_).lent(world_size())[this->rank()] + at;
  for (size_t done = 0; done < nbytes;) {
    const ssize_t got =
        read_memory(line(rank).pid, from + done, static_cast<char*>(out) + done, nbytes - done);
    if (got > 0) {
      done += static_cast<size_t>(got);
    } else if (got < 0 && errno != EINTR) {
      const int error = errno;
      if (error == ESRCH || has_gone(rank)) check_missing({rank}, rank, deadline_, here());
      fail(Failure::kOther,
           here() + " cannot read the input of " + named(rank) + ": " + std::strerror(error));
    }
  }
}

}  // namespace primitives
