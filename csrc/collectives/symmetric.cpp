#include "collectives/symmetric.hpp"

#include "collectives/chunks.hpp"

namespace primitives::symmetric {
namespace {

constexpr size_t kMinNbytes = 32 << 10;            // a second barrier costs more than staging less
constexpr size_t kMinBroadcastNbytes = 256 << 10;  // staged once in any case
constexpr size_t kBlockNbytes = 16 << 10;  // read once, written n times: stays in the L1 cache
constexpr size_t kStreamAllReduceNbytes = 256 << 20;  // of all ranks: its lines are in the caches

// This rank's heap, or null when a call of `nbytes` is to be staged.
SymmetricHeap* heap_for(Group& group, size_t nbytes) {
  return nbytes < kMinNbytes || group.world_size() == 1 ? nullptr : group.zero_copy_heap();
}

// Where parts lie that follow each other without a gap.
uint64_t offset_of(const SymmetricHeap& heap, const std::vector<Part>& parts) {
  const char* const begin = static_cast<const char*>(parts[0].data);
  size_t nbytes = 0;
  for (const Part& part : parts) {
    if (part.nbytes > 0 && part.data != begin + nbytes) return kNotSymmetric;
    nbytes += part.nbytes;
  }
  return heap.offset_of(begin, nbytes);
}

std::vector<uint64_t> nbytes_of(const std::vector<Part>& parts) {
  std::vector<uint64_t> nbytes;
  for (const Part& part : parts) nbytes.push_back(part.nbytes);
  return nbytes;
}

bool all_offer(const Group& group, uint64_t Offer::* buffer) {
  for (int r = 0; r < group.world_size(); r++) {
    if (group.offer(r).*buffer == kNotSymmetric) return false;
  }
  return true;
}

bool decline(Group& group) {
  group.decline();
  return false;
}

bool finish(Group& group, bool stream) {
  if (stream) stream_fence();
  group.finish_symmetric();
  return true;
}

}  // namespace

bool all_gather(Group& group, const Call& call, const void* in, size_t in_nbytes,
                const std::vector<Part>& out, Milliseconds timeout) {
  const SymmetricHeap* heap = heap_for(group, in_nbytes);
  if (heap == nullptr) return false;
  const Offer mine{heap->offset_of(in, in_nbytes), offset_of(*heap, out)};
  if (!mine.any()) return false;
  const int n = group.world_size(), me = group.rank();
  const std::vector<uint64_t> send(n, in_nbytes), recv = nbytes_of(out);
  size_t before = 0, total = 0;  // bytes of the output before this rank's, and of all
  for (int r = 0; r < n; r++) {
    if (r < me) before += recv[r];
    total += recv[r];
  }
  const bool stream = around_caches(group, total);
  group.start_symmetric(call, mine, call.has_counts ? send.data() : nullptr, recv.data(), timeout);
  if (all_offer(group, &Offer::out)) {
    for (size_t at = 0; at < in_nbytes; at += kBlockNbytes) {
      const char* from = static_cast<const char*>(in) + at;
      for (int j = 0; j < n; j++) {
        const int r = (me + j) % n;
        copy(heap->at(r, group.offer(r).out + before + at), from,
             std::min(kBlockNbytes, in_nbytes - at), stream);
      }
    }
  } else if (all_offer(group, &Offer::in)) {
    for (int j = 0; j < n; j++) {
      const int r = (me + j) % n;
      copy(out[r].data, r == me ? in : heap->at(r, group.offer(r).in), out[r].nbytes, stream);
    }
  } else {
    return decline(group);
  }
  return finish(group, stream);
}

bool reduce_scatter(Group& group, const Call& call, const std::vector<Part>& in, void* out,
                    const Reduction& reduction, Milliseconds timeout) {
  const int n = group.world_size(), me = group.rank();
  const std::vector<uint64_t> send = nbytes_of(in);
  size_t before = 0, total = 0;
  for (int r = 0; r < n; r++) {
    if (r < me) before += send[r];
    total += send[r];
  }
  const SymmetricHeap* heap = heap_for(group, total);
  if (heap == nullptr) return false;
  const Offer mine{.in = offset_of(*heap, in)};
  if (!mine.any()) return false;
  const size_t nbytes = in[me].nbytes;
  const std::vector<uint64_t> recv(n, nbytes);
  const bool stream = around_caches(group, nbytes);
  group.start_symmetric(call, mine, call.has_counts ? send.data() : nullptr, recv.data(), timeout);
  if (!all_offer(group, &Offer::in)) return decline(group);
  std::vector<const void*> sources(n);
  for (int r = 0; r < n; r++) sources[r] = heap->at(r, group.offer(r).in + before);
  reduction.kernel(sources.data(), n, out, nbytes / reduction.itemsize, reduction.factor, stream);
  return finish(group, stream);
}

bool all_reduce(Group& group, const Call& call, void* data, size_t nbytes,
                const Reduction& reduction, Milliseconds timeout) {
  const SymmetricHeap* heap = heap_for(group, nbytes);
  if (heap == nullptr) return false;
  const uint64_t offset = heap->offset_of(data, nbytes);
  const Offer mine{offset, offset};
  if (!mine.any()) return false;
  group.start_symmetric(call, mine, nullptr, nullptr, timeout);
  if (!all_offer(group, &Offer::in)) return decline(group);
  const int n = group.world_size(), me = group.rank();
  // A slice is read and written by one rank alone, so working in place is safe.
  const size_t slice = (ceil_div(nbytes, n) + 63) & ~size_t{63};
  const size_t end = std::min(nbytes, slice * (me + 1));
  const bool stream = around_caches(group, nbytes, kStreamAllReduceNbytes);
  alignas(64) char sums[kBlockNbytes];
  std::vector<const void*> sources(n);
  for (size_t at = std::min(nbytes, slice * me); at < end; at += kBlockNbytes) {
    const size_t size = std::min(kBlockNbytes, end - at);
    for (int r = 0; r < n; r++) sources[r] = heap->at(r, group.offer(r).in + at);
    reduction.kernel(sources.data(), n, sums, size / reduction.itemsize, reduction.factor, false);
    for (int j = 0; j < n; j++) {
      const int r = (me + j) % n;
      copy(heap->at(r, group.offer(r).out + at), sums, size, stream);
    }
  }
  return finish(group, stream);
}

bool all_to_all(Group& group, const Call& call, const std::vector<Part>& in,
                const std::vector<Part>& out, Milliseconds timeout) {
  const int n = group.world_size(), me = group.rank();
  const std::vector<uint64_t> send = nbytes_of(in), recv = nbytes_of(out);
  size_t total = 0;
  for (uint64_t nbytes : recv) total += nbytes;
  const SymmetricHeap* heap = heap_for(group, total);
  if (heap == nullptr) return false;
  const Offer mine{.in = offset_of(*heap, in)};
  if (!mine.any()) return false;
  const bool stream = around_caches(group, total);
  group.start_symmetric(call, mine, call.has_counts ? send.data() : nullptr, recv.data(), timeout);
  if (!all_offer(group, &Offer::in)) return decline(group);
  for (int j = 0; j < n; j++) {
    const int r = (me + j) % n;
    size_t before = 0;
    for (int s = 0; s < me; s++) before += call.has_counts ? group.sent_nbytes(r, s) : send[s];
    copy(out[r].data, heap->at(r, group.offer(r).in + before), out[r].nbytes, stream);
  }
  return finish(group, stream);
}

bool broadcast(Group& group, const Call& call, void* data, size_t nbytes, Milliseconds timeout) {
  const SymmetricHeap* heap = heap_for(group, nbytes);
  if (heap == nullptr || nbytes < kMinBroadcastNbytes) return false;
  const Offer mine{.in = heap->offset_of(data, nbytes)};
  if (!mine.any()) return false;
  group.start_symmetric(call, mine, nullptr, nullptr, timeout);
  if (!all_offer(group, &Offer::in)) return decline(group);
  const bool stream = around_caches(group, nbytes);
  copy(data, heap->at(call.root, group.offer(call.root).in), nbytes, stream);
  return finish(group, stream);
}

std::string no_room(const std::string& rank, size_t nbytes) {
  return "empty: " + rank + " has no room for " + std::to_string(nbytes) +
         " bytes of symmetric memory";
}

void* empty(Group& group, const Call& call, size_t nbytes, Milliseconds timeout) {
  const auto heap = group.heap();
  void* data = nullptr;
  std::string why;
  try {
    data = heap->allocate(nbytes);
  } catch (const TransportError& error) {
    why = error.what();
  }
  const Offer mine{.in = data == nullptr ? kNotSymmetric : 0};
  group.start_symmetric(call, mine, nullptr, nullptr, timeout);
  group.finish();
  for (int r = 0; r < group.world_size(); r++) {
    if (group.offer(r).any()) continue;
    if (data != nullptr) heap->free(data);
    throw TransportError(Failure::kOther,
                         no_room(group.named(r), nbytes) + (why.empty() ? "" : ": " + why));
  }
  return data;
}

}  // namespace primitives::symmetric
