#include "transport/symmetric.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <string>
#include <utility>

#include "transport/errors.hpp"
#include "transport/group.hpp"

namespace primitives {
namespace {

constexpr size_t kGrowNbytes = 1 << 20;  // pages are asked for in runs of at least this

size_t round_up(size_t nbytes, size_t unit) { return (nbytes + unit - 1) / unit * unit; }

}  // namespace

SymmetricHeap::SymmetricHeap(std::shared_ptr<Segment> segment, const Layout& layout, int rank,
                             int world_size)
    : segment_(std::move(segment)),
      begin_(layout.heap(0)),
      rank_(rank),
      world_size_(world_size),
      data_(segment_->map(begin_, world_size * kHeapStride)) {
  free_[0] = kHeapNbytes;
}

SymmetricHeap::~SymmetricHeap() { munmap(data_, world_size_ * kHeapStride); }

void* SymmetricHeap::allocate(size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  nbytes = round_up(std::max<size_t>(nbytes, 1), 64);
  // The first that fits, so that the heap grows only when nothing freed does.
  auto block = free_.begin();
  while (block != free_.end() && block->second < nbytes) ++block;
  if (block == free_.end()) {
    throw TransportError(Failure::kOther, "symmetric memory is full: rank " +
                                              std::to_string(rank_) + " needs " +
                                              std::to_string(nbytes) + " bytes, of at most " +
                                              std::to_string(kHeapNbytes) + " a rank");
  }
  const auto [offset, num_free] = *block;
  if (offset + nbytes > num_committed_) {
    const size_t end = std::min(round_up(offset + nbytes, kGrowNbytes), kHeapNbytes);
    segment_->commit(begin_ + rank_ * kHeapStride + num_committed_, end - num_committed_);
    num_committed_ = end;
  }
  free_.erase(block);
  if (num_free > nbytes) free_[offset + nbytes] = num_free - nbytes;
  used_[offset] = nbytes;
  return at(rank_, offset);
}

void SymmetricHeap::free(void* data) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto block = used_.find(static_cast<char*>(data) - at(rank_, 0));
  auto [offset, nbytes] = *block;
  used_.erase(block);
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + nbytes == next->first) {
    nbytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += nbytes;
      return;
    }
  }
  free_[offset] = nbytes;
}

std::shared_ptr<SymmetricHeap> Group::heap() {
  std::lock_guard<std::mutex> lock(heap_mutex_);
  check();
  if (!heap_) {
    heap_ = std::make_shared<SymmetricHeap>(segment_, layout_, rank(), world_size());
    heap_made_.store(heap_.get(), std::memory_order_release);
  }
  return heap_;
}

void Group::start_symmetric(const Call& call, const Offer& mine, const uint64_t* send_nbytes,
                            const uint64_t* recv_nbytes, Milliseconds timeout) {
  start(call, send_nbytes, recv_nbytes, timeout);
  record(rank(), epoch_ + 1).offer = mine;
  meet_first();
}

void Group::finish_symmetric() {
  barrier();
  num_zero_copy_.fetch_add(1, std::memory_order_relaxed);
  finish();
}

void Group::decline() {
  barrier();
  declined_ = true;
}

}  // namespace primitives
