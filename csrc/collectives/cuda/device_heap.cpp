#ifdef PRIMITIVES_CUDA
#include "collectives/cuda/device_heap.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "transport/current_device.hpp"
#include "transport/device_sharing.hpp"

namespace primitives {
namespace {

constexpr size_t kAlignNbytes = 256;
constexpr size_t kMinChunkNbytes = 32 << 20;  // and half of what there is: few chunks, little waste
constexpr size_t kGrainNbytes = 2 << 20;

size_t round_up(size_t nbytes, size_t unit) { return (nbytes + unit - 1) / unit * unit; }

}  // namespace

TransportError no_room_on_device(int rank, int device, size_t nbytes, const std::string& why) {
  return TransportError(Failure::kOther, "rank " + std::to_string(rank) + " has no room for " +
                                             std::to_string(nbytes) + " bytes on device " +
                                             std::to_string(device) + ": " + why);
}

DeviceHeap::DeviceHeap(Group& group, int device, std::vector<bool> other_process)
    : group_(&group),
      device_(device),
      rank_(group.rank()),
      other_process_(std::move(other_process)) {
  static_assert(DeviceBoard::kMaxChunks == PRIMITIVES_CUDA_MAX_CHUNKS);
  static_assert(DeviceBoard::kMaxRanks == PRIMITIVES_CUDA_MAX_RANKS);
}

DeviceHeap::~DeviceHeap() {
  const OnDevice current(device_);
  for (const auto& [stream, event] : freed_) primitives_cuda_destroy_event(device_, event);
  // A peer that is still there may be reading: then the end of the process frees it.
  for (const Chunk& chunk : chunks_) {
    if (all_gone_) free_shared(device_, chunk.memory);
  }
}

std::shared_ptr<void> DeviceHeap::allocate(size_t nbytes, void* stream) {
  const OnDevice current(device_);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (group_ == nullptr) throw std::invalid_argument("symmetric memory: the group has ended");
  group_->check();
  primitives_cuda_error error;
  if (primitives_cuda_is_captured(device_, stream, &error) != 0) {
    throw std::invalid_argument(
        "symmetric memory on a device: expected a stream that is not captured into a graph");
  }
  nbytes = round_up(std::max<size_t>(nbytes, 1), kAlignNbytes);
  char* data = nullptr;
  for (Chunk& chunk : chunks_) {
    const size_t offset = chunk.list.take(nbytes);
    if (offset == FreeList::kNone) continue;
    data = chunk.memory + offset;
    break;
  }
  if (data == nullptr) {
    Chunk& made = make_chunk(nbytes);
    data = made.memory + made.list.take(nbytes);
  }
  for (const auto& [other, event] : freed_) {
    if (other == stream || primitives_cuda_wait(device_, stream, event, &error) == 0) continue;
    Chunk& chunk = *chunk_of(data);
    chunk.list.give_back(data - chunk.memory);
    throw no_room_on_device(rank_, device_, nbytes, error.text);
  }
  return {data, [heap = shared_from_this(), stream](void* freed) {
            heap->free(static_cast<char*>(freed), stream);
          }};
}

void DeviceHeap::free(char* data, void* stream) {
  const OnDevice current(device_);
  const std::lock_guard<std::mutex> lock(mutex_);
  primitives_cuda_error error;
  void*& event = freed_[stream];
  // Where no event can be recorded, as in a capture, the memory is not handed out again.
  if (primitives_cuda_is_captured(device_, stream, &error) != 0 ||
      (event == nullptr && primitives_cuda_make_event(device_, &event, &error) != 0)) {
    if (event == nullptr) freed_.erase(stream);
    return;
  }
  if (primitives_cuda_record(device_, event, stream, &error) != 0) return;
  Chunk& chunk = *chunk_of(data);
  chunk.list.give_back(data - chunk.memory);
}

DeviceHeap::Chunk* DeviceHeap::chunk_of(const void* data) {
  const char* const at = static_cast<const char*>(data);
  const auto holds = [at](const Chunk& of) {
    return at >= of.memory && at < of.memory + of.nbytes;
  };
  const auto found = std::find_if(chunks_.begin(), chunks_.end(), holds);
  return found == chunks_.end() ? nullptr : &*found;
}

DeviceHeap::Chunk& DeviceHeap::make_chunk(size_t nbytes) {
  const auto no_room = [&](const std::string& why) {
    return no_room_on_device(rank_, device_, nbytes, why);
  };
  DeviceBoard& board = group_->board(rank_);
  if (chunks_.size() == DeviceBoard::kMaxChunks) {
    throw no_room("expected up to " + std::to_string(DeviceBoard::kMaxChunks) +
                  " chunks, none of which has room");
  }
  size_t total = 0;
  for (const Chunk& chunk : chunks_) total += chunk.nbytes;
  primitives_cuda_error error{};
  char* memory = nullptr;
  size_t size = round_up(std::max({nbytes, kMinChunkNbytes, total / 2}), kGrainNbytes);
  if (!allocate_shared(device_, size, &memory, &error)) {
    size = round_up(nbytes, kGrainNbytes);
    if (!allocate_shared(device_, size, &memory, &error)) throw no_room(error.text);
  }
  DeviceHandle handle;
  if (!export_shared(device_, memory, &handle, &error)) {
    free_shared(device_, memory);
    throw no_room(error.text);
  }
  const size_t index = chunks_.size();
  chunks_.push_back({memory, size, FreeList(size)});
  mapped_[rank_][index] = memory;
  board.chunks[index] = {handle, memory};
  board.num_chunks.store(static_cast<uint32_t>(index + 1), std::memory_order_release);
  return chunks_.back();
}

void DeviceHeap::map_new(uint32_t seq) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int r = 0; r < group_->world_size(); r++) {
    if (r == rank_) continue;
    DeviceBoard& board = group_->board(r);
    const uint32_t num_chunks = board.num_chunks.load(std::memory_order_acquire);
    for (uint32_t& i = num_seen_[r]; i < num_chunks; i++) {
      const DeviceBoard::Chunk& chunk = board.chunks[i];
      primitives_cuda_error error;
      if (!other_process_[r]) {
        mapped_[r][i] = chunk.address;
      } else if (!map_shared(device_, chunk.handle, &mapped_[r][i], &error)) {
        mapped_[r][i] = nullptr;  // calls on it are staged
        continue;
      }
      group_->board(rank_).mapped_from[r][i].store(seq, std::memory_order_release);
    }
  }
}

uint64_t DeviceHeap::place_of(const void* data, size_t nbytes, uint32_t seq) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Chunk* chunk = chunk_of(data);
  if (chunk == nullptr) return PRIMITIVES_CUDA_NOT_SYMMETRIC;
  const size_t offset = static_cast<const char*>(data) - chunk->memory;
  if (nbytes > chunk->nbytes - offset) return PRIMITIVES_CUDA_NOT_SYMMETRIC;
  const uint64_t index = chunk - chunks_.data();
  for (int r = 0; r < group_->world_size(); r++) {
    if (r == rank_) continue;
    const uint32_t from =
        group_->board(r).mapped_from[rank_][index].load(std::memory_order_acquire);
    if (from == 0 || static_cast<int32_t>(seq - from) < 0) return PRIMITIVES_CUDA_NOT_SYMMETRIC;
  }
  return index << PRIMITIVES_CUDA_CHUNK_SHIFT | offset;
}

void DeviceHeap::copy_chunks(primitives_cuda_ranks* ranks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  static_assert(sizeof ranks->chunks == sizeof mapped_);
  std::memcpy(ranks->chunks, mapped_, sizeof mapped_);
}

void DeviceHeap::unmap() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t r = 0; r < other_process_.size(); r++) {
    for (char*& chunk : mapped_[r]) {
      if (other_process_[r] && chunk != nullptr) unmap_shared(device_, chunk);
      chunk = nullptr;
    }
  }
}

void DeviceHeap::leave(bool all_gone) {
  const std::lock_guard<std::mutex> lock(mutex_);
  group_ = nullptr;
  all_gone_ = all_gone;
}

}  // namespace primitives
#endif
