// Where the tables of fused calls lie: written by the host into pinned memory, copied on the stream
// to memory of the device, read there by the kernel.
//
// [Note: tables] The calls of a group follow each other on the device, so all have their tables at
// one place there. The host runs ahead: it takes pinned memory whose table was copied, which
// kernels say (primitives_cuda_status.uploaded), or makes some; it never waits. A captured call
// copies its table anew at each replay, so its pinned memory is not taken again, and memory of the
// device that became too small is kept, too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "transport/device_memory.h"

namespace primitives {

class Tables {
 public:
  struct Place {
    uint64_t* host = nullptr;    // pinned
    uint64_t* device = nullptr;  // with room for partial sums behind the table
  };

  // For call `seq`, when the tables of calls up to `uploaded` were copied. False with `error` set.
  bool take(int device, size_t table_nbytes, size_t room_nbytes, uint32_t seq, uint32_t uploaded,
            bool captured, Place* place, primitives_cuda_error* error);
  // When nothing runs any more.
  void free(int device);

 private:
  struct Pinned {
    void* memory;
    size_t nbytes;
    uint32_t seq;  // of the last call that took it
    bool captured;
  };
  struct Own {
    char* memory;
    size_t nbytes;
  };

  std::vector<Pinned> pinned_;
  std::vector<Own> own_;  // the last one is in use
};

}  // namespace primitives
