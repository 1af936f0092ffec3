// Runs of bytes in 16-byte accesses, with right heads, tails and misalignment.
//
// [Note: device code] The headers of this folder are the device code: nvcc compiles them for a GPU,
// and the tests compile the very same functions for the host, where ranks, blocks and lanes are
// emulated. They reach memory, flags and the other lanes only through `M`, the machine:
//   num_lanes()              lanes of a block
//   each_lane(f)             f(lane) on every lane
//   all(f)                   f(lane) on every lane, a barrier of the block; whether all were true
//   sync()                   a barrier of the block
//   load(p), store(p, x)     p aligned to the size of its type
//   acquire(p)               load a flag, with all that its writer did before
//   release(p, x)            store a flag, system-wide, after all that this block did before a sync
//   claim(p)                 whether this caller is the first to turn *p from 0 to 1
//   count(p)                 adds 1 to *p, for blocks of one device: after all that this block did
//                            before a sync, and with all that those did who added before; the old
//                            *p
//   now_ns(), pause()        a clock, and a breath while waiting
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "canonical/packed.hpp"
#include "collectives/cuda/launch.h"

#if defined(__CUDACC__)
#define HOST_DEVICE_FN __host__ __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__
#define DEVICE_UNROLL _Pragma("unroll")
#define EXEC_CHECK_OFF _Pragma("nv_exec_check_disable")
#else
#define HOST_DEVICE_FN inline
#define DEVICE_CALL
#define DEVICE_UNROLL
#define EXEC_CHECK_OFF
#endif

namespace primitives::cuda {

using Pack = canonical::Packed;

constexpr int kPackNbytes = 16;
constexpr int kMaxRanks = PRIMITIVES_CUDA_MAX_RANKS;

template <class T>
HOST_DEVICE_FN T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
HOST_DEVICE_FN T larger(T a, T b) {
  return a > b ? a : b;
}

DEVICE_FN size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

// How a run of `numel` elements of `itemsize` bytes at `out` (a multiple of itemsize) is cut:
// `head` elements, words at multiples of their size, `tail` elements.
struct Split {
  size_t head, num_words, tail;

  DEVICE_FN Split(const char* out, size_t numel, size_t itemsize, size_t word_nbytes) {
    const size_t misfit = reinterpret_cast<uintptr_t>(out) % word_nbytes;
    head = smaller(numel, (misfit == 0 ? 0 : word_nbytes - misfit) / itemsize);
    num_words = (numel - head) * itemsize / word_nbytes;
    tail = numel - head - num_words * (word_nbytes / itemsize);
  }
  // Where edge element `i` of head + tail lies.
  DEVICE_FN size_t edge(size_t i, size_t numel) const {
    return i < head ? i : numel - tail + (i - head);
  }
};

constexpr int kWordsInFlight = 4;  // loads of a lane before its first store

// This lane's part of out[0, nbytes) = in[0, nbytes), where both lie at the same distance from a
// multiple of sizeof(Word).
template <class Word, class M>
DEVICE_FN void copy_words(M& m, int lane, char* out, const char* in, size_t nbytes) {
  const Split split(out, nbytes, 1, sizeof(Word));
  const size_t step = m.num_lanes();
  Word* to = reinterpret_cast<Word*>(out + split.head);
  const Word* from = reinterpret_cast<const Word*>(in + split.head);
  for (size_t first = lane; first < split.num_words; first += kWordsInFlight * step) {
    Word words[kWordsInFlight];
    DEVICE_UNROLL
    for (int k = 0; k < kWordsInFlight; k++) {
      if (first + k * step < split.num_words) words[k] = m.load(from + first + k * step);
    }
    DEVICE_UNROLL
    for (int k = 0; k < kWordsInFlight; k++) {
      if (first + k * step < split.num_words) m.store(to + first + k * step, words[k]);
    }
  }
  for (size_t i = lane; i < split.head + split.tail; i += step) {
    const size_t at = split.edge(i, nbytes);
    m.store(out + at, m.load(in + at));
  }
}

// This lane's part of out[0, nbytes) = in[0, nbytes), for any addresses.
template <class M>
DEVICE_CALL void copy(M& m, int lane, char* out, const char* in, size_t nbytes) {
  const uintptr_t apart = reinterpret_cast<uintptr_t>(out) - reinterpret_cast<uintptr_t>(in);
  if (apart == 0) return;
  if (apart % 16 == 0) return copy_words<Pack>(m, lane, out, in, nbytes);
  if (apart % 8 == 0) return copy_words<uint64_t>(m, lane, out, in, nbytes);
  if (apart % 4 == 0) return copy_words<uint32_t>(m, lane, out, in, nbytes);
  if (apart % 2 == 0) return copy_words<uint16_t>(m, lane, out, in, nbytes);
  copy_words<uint8_t>(m, lane, out, in, nbytes);
}

}  // namespace primitives::cuda
