// The CUDA kernels of the vocabulary entropy and their C functions.
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "canonical/cuda_thread.cuh"
#include "vocab_entropy/launch.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int64_t kEnoughBlocks = 1024;  // for the multiprocessors of any GPU, several each

// Starts kernels on the device and stream of a call.
class Launcher {
 public:
  explicit Launcher(const CudaCall& call) : call_(call), code_(cudaSetDevice(call.device)) {}

  template <class Kernel>
  int run(const Kernel& kernel, const Grid& grid) {
    if (grid.x > INT32_MAX) return fail("more than 2^31 - 1 blocks of threads");
    if (code_ == cudaSuccess) {
      code_ = canonical::start(kernel, grid, static_cast<cudaStream_t>(call_.stream));
    }
    if (code_ != cudaSuccess) {
      snprintf(call_.error, static_cast<size_t>(call_.error_capacity), "%s: %s",
               cudaGetErrorName(code_), cudaGetErrorString(code_));
    }
    return code_;
  }

  int64_t enough_blocks() const { return kEnoughBlocks; }

  int fail(const char* text) {
    snprintf(call_.error, static_cast<size_t>(call_.error_capacity), "%s", text);
    return cudaErrorInvalidValue;
  }

 private:
  const CudaCall& call_;
  cudaError_t code_;
};

}  // namespace

extern "C" {

int64_t primitives_vocab_workspace(const Logits& logits, int64_t num_tokens) {
  return workspace_of(logits, num_tokens, kEnoughBlocks);
}

int primitives_vocab_forward(const CudaCall& call, const Logits& logits, const Labels& labels,
                             int64_t num_tokens, float* workspace, float* quads) {
  Launcher launcher(call);
  return launch_forward(launcher, call.mode, logits, labels, num_tokens, workspace, quads);
}

int primitives_vocab_finish(const CudaCall& call, const float* shards, int64_t rank_stride,
                            int num_ranks, const Labels& labels, float scale, int64_t num_tokens,
                            float* quads, float* entropy, float* log_prob, float* log_sum_exp) {
  Launcher launcher(call);
  return launch_finish(launcher, shards, rank_stride, num_ranks, labels, scale, num_tokens, quads,
                       entropy, log_prob, log_sum_exp);
}

int primitives_vocab_backward(const CudaCall& call, const Logits& logits, const Labels& labels,
                              const float* quads, const Gradients& gradients, int64_t num_tokens,
                              void* out, int64_t out_stride) {
  Launcher launcher(call);
  return launch_backward(launcher, call.mode, logits, labels, quads, gradients, num_tokens, out,
                         out_stride);
}
}

}  // namespace primitives::vocab_entropy
