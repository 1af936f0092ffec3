#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include "transport/device_memory.h"

namespace {

int check(cudaError_t status, const char* what, primitives_cuda_error* error) {
  if (status == cudaSuccess) return 0;
  snprintf(error->text, sizeof error->text, "%s: %s: %s", what, cudaGetErrorName(status),
           cudaGetErrorString(status));
  cudaGetLastError();  // or the next kernel of somebody else would be blamed for it
  return -1;
}

// Allows the calling thread to allocate while it, or another one, captures a stream into a graph.
class WhileCaptured {
 public:
  WhileCaptured() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~WhileCaptured() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  WhileCaptured(const WhileCaptured&) = delete;
  WhileCaptured& operator=(const WhileCaptured&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

int primitives_cuda_device_of(const void* memory, primitives_cuda_error* error) {
  cudaPointerAttributes found;
  if (check(cudaPointerGetAttributes(&found, memory), "cudaPointerGetAttributes", error) != 0) {
    return -1;
  }
  if (found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged) {
    return found.device;
  }
  snprintf(error->text, sizeof error->text, "memory of the host");
  return -1;
}

int primitives_cuda_exchange_device(int device) {
  int before = -1;
  if (cudaGetDevice(&before) != cudaSuccess) before = -1;
  if (device >= 0) cudaSetDevice(device);
  return before;
}

int primitives_cuda_gpu_of(int device, primitives_cuda_gpu* gpu, primitives_cuda_error* error) {
  cudaDeviceProp properties;
  if (check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", error) != 0) {
    return -1;
  }
  static_assert(sizeof properties.uuid == sizeof gpu->uuid);
  memcpy(gpu->uuid, &properties.uuid, sizeof gpu->uuid);
  gpu->num_multiprocessors = properties.multiProcessorCount;
  return 0;
}

int primitives_cuda_allocate(int device, size_t nbytes, char** memory,
                             primitives_cuda_error* error) {
  const WhileCaptured allowed;
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0) return -1;
  return check(cudaMalloc(memory, nbytes), "cudaMalloc", error);
}

int primitives_cuda_clear(int device, char* memory, size_t nbytes, primitives_cuda_error* error) {
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0 ||
      check(cudaMemset(memory, 0, nbytes), "cudaMemset", error) != 0) {
    return -1;
  }
  return check(cudaDeviceSynchronize(), "cudaMemset", error);
}

int primitives_cuda_export(int device, char* memory, primitives_cuda_handle* handle,
                           primitives_cuda_error* error) {
  static_assert(sizeof(primitives_cuda_handle) == sizeof(cudaIpcMemHandle_t));
  cudaIpcMemHandle_t exported;
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0 ||
      check(cudaIpcGetMemHandle(&exported, memory), "cudaIpcGetMemHandle", error) != 0) {
    return -1;
  }
  memcpy(handle, &exported, sizeof exported);
  return 0;
}

void primitives_cuda_free(int device, char* memory) {
  cudaSetDevice(device);
  cudaFree(memory);
}

int primitives_cuda_map(int device, const primitives_cuda_handle* handle, char** memory,
                        primitives_cuda_error* error) {
  cudaIpcMemHandle_t exported;
  memcpy(&exported, handle, sizeof exported);
  void* mapped = nullptr;
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0 ||
      check(cudaIpcOpenMemHandle(&mapped, exported, cudaIpcMemLazyEnablePeerAccess),
            "cudaIpcOpenMemHandle", error) != 0) {
    return -1;
  }
  *memory = static_cast<char*>(mapped);
  return 0;
}

void primitives_cuda_unmap(int device, char* memory) {
  cudaSetDevice(device);
  cudaIpcCloseMemHandle(memory);
}

int primitives_cuda_allocate_pinned(int device, size_t nbytes, void** memory,
                                    primitives_cuda_error* error) {
  const WhileCaptured allowed;
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0 ||
      check(cudaHostAlloc(memory, nbytes, cudaHostAllocMapped | cudaHostAllocPortable),
            "cudaHostAlloc", error) != 0) {
    return -1;
  }
  memset(*memory, 0, nbytes);
  return 0;
}

void primitives_cuda_free_pinned(int device, void* memory) {
  cudaSetDevice(device);
  cudaFreeHost(memory);
}

int primitives_cuda_make_event(int device, void** event, primitives_cuda_error* error) {
  cudaEvent_t made;
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0 ||
      check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cudaEventCreate", error) !=
          0) {
    return -1;
  }
  *event = made;
  return 0;
}

void primitives_cuda_destroy_event(int device, void* event) {
  cudaSetDevice(device);
  cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

int primitives_cuda_synchronize(int device, void* event, primitives_cuda_error* error) {
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0) return -1;
  return check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "cudaEventSynchronize",
               error);
}

int primitives_cuda_record(int device, void* event, void* stream, primitives_cuda_error* error) {
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0) return -1;
  return check(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)),
               "cudaEventRecord", error);
}

int primitives_cuda_wait(int device, void* stream, void* event, primitives_cuda_error* error) {
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0) return -1;
  return check(
      cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0),
      "cudaStreamWaitEvent", error);
}

int primitives_cuda_copy(int device, void* to, const void* from, size_t nbytes, void* stream,
                         primitives_cuda_error* error) {
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0) return -1;
  return check(
      cudaMemcpyAsync(to, from, nbytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
      "cudaMemcpyAsync", error);
}

int primitives_cuda_synchronize_stream(int device, void* stream, primitives_cuda_error* error) {
  if (check(cudaSetDevice(device), "cudaSetDevice", error) != 0) return -1;
  return check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cudaStreamSynchronize",
               error);
}
