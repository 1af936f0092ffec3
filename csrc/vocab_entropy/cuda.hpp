// The CUDA kernels: enqueued on the caller's stream, with the arguments of the CPU kernels.
//
// No torch and no CUDA header; plain structs and C functions. Nothing allocates, waits for the
// device or reads a result back, so every call can be captured in a CUDA graph. A function returns
// 0, or a code with its text in call.error.
#pragma once

#include "vocab_entropy/kernels.hpp"

namespace primitives::vocab_entropy {

// How exp is computed: by the polynomial of the definition, with the bits of the CPU; or by the
// device's ex2, which is faster and has bits of its own.
enum class Mode { kPortable, kDevice };

struct CudaCall {
  int device;    // becomes the current one of the calling thread, who restores its own
  void* stream;  // a cudaStream_t of that device
  Mode mode;
  char* error;
  int error_capacity;
};

extern "C" {

// Floats of device memory that the forward of these logits needs, aligned to 16 bytes; maybe none.
int64_t primitives_vocab_workspace(const Logits& logits, int64_t num_tokens);

// As Kernels::forward and Kernels::backward on the tokens [0, num_tokens), and Kernels::finish.
// quads and shards are aligned to 16 bytes, rank_stride a multiple of 4; logits and out to their
// elements.
int primitives_vocab_forward(const CudaCall& call, const Logits& logits, const Labels& labels,
                             int64_t num_tokens, float* workspace, float* quads);
int primitives_vocab_finish(const CudaCall& call, const float* shards, int64_t rank_stride,
                            int num_ranks, const Labels& labels, float scale, int64_t num_tokens,
                            float* quads, float* entropy, float* log_prob, float* log_sum_exp);
int primitives_vocab_backward(const CudaCall& call, const Logits& logits, const Labels& labels,
                              const float* quads, const Gradients& gradients, int64_t num_tokens,
                              void* out, int64_t out_stride);
}

}  // namespace primitives::vocab_entropy
