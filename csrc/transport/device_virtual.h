/* C face of CUDA's virtual memory API, for memory that is a file descriptor to other processes. As
 * in device_memory.h. */
#pragma once

#include <stddef.h>

#include "transport/device_memory.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Memory comes in multiples of so many bytes. */
int primitives_cuda_virtual_unit(int device, size_t* nbytes, primitives_cuda_error* error);
/* Memory of the device, mapped; not zeroed. */
int primitives_cuda_virtual_create(int device, size_t nbytes, char** memory,
                                   primitives_cuda_error* error);
/* A descriptor by which others open it; the caller closes it. */
int primitives_cuda_virtual_export(int device, char* memory, int* fd, primitives_cuda_error* error);
/* The memory behind a descriptor, mapped for this device. */
int primitives_cuda_virtual_open(int device, int fd, size_t nbytes, char** memory,
                                 primitives_cuda_error* error);
/* Unmaps either, behind all that the device does. The memory is free when nobody has it mapped and
 * no descriptor is open. */
void primitives_cuda_virtual_close(int device, char* memory, size_t nbytes);

#ifdef __cplusplus
}
#endif
