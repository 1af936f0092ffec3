// Symmetric memory on a device: of each rank some chunks, which its peers have mapped.
//
// [Note: device heap] A rank makes a chunk when none has room, without asking its peers: it writes
// the chunk's handle on its board, in the memory that the ranks share on the host. A peer looks at
// the boards before each launch, maps what is new, and writes on its own board from which call on
// it has that. A rank offers its buffer to a call when all peers have had the chunk since that call
// or an earlier one: then every kernel of the call was launched with the chunk's address. So the
// first call on a new chunk may be staged, and what is mapped stays so until the group ends. Chunks
// go back when the group and the last tensor in them are gone.
//
// [Note: memory in stream order] Memory belongs to the stream that was current when it was handed
// out. When it is freed, an event is recorded there; memory for another stream lets that stream
// wait for such events first. This is what torch's caching allocator promises, and like it asks of
// who uses the memory on another stream to order that before the memory is freed.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "collectives/cuda/launch.h"
#include "transport/free_list.hpp"
#include "transport/group.hpp"

namespace primitives {

TransportError no_room_on_device(int rank, int device, size_t nbytes, const std::string& why);

class DeviceHeap : public std::enable_shared_from_this<DeviceHeap> {
 public:
  // `other_process`: the ranks whose memory has to be mapped. Uses `group` until leave().
  DeviceHeap(Group& group, int device, std::vector<bool> other_process);
  ~DeviceHeap();
  DeviceHeap(const DeviceHeap&) = delete;
  DeviceHeap& operator=(const DeviceHeap&) = delete;

  // Memory for work on `stream`, a cudaStream_t; not zeroed, aligned to 256 bytes; frees itself.
  // Throws TransportError when there is no room, std::invalid_argument while the stream is
  // captured. Any thread.
  std::shared_ptr<void> allocate(size_t nbytes, void* stream);

  // Before call `seq` is launched: maps what the peers have made. Not while a stream is captured.
  void map_new(uint32_t seq);
  // The place of `nbytes` at `data`, if all peers can read it in call `seq`; else
  // PRIMITIVES_CUDA_NOT_SYMMETRIC.
  uint64_t place_of(const void* data, size_t nbytes, uint32_t seq);
  // Where all that is mapped lies.
  void copy_chunks(primitives_cuda_ranks* ranks);

  // The end of the group. `all_gone`: no peer can use this rank's chunks any more.
  void unmap();
  void leave(bool all_gone);

 private:
  struct Chunk {
    char* memory;
    size_t nbytes;
    FreeList list;
  };

  void free(char* data, void* stream);
  // The chunk of the data, or null.
  Chunk* chunk_of(const void* data);
  // With room for at least `nbytes`.
  Chunk& make_chunk(size_t nbytes);

  Group* group_;  // null: it has ended
  const int device_, rank_;
  const std::vector<bool> other_process_;
  std::mutex mutex_;
  std::vector<Chunk> chunks_;
  char* mapped_[DeviceBoard::kMaxRanks][DeviceBoard::kMaxChunks] = {};
  uint32_t num_seen_[DeviceBoard::kMaxRanks] = {};  // chunks of each rank, mapped or not
  std::map<void*, void*> freed_;                    // stream -> event behind what was freed there
  bool all_gone_ = false;
};

}  // namespace primitives
