// Sums along the adjacent-pair tree: level by level x[i] = x[2i] + x[2i+1], an odd last element
// carried up.
//
// Carrying up is the same as padding with -0.0 (x + -0.0 is x for every x, also for -0.0), which
// lets the row tree use whole vectors only.
#pragma once

#include "canonical/simd.hpp"

namespace primitives::canonical {
namespace {

constexpr int64_t kRowTreePadding = 2 * kWidth;

// The tree over one vector.
CANONICAL_FN float tree_of_lanes(Vec x) {
#pragma GCC unroll 8
  for (int distance = 1; distance < kWidth; distance *= 2) {
    x = x + __builtin_shuffle(x, lane_numbers() ^ distance);
  }
  return x[0];
}

// The tree over x[0, n), n > 0. Destroys x, which must have kRowTreePadding floats of room after n.
inline float row_tree(float* x, int64_t n) {
  const Vec identity = set<Vec>(-0.0f);
  while (n > kWidth) {
    store_raw(x + n, identity);
    store_raw(x + n + kWidth, identity);
    const int64_t half = (n + 1) / 2;
    for (int64_t i = 0; i < half; i += kWidth) {
      const Vec a = load<Float32>(x + 2 * i), b = load<Float32>(x + 2 * i + kWidth);
      store_raw(x + i, even_lanes(a, b) + odd_lanes(a, b));
    }
    n = half;
  }
  store_raw(x + n, identity);
  return tree_of_lanes(load<Float32>(x));
}

// The tree over leaf(0) ... leaf(n - 1), lane by lane; +0 when n is 0.
//
// Partial sums wait on a stack, one per set bit of the number of leaves seen, largest first:
// merging equal ones as they appear, and the rest from the right at the end, is the adjacent-pair
// tree.
template <class Leaf>
CANONICAL_FN Vec column_tree(int64_t n, Leaf leaf) {
  Vec stack[64];
  int depth = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const Vec low = (leaf(i) + leaf(i + 1)) + (leaf(i + 2) + leaf(i + 3));
    const Vec high = (leaf(i + 4) + leaf(i + 5)) + (leaf(i + 6) + leaf(i + 7));
    Vec sum = low + high;
    for (int64_t merged = i >> 3; merged & 1; merged >>= 1) sum = stack[--depth] + sum;
    stack[depth++] = sum;
  }
  for (int64_t k = 0; i < n; i++, k++) {
    Vec sum = leaf(i);
    for (int64_t merged = k; merged & 1; merged >>= 1) sum = stack[--depth] + sum;
    stack[depth++] = sum;
  }
  if (depth == 0) return Vec{};
  Vec sum = stack[--depth];
  while (depth > 0) sum = stack[--depth] + sum;
  return sum;
}

}  // namespace
}  // namespace primitives::canonical
