// The machine of [Note: device code] that is a GPU.
//
// Flags are accessed with system scope, so that they order memory also between GPUs. What the other
// lanes of a block wrote before a barrier of the block is ordered before the flag that one of its
// lanes then releases (PTX memory model: causality order is transitive over barriers).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "collectives/cuda/pack.hpp"

namespace primitives::cuda {

struct Gpu {
  DEVICE_FN int num_lanes() const { return static_cast<int>(blockDim.x); }

  template <class F>
  DEVICE_FN void each_lane(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  template <class F>
  DEVICE_FN bool all(F f) {
    return __syncthreads_and(f(static_cast<int>(threadIdx.x)));
  }
  DEVICE_FN void sync() { __syncthreads(); }

  template <class T>
  DEVICE_FN T load(const T* at) {
    return *at;
  }
  DEVICE_FN Pack load(const Pack* at) {
    const uint4 words = *reinterpret_cast<const uint4*>(at);
    return {{words.x, words.y, words.z, words.w}};
  }
  template <class T>
  DEVICE_FN void store(T* at, T value) {
    *at = value;
  }
  DEVICE_FN void store(Pack* at, Pack pack) {
    *reinterpret_cast<uint4*>(at) =
        make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]);
  }

  DEVICE_FN uint32_t acquire(const uint32_t* at) {
    uint32_t value;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
  }
  DEVICE_FN uint64_t acquire(const uint64_t* at) {
    uint64_t value;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
    return value;
  }
  DEVICE_FN void release(uint32_t* at, uint32_t value) {
    asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
  }
  DEVICE_FN void release(uint64_t* at, uint64_t value) {
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
  }
  DEVICE_FN bool claim(uint32_t* at) { return atomicCAS(at, 0u, 1u) == 0; }
  DEVICE_FN uint32_t count(uint32_t* at) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(at) : "memory");
    return old;
  }

  DEVICE_FN uint64_t now_ns() const {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  DEVICE_FN void pause() { __nanosleep(100); }
};

}  // namespace primitives::cuda
