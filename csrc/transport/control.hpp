// The layout of a segment: control block | call records | digests | staging slots | point-to-point
// ring heads | boards of devices | rings | symmetric heaps.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "transport/call.hpp"
#include "transport/caller.hpp"
#include "transport/device_sharing.hpp"
#include "transport/shared_text.hpp"

namespace primitives {

constexpr size_t kSlotNbytes = 512 << 10;  // two per rank
constexpr size_t kRingNbytes = 256 << 10;  // one per ordered pair of ranks, backed on first use
constexpr size_t kHeapNbytes = size_t{64} << 30;  // one per rank, mapped and backed on first use
// From one heap to the next. Equal tensors of the ranks must not lie at addresses that agree in all
// their lower bits: caches that guess a way from these (AMD's) would keep only one of them.
constexpr size_t kHeapStride = kHeapNbytes + 4096;

enum class RankState : uint32_t { kAbsent = 0, kAttached = 1, kClosed = 2 };

// One rank's news. The first 64 bytes are read by every waiter, the rest rarely.
struct alignas(64) RankLine {
  std::atomic<uint32_t> epoch;   // last barrier this rank arrived at
  std::atomic<int32_t> cpu;      // where it arrived
  std::atomic<uint32_t> state;   // RankState
  std::atomic<uint32_t> op;      // Op of the last call
  std::atomic<uint64_t> seq;     // number of the last call
  std::atomic<uint32_t> inside;  // the last call has not returned
  int32_t pid;
  uint64_t start_time;
  uint64_t pid_space;
  alignas(64) uint64_t affinity[16];  // CPUs this rank may run on
  // Point to point: peers ring when data or room has come for this rank.
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> asleep;
  std::atomic<uint32_t> checks;              // this rank asked for payload digests
  alignas(64) SharedText<kSiteNbytes> site;  // of the last call; "" when unknown
  SharedText<352> waiting;                   // what it has waited for elsewhere, see Waiting
};

struct Poison {
  std::atomic<uint32_t> state;  // 0 none, 1 being written, 2 readable
  uint32_t failure;
  int32_t rank;
  char text[6000];
};

struct Control {
  alignas(64) std::atomic<uint32_t> num_arrived;  // sum over all barriers so far
  alignas(64) std::atomic<uint32_t> generation;   // last completed barrier
  alignas(64) std::atomic<uint32_t> num_sleepers;
  alignas(64) std::atomic<uint32_t> num_attached;
  alignas(64) Poison poison;

  RankLine& line(int rank) { return reinterpret_cast<RankLine*>(this + 1)[rank]; }
};

static_assert(std::atomic<uint64_t>::is_always_lock_free &&
              std::atomic<uint32_t>::is_always_lock_free);

constexpr uint64_t kNotSymmetric = ~uint64_t{0};

// Where a rank's buffers of a call lie in its symmetric heap.
struct Offer {
  uint64_t in = kNotSymmetric;
  uint64_t out = kNotSymmetric;

  bool any() const { return in != kNotSymmetric || out != kNotSymmetric; }
};

// Followed by 2 * world_size counts: bytes to each rank, bytes from each rank.
struct alignas(64) CallRecord {
  uint64_t seq;
  Call call;
  Offer offer;

  uint64_t* counts() { return reinterpret_cast<uint64_t*>(this + 1); }
};

// What a rank meant to stage, for one reader or for all. See [Note: digests].
struct Digest {
  uint64_t value;
  uint64_t at;  // where the bytes are in the writer's buffer
  uint64_t nbytes;
};

// A stream of bytes from one rank to another; positions only grow.
struct alignas(64) Ring {
  std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
  alignas(64) std::atomic<uint32_t> backed;  // pages are there
};

// What a rank tells its peers about symmetric memory on its device: see [Note: device heap] in
// collectives/cuda/device_heap.hpp.
struct alignas(64) DeviceBoard {
  static constexpr int kMaxChunks = 16, kMaxRanks = 8;
  struct Chunk {
    DeviceHandle handle;  // by which another process maps it
    char* address;        // in the process of this rank
  };

  std::atomic<uint32_t> num_chunks;
  Chunk chunks[kMaxChunks];
  // From which call on this rank has them mapped, by owner; 0: not yet.
  std::atomic<uint32_t> mapped_from[kMaxRanks][kMaxChunks];
};

class Layout {
 public:
  explicit Layout(int world_size) : world_size_(world_size) {}

  size_t record(int rank, int parity) const {
    return align(sizeof(Control) + world_size_ * sizeof(RankLine)) +
           (2 * rank + parity) * record_nbytes();
  }
  // One for each reader, and one for all of them.
  size_t digest(int rank, int parity, int reader) const {
    return record(world_size_, 0) +
           ((2 * rank + parity) * (world_size_ + 1) + reader) * sizeof(Digest);
  }
  size_t stage(int rank) const {
    return page_align(digest(world_size_, 0, 0)) + rank * 2 * kSlotNbytes;
  }
  // What every group uses; the rings come on demand, except for their heads.
  size_t num_committed() const { return page_align(board(static_cast<int>(world_size_))); }
  size_t ring_head(int src, int dst) const {
    return ring_heads() + (src * world_size_ + dst) * sizeof(Ring);
  }
  size_t board(int rank) const {
    return ring_heads() + world_size_ * world_size_ * sizeof(Ring) + rank * sizeof(DeviceBoard);
  }
  size_t ring_data(int src, int dst) const {
    return num_committed() + (static_cast<size_t>(src) * world_size_ + dst) * kRingNbytes;
  }
  // What every rank maps at once.
  size_t num_mapped() const { return ring_data(world_size_, 0); }
  size_t heap(int rank) const { return num_mapped() + rank * kHeapStride; }
  size_t nbytes() const { return heap(static_cast<int>(world_size_)); }

 private:
  static size_t align(size_t nbytes) { return (nbytes + 63) & ~size_t{63}; }
  static size_t page_align(size_t nbytes) { return (nbytes + 4095) & ~size_t{4095}; }
  size_t record_nbytes() const {
    return sizeof(CallRecord) + align(2 * world_size_ * sizeof(uint64_t));
  }
  size_t ring_heads() const { return stage(world_size_); }

  size_t world_size_;
};

}  // namespace primitives
