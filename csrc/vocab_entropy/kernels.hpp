// The CPU kernels as a table of functions, one table per instruction set, all with the same bits.
//
// Plain pointers and sizes: the bindings check tensors, the kernels trust them. Every kernel works
// on the tokens [begin, end), so that threads can share them out. The definition is in
// docs/canonical-arithmetic.md.
#pragma once

#include <stdint.h>

#include "canonical/kernels.hpp"

namespace primitives::vocab_entropy {

using canonical::Dtype;

// A rank's logits [tokens, columns], rows contiguous: the segments [0, num_segments) of it, of
// which the last may be short or empty. All distances in elements.
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t row_stride, columns;
  int64_t segment_length;
  int num_segments;  // a power of two
  float scale;       // by which logits are multiplied: 1 / temperature
  bool prefetch;     // see [Note: prefetch] in forward.hpp
};

// Columns of the full vocabulary; data may be null: no token has a target.
struct Labels {
  const int64_t* data;
  int64_t ignored;  // the label of a token without a target
  int64_t first;    // column of the full vocabulary at which this rank's begin
};

// Of the loss by the three results of each token; null: zeros.
struct Gradients {
  const float *entropy, *log_prob, *log_sum_exp;
};

struct Kernels {
  // quads [tokens, 4]: of this rank's columns
  void (*forward)(const Logits& logits, const Labels& labels, int64_t begin, int64_t end,
                  float* quads);
  // shards [num_ranks, tokens, 4] with a stride between ranks -> quads [tokens, 4] of the whole
  // vocabulary, and the results, [tokens] each; log_prob is 0 where a token has no target
  void (*finish)(const float* shards, int64_t rank_stride, int num_ranks, const Labels& labels,
                 float scale, int64_t begin, int64_t end, float* quads, float* entropy,
                 float* log_prob, float* log_sum_exp);
  // out like the logits, rows out_stride apart; may be the logits themselves. stream: write around
  // the caches.
  void (*backward)(const Logits& logits, const Labels& labels, const float* quads,
                   const Gradients& gradients, int64_t begin, int64_t end, void* out,
                   int64_t out_stride, bool stream);
  // The limits of the benchmark: reads num_words, or reads and writes them, and does nothing else.
  // num_words is a multiple of 256.
  uint32_t (*read_words)(const uint32_t* words, int64_t num_words, bool prefetch);
  void (*flip_words)(uint32_t* words, int64_t num_words, bool prefetch);
};

extern const Kernels kScalarKernels, kAvx2Kernels, kAvx512Kernels;

// The table for active_isa().
const Kernels& kernels();

}  // namespace primitives::vocab_entropy
