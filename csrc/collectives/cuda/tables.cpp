#ifdef PRIMITIVES_CUDA
#include "collectives/cuda/tables.hpp"

#include <bit>

namespace primitives {
namespace {

constexpr size_t kLeastNbytes = 16 << 10;

size_t room_for(size_t nbytes) {
  return std::bit_ceil(nbytes < kLeastNbytes ? kLeastNbytes : nbytes);
}

}  // namespace

bool Tables::take(int device, size_t table_nbytes, size_t room_nbytes, uint32_t seq,
                  uint32_t uploaded, bool captured, Place* place, primitives_cuda_error* error) {
  if (own_.empty() || own_.back().nbytes < room_nbytes) {
    Own made{nullptr, room_for(room_nbytes)};
    if (primitives_cuda_allocate(device, made.nbytes, &made.memory, error) != 0) return false;
    own_.push_back(made);
  }
  Pinned* found = nullptr;
  for (Pinned& pinned : pinned_) {
    const bool copied = static_cast<int32_t>(uploaded - pinned.seq) >= 0;
    if (copied && !pinned.captured && pinned.nbytes >= table_nbytes) found = &pinned;
  }
  if (found == nullptr) {
    Pinned made{nullptr, room_for(table_nbytes), 0, false};
    if (primitives_cuda_allocate_pinned(device, made.nbytes, &made.memory, error) != 0)
      return false;
    found = &pinned_.emplace_back(made);
  }
  found->seq = seq;
  found->captured = captured;
  *place = {static_cast<uint64_t*>(found->memory), reinterpret_cast<uint64_t*>(own_.back().memory)};
  return true;
}

void Tables::free(int device) {
  for (const Pinned& pinned : pinned_) primitives_cuda_free_pinned(device, pinned.memory);
  for (const Own& own : own_) primitives_cuda_free(device, own.memory);
  pinned_.clear();
  own_.clear();
}

}  // namespace primitives
#endif
