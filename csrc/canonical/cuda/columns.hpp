// Sums over rows, each element of the result by one thread: along an outer dimension, over the
// tokens of a block, and over the tokens with one id.
#pragma once

#include "canonical/cuda/tree.hpp"

namespace primitives::canonical {
namespace {

// x [outer, n, rows, length] -> out [outer, rows, length]; bias [length] or null
template <class T>
struct TreeSum {
  using S = typename T::Storage;
  static constexpr int kThreads = 256, kMinBlocks = 4;

  const S* x;
  int64_t outer, n, rows, length;
  Input bias;
  Output out;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t i = int64_t{thread.block_x()} * kThreads + thread.index();
    const int64_t inner = rows * length;
    if (i >= outer * inner) return;
    const S* column = x + i / inner * n * inner + i % inner;
    float sum = 0.0f;
    if (n > 0) {
      sum = serial_tree(n, [&](int64_t j) { return T::widen(thread.load(column + j * inner)); });
    }
    if (bias.data != nullptr) sum = sum + load_any(thread, bias, i % length);
    store_any(thread, out, i, sum);
  }
};

// dy, x [tokens, hidden] -> dweight, dbias [num_blocks, hidden]; RMSNorm has no mean and no dbias.
template <class T, bool kCentred>
struct NormWeightGradient {
  using S = typename T::Storage;
  static constexpr int kThreads = 256, kMinBlocks = 4;

  const S *dy, *x;
  const float *mean, *rstd;
  int64_t tokens, hidden, num_blocks;
  float *dweight, *dbias;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t i = int64_t{thread.block_x()} * kThreads + thread.index();
    if (i >= num_blocks * hidden) return;
    const int64_t block = tokens / num_blocks, first = i / hidden * block, column = i % hidden;
    const auto gradient = [&](int64_t t) {
      return T::widen(thread.load(dy + (first + t) * hidden + column));
    };
    float weight_sum = 0.0f, bias_sum = 0.0f;
    if (block > 0) {
      weight_sum = serial_tree(block, [&](int64_t t) {
        const float v = T::widen(thread.load(x + (first + t) * hidden + column));
        const float centred = kCentred ? v - thread.load(mean + first + t) : v;
        return gradient(t) * (centred * thread.load(rstd + first + t));
      });
      if (kCentred) bias_sum = serial_tree(block, gradient);
    }
    store_float(thread, dweight + i, weight_sum);
    if (kCentred) store_float(thread, dbias + i, bias_sum);
  }
};

// dy [tokens, hidden], ids [tokens] -> the rows of table [vocabulary, hidden] that have a token.
//
// Launch: a block of threads per token. That of the first token with an id adds up the row of the
// table, token after token; the others have nothing to do.
template <class T>
struct EmbeddingBackward {
  using S = typename T::Storage;
  static constexpr int kThreads = 256, kMinBlocks = 4;
  static constexpr int64_t kSharedNbytes = 4 * kThreads;

  const S* dy;
  const int64_t* ids;
  int64_t tokens, hidden;
  float* table;

  // Calls body for the tokens of [begin, end) with this id, in order, until it returns false. All
  // threads of the block together.
  template <class Thread, class Body>
  DEVICE_FN void for_tokens(const Thread& thread, int64_t begin, int64_t end, int64_t id,
                            const Body& body) const {
    float* found = thread.shared();
    for (int64_t t = begin; t < end; t += kThreads) {
      const int64_t mine = t + thread.index();
      found[thread.index()] = mine < end && thread.load(ids + mine) == id ? 1.0f : 0.0f;
      thread.sync_block();
      for (int i = 0; i < kThreads; i++) {
        if (found[i] != 0.0f && !body(t + i)) return;
      }
      thread.sync_block();
    }
  }

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t token = thread.block_x(), id = thread.load(ids + token);
    bool first = true;
    for_tokens(thread, 0, token, id, [&](int64_t) { return first = false; });
    if (!first) return;
    for (int64_t start = 0; start < hidden; start += kThreads) {
      const int64_t column = start + thread.index();
      float sum = 0.0f;
      for_tokens(thread, token, tokens, id, [&](int64_t t) {
        if (column < hidden) sum = sum + T::widen(thread.load(dy + t * hidden + column));
        return true;
      });
      if (column < hidden) store_float(thread, table + id * hidden + column, sum);
    }
  }
};

}  // namespace
}  // namespace primitives::canonical
