// The canonical kernels on CUDA: the table of kernels.hpp over device memory.
//
// No torch and no CUDA header. A function enqueues its kernels on the stream that the calling
// thread has set, and returns; it throws std::runtime_error when CUDA refuses. Nothing allocates,
// waits for the device or reads a result back. random_normal, random_words and count_zeros are
// null: a device has no use for them.
#pragma once

#include "canonical/kernels.hpp"

namespace primitives::canonical {

const Kernels& cuda_kernels();

// A device, which becomes the current one of the calling thread, and a cudaStream_t of it.
struct CudaStream {
  int device;
  void* stream;
};

// For the kernels that this thread launches from now on.
void set_cuda_stream(const CudaStream& stream);

}  // namespace primitives::canonical
