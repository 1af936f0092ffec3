// The adjacent-pair tree by a thread, a warp, a block of threads. (docs/canonical-arithmetic.md;
// the CPU's is canonical/tree.hpp.) An odd last element carried up is the same as one padded with
// -0.0.
#pragma once

#include "canonical/cuda/elements.hpp"

namespace primitives::canonical {
namespace {

// Over leaf(0) ... leaf(n - 1), n > 0, one after the other. Partial sums wait on a stack, one per
// set bit of the number of leaves seen.
template <class Leaf>
DEVICE_FN float serial_tree(int64_t n, const Leaf& leaf) {
  float stack[48];
  int depth = 0;
  for (int64_t i = 0; i < n; i++) {
    float sum = leaf(i);
    for (int64_t merged = i; merged & 1; merged >>= 1) sum = stack[--depth] + sum;
    stack[depth++] = sum;
  }
  float sum = stack[--depth];
  while (depth > 0) sum = stack[--depth] + sum;
  return sum;
}

// Over kNumel values, a power of two.
template <int kNumel>
DEVICE_FN float tree_of(const float x[kNumel]) {
  float sums[kNumel];
#pragma unroll
  for (int i = 0; i < kNumel; i++) sums[i] = x[i];
#pragma unroll
  for (int distance = 1; distance < kNumel; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kNumel; i += 2 * distance) sums[i] = sums[i] + sums[i + distance];
  }
  return sums[0];
}

// Over the lanes of a warp; for all of them.
template <class Thread>
DEVICE_FN float warp_tree(const Thread& thread, float x) {
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) x = x + thread.shuffle_xor(x, mask);
  return x;
}

// kWarps values, one of each warp of the block, for all its threads.
template <int kWarps, class Thread>
DEVICE_FN void share_among_warps(const Thread& thread, float x, float values[kWarps]) {
  float* shared = thread.shared();
  if (thread.index() % kWarp == 0) shared[thread.index() / kWarp] = x;
  thread.sync_block();
#pragma unroll
  for (int i = 0; i < kWarps; i++) values[i] = shared[i];
  thread.sync_block();
}

// Over n leaves, by all threads of a block and for all of them; -0.0 for none. leaves(first, x)
// gives the kNumel leaves from first on. Needs kWarps floats of shared memory.
template <int kWarps, int kNumel, class Thread, class Leaves>
DEVICE_FN float block_tree(const Thread& thread, int64_t n, const Leaves& leaves) {
  constexpr int64_t kChunk = kWarp * kNumel;
  const int64_t num_chunks = (n + kChunk - 1) / kChunk;
  int64_t run = 1;  // chunks of a warp
  while (run * kWarps < num_chunks) run *= 2;
  const int64_t begin = thread.index() / kWarp * run;
  const int64_t left = num_chunks - begin;
  float sum = -0.0f;
  if (left > 0) {
    sum = serial_tree(left < run ? left : run, [&](int64_t chunk) {
      const int64_t first = (begin + chunk) * kChunk + thread.index() % kWarp * kNumel;
      float x[kNumel];
      leaves(first, x);
#pragma unroll
      for (int i = 0; i < kNumel; i++) x[i] = first + i < n ? x[i] : -0.0f;
      return warp_tree(thread, tree_of<kNumel>(x));
    });
  }
  float sums[kWarps];
  share_among_warps<kWarps>(thread, sum, sums);
  return tree_of<kWarps>(sums);
}

// The larger one; NaN when either is NaN.
DEVICE_FN float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

// The largest of all threads' x, for all of them, with +0 for -0.
template <int kWarps, class Thread>
DEVICE_FN float block_max(const Thread& thread, float x) {
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) x = max_or_nan(x, thread.shuffle_xor(x, mask));
  float values[kWarps];
  share_among_warps<kWarps>(thread, x, values);
#pragma unroll
  for (int i = 0; i < kWarps; i++) x = max_or_nan(x, values[i]);
  return x + 0.0f;
}

}  // namespace
}  // namespace primitives::canonical
