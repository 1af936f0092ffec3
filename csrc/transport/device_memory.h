/* C face of the device memory that ranks share, so that the host side sees no CUDA header (and the
 * tests can put another machine behind it). A function returns 0, or -1 with `error` set; each
 * makes `device` the current one of the calling thread. */
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Room for what went wrong. */
typedef struct {
  char text[256];
} primitives_cuda_error;

/* By which another process of this host opens an allocation: a cudaIpcMemHandle_t. */
typedef struct {
  unsigned char bytes[64];
} primitives_cuda_handle;

typedef struct {
  unsigned char uuid[16];
  int num_multiprocessors;
} primitives_cuda_gpu;

/* The device whose memory this is, or -1 with `error` set. */
int primitives_cuda_device_of(const void* memory, primitives_cuda_error* error);
/* Makes `device` the current one of the calling thread, unless it is -1; the one before, or -1. */
int primitives_cuda_exchange_device(int device);

int primitives_cuda_gpu_of(int device, primitives_cuda_gpu* gpu, primitives_cuda_error* error);

/* Memory of the device; not zeroed; without a wait for the device; also while a stream is captured.
 */
int primitives_cuda_allocate(int device, size_t nbytes, char** memory,
                             primitives_cuda_error* error);
/* Zeroes memory of the device, and waits for that. */
int primitives_cuda_clear(int device, char* memory, size_t nbytes, primitives_cuda_error* error);
/* By which handle other processes map what was allocated. */
int primitives_cuda_export(int device, char* memory, primitives_cuda_handle* handle,
                           primitives_cuda_error* error);
void primitives_cuda_free(int device, char* memory);

/* The memory of another process, on this device or a peer of it. */
int primitives_cuda_map(int device, const primitives_cuda_handle* handle, char** memory,
                        primitives_cuda_error* error);
void primitives_cuda_unmap(int device, char* memory);

/* Zeroed memory of the host that kernels see at the same address; also while a stream is captured.
 */
int primitives_cuda_allocate_pinned(int device, size_t nbytes, void** memory,
                                    primitives_cuda_error* error);
void primitives_cuda_free_pinned(int device, void* memory);

/* An event of the device, a cudaEvent_t; and the wait of the host for what it recorded last. */
int primitives_cuda_make_event(int device, void** event, primitives_cuda_error* error);
void primitives_cuda_destroy_event(int device, void* event);
int primitives_cuda_synchronize(int device, void* event, primitives_cuda_error* error);
/* Records what is on `stream`, a cudaStream_t; and lets a stream wait for it. */
int primitives_cuda_record(int device, void* event, void* stream, primitives_cuda_error* error);
int primitives_cuda_wait(int device, void* stream, void* event, primitives_cuda_error* error);

/* Copies on `stream`, a cudaStream_t, between any memory of host and device; and the wait of the
 * host for all that is on the stream. */
int primitives_cuda_copy(int device, void* to, const void* from, size_t nbytes, void* stream,
                         primitives_cuda_error* error);
int primitives_cuda_synchronize_stream(int device, void* stream, primitives_cuda_error* error);

#ifdef __cplusplus
}
#endif
