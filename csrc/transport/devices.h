// C face of the CUDA device query, so that the .cu file sees no C++ or torch header.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  char name[256];
  int major, minor;  // compute capability
  int num_multiprocessors;
  unsigned long long memory_nbytes;
  int shared;      // several processes may use it at a time (compute mode "default")
  int num_peers;   // other devices whose memory this one can map
  int num_linked;  // those of them behind a link with native atomics: NVLink, not PCIe
} primitives_device;

// Fills up to `capacity` devices. Returns how many there are, or -1 with `error` set (no driver,
// ...).
int primitives_cuda_devices(primitives_device* devices, int capacity, char* error,
                            int error_capacity);

#ifdef __cplusplus
}
#endif
