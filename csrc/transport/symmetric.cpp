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
      data_(segment_->map(begin_, world_size * kHeapStride)) {}

SymmetricHeap::~SymmetricHeap() { munmap(data_, world_size_ * kHeapStride); }

void* SymmetricHeap::allocate(size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  nbytes = round_up(std::max<size_t>(nbytes, 1), 64);
  const size_t offset = list_.take(nbytes);
  if (offset == FreeList::kNone) {
    throw TransportError(Failure::kOther, "symmetric memory is full: rank " +
                                              std::to_string(rank_) + " needs " +
                                              std::to_string(nbytes) + " bytes, of at most " +
                                              std::to_string(kHeapNbytes) + " a rank");
  }
  if (offset + nbytes > num_committed_) {
    const size_t end = std::min(round_up(offset + nbytes, kGrowNbytes), kHeapNbytes);
    try {
      segment_->commit(begin_ + rank_ * kHeapStride + num_committed_, end - num_committed_);
    } catch (...) {
      list_.give_back(offset);
      throw;
    }
    num_committed_ = end;
  }
  return at(rank_, offset);
}

void SymmetricHeap::free(void* data) {
  std::lock_guard<std::mutex> lock(mutex_);
  list_.give_back(static_cast<char*>(data) - at(rank_, 0));
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
