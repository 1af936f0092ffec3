#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include "transport/devices.h"

extern "C" int primitives_cuda_devices(primitives_device* devices, int capacity, char* error,
                                       int error_capacity) {
  int num_devices = 0;
  cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status != cudaSuccess) {
    snprintf(error, error_capacity, "%s", cudaGetErrorString(status));
    return -1;
  }
  for (int i = 0; i < num_devices && i < capacity; i++) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, i);
    if (status != cudaSuccess) {
      snprintf(error, error_capacity, "device %d: %s", i, cudaGetErrorString(status));
      return -1;
    }
    primitives_device* d = &devices[i];
    snprintf(d->name, sizeof d->name, "%s", properties.name);
    d->major = properties.major;
    d->minor = properties.minor;
    d->num_multiprocessors = properties.multiProcessorCount;
    d->memory_nbytes = properties.totalGlobalMem;
    int mode = cudaComputeModeDefault;
    cudaDeviceGetAttribute(&mode, cudaDevAttrComputeMode, i);
    d->shared = mode == cudaComputeModeDefault;
    d->num_peers = d->num_linked = 0;
    for (int j = 0; j < num_devices; j++) {
      int can_access = 0, atomics = 0;
      if (j == i || cudaDeviceCanAccessPeer(&can_access, i, j) != cudaSuccess || !can_access) {
        continue;
      }
      cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, i, j);
      d->num_peers++;
      d->num_linked += atomics;
    }
  }
  return num_devices;
}
