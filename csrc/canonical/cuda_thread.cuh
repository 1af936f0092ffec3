// A CUDA thread as the kernels see it, and how one is started.
//
// [Note: kernels without a GPU] A kernel is a function object: its members are its arguments,
// operator()(thread) is its body, and everything that a thread does beyond arithmetic (who am I,
// memory, shuffles, barriers) goes through `thread`. So the same source also runs on a host, lane
// by lane, with every access and every barrier checked: tests/emulator/.
#pragma once

#include <cuda_runtime.h>

#include "canonical/grid.hpp"
#include "canonical/packed.hpp"

namespace primitives::canonical {
namespace {

struct CudaThread {
  static __device__ __forceinline__ int block_x() { return static_cast<int>(blockIdx.x); }
  static __device__ __forceinline__ int block_y() { return static_cast<int>(blockIdx.y); }
  static __device__ __forceinline__ int index() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ float* shared() {
    extern __shared__ float4 shared_memory[];
    return reinterpret_cast<float*>(shared_memory);
  }

  // Of global memory. stream: read or written once.
  template <class V>
  static __device__ __forceinline__ V load(const V* p) {
    return *p;
  }
  template <class V>
  static __device__ __forceinline__ void store(V* p, V x) {
    *p = x;
  }
  static __device__ __forceinline__ Packed stream(const Packed* p) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(p));
    return {{x.x, x.y, x.z, x.w}};
  }
  static __device__ __forceinline__ void stream(Packed* p, const Packed& x) {
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]));
  }

  // By all lanes of a warp together.
  template <class V>
  static __device__ __forceinline__ V shuffle_xor(V x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }
  static __device__ __forceinline__ bool all(bool x) { return __all_sync(0xffffffffu, x); }
  static __device__ __forceinline__ void sync_warp() { __syncwarp(); }
  // By all threads of a block together.
  static __device__ __forceinline__ void sync_block() { __syncthreads(); }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run(const __grid_constant__ Kernel kernel) {
  kernel(CudaThread{});
}

// Enqueues a kernel; grid.x is at most 2^31 - 1.
template <class Kernel>
cudaError_t start(const Kernel& kernel, const Grid& grid, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  run<<<blocks, Kernel::kThreads, static_cast<size_t>(grid.shared_nbytes), stream>>>(kernel);
  return cudaGetLastError();
}

}  // namespace
}  // namespace primitives::canonical
