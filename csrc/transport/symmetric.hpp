// Symmetric memory: a growing heap per rank that all ranks of the group have mapped, so that they
// can read and write each other's tensors in place.
//
// The heaps are ranges of the group's segment, so they need no names of their own, and nothing is
// left whatever kills a process. Only the range that was handed out once is backed by pages. What
// is freed is handed out again, to this rank; pages return to the system with the last tensor and
// the group.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "transport/control.hpp"
#include "transport/free_list.hpp"
#include "transport/segment.hpp"

namespace primitives {

class SymmetricHeap {
 public:
  SymmetricHeap(std::shared_ptr<Segment> segment, const Layout& layout, int rank, int world_size);
  ~SymmetricHeap();
  SymmetricHeap(const SymmetricHeap&) = delete;
  SymmetricHeap& operator=(const SymmetricHeap&) = delete;

  // Memory of this rank, aligned to 64 bytes, not zeroed. Any thread. Throws TransportError when
  // there is no room.
  void* allocate(size_t nbytes);
  void free(void* data);

  // Where in this rank's heap `nbytes` at `data` lie, or kNotSymmetric. No bytes lie anywhere.
  uint64_t offset_of(const void* data, size_t nbytes) const {
    const size_t offset = static_cast<const char*>(data) - at(rank_, 0);
    if (nbytes == 0) return 0;
    return offset < kHeapNbytes && nbytes <= kHeapNbytes - offset ? offset : kNotSymmetric;
  }
  int rank() const { return rank_; }
  const std::string& segment_name() const { return segment_->name(); }
  char* at(int rank, uint64_t offset) const { return data_ + rank * kHeapStride + offset; }

 private:
  std::shared_ptr<Segment> segment_;
  size_t begin_;  // of the heaps in the segment
  int rank_, world_size_;
  char* data_;
  std::mutex mutex_;
  FreeList list_{kHeapNbytes};
  size_t num_committed_ = 0;
};

}  // namespace primitives
