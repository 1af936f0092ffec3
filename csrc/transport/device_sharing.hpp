// Memory of a device that other processes of this host map.
//
// [Note: two ways to share] By default it is cudaMalloc's, and its handle that of CUDA IPC. With
// PRIMITIVES_CUDA_MEMORY=virtual it comes from the virtual memory API and is a file descriptor to
// others. They fetch it from this process without its help (pidfd_getfd), since a rank maps what
// its peers have made when it needs it; to which a system may want the right to trace the process
// that holds it. A handle says which way it goes, so ranks need not agree.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "transport/device_memory.h"

namespace primitives {

// By which another process maps an allocation; passed on through memory that processes share.
struct DeviceHandle {
  bool is_virtual;
  int32_t pid, fd;  // virtual: the descriptor in its process
  uint64_t nbytes;
  primitives_cuda_handle ipc;
};

#ifdef PRIMITIVES_CUDA
// Not zeroed; without a wait for the device. A function that returns false has set `error`.
bool allocate_shared(int device, size_t nbytes, char** memory, primitives_cuda_error* error);
bool export_shared(int device, char* memory, DeviceHandle* handle, primitives_cuda_error* error);
void free_shared(int device, char* memory);

// What another process has exported.
bool map_shared(int device, const DeviceHandle& handle, char** memory,
                primitives_cuda_error* error);
void unmap_shared(int device, char* memory);
#endif

}  // namespace primitives
