// Sizes of what is staged at a time, measured on 4 ranks of 2 cores, and the copies around it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "collectives/reduce.hpp"
#include "transport/group.hpp"

namespace primitives {

constexpr size_t kChunkNbytes = 256 << 10;
constexpr size_t kSmallNbytes = 16 << 10;  // all_reduce: every rank sums everything

constexpr size_t kStreamNbytes = 16 << 20;  // results of all ranks that fill a last-level cache

// Bytes of one of n blocks that share a slot.
inline size_t block_nbytes(int n) {
  return std::max<size_t>(64, (kSlotNbytes / static_cast<size_t>(n)) & ~size_t{63});
}

// From one block in a slot to the next: small equal ones lie side by side, on fewer pages.
inline size_t block_stride(const Call& call, size_t longest, size_t block) {
  return call.has_counts ? block : std::min(block, (longest + 63) & ~size_t{63});
}

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// Whether results of `nbytes` a rank are written around the caches.
inline bool around_caches(Group& group, size_t nbytes, size_t limit = kStreamNbytes) {
  return group.staging_pace().streams_results(nbytes * group.world_size(), limit);
}

// The part of [0, nbytes) that chunk `index` covers.
inline size_t chunk_nbytes(size_t nbytes, size_t index, size_t chunk) {
  return index * chunk >= nbytes ? 0 : std::min(chunk, nbytes - index * chunk);
}

inline void copy(void* out, const void* in, size_t nbytes, bool stream) {
  if (nbytes == 0 || out == in) return;
  if (stream) {
    copy_stream(out, in, nbytes);
  } else {
    std::memcpy(out, in, nbytes);
  }
}

constexpr size_t kMinPacedNbytes = 4 << 10;  // of a piece: less is not worth a look at the clock

// Writes to this rank's slot what peers read after the next barrier; see [Note: staging pace].
inline void stage(Group& group, void* slot, const void* data, size_t nbytes) {
  StagingPace& pace = group.staging_pace();
  if (nbytes < kMinPacedNbytes) return copy(slot, data, nbytes, false);
  if (pace.streams()) {
    copy(slot, data, nbytes, true);
    return stream_fence();
  }
  if (!pace.watches()) return copy(slot, data, nbytes, false);
  const auto start = Clock::now();
  copy(slot, data, nbytes, false);
  pace.took(nbytes, Clock::now() - start);
}

// [Note: digests] With PRIMITIVES_CHECK=1 every run of bytes that goes through staging carries the
// digest of what its writer meant to write, computed from the writer's own memory; whoever copied
// or reduces it compares. Messages carry one in their envelope (mailbox.cpp).

// For the readers that `reader` names: one rank, or world_size() for all of them.
void publish_digest(Group& group, uint32_t epoch, int reader, const void* data, size_t nbytes,
                    size_t at);
void verify_digest(Group& group, uint32_t epoch, int writer, int reader, const void* data,
                   size_t nbytes);

// This rank stages `data`, bytes [at, at + nbytes) of its buffer, before barrier `epoch`.
inline void publish(Group& group, uint32_t epoch, int reader, const void* data, size_t nbytes,
                    size_t at) {
  if (group.checked()) [[unlikely]]
    publish_digest(group, epoch, reader, data, nbytes, at);
}

// `data` is what this rank has from `writer`: a copy, or the staged bytes themselves.
inline void verify(Group& group, uint32_t epoch, int writer, int reader, const void* data,
                   size_t nbytes) {
  if (group.checked()) [[unlikely]]
    verify_digest(group, epoch, writer, reader, data, nbytes);
}

}  // namespace primitives
